"""Writes the sorted table that :mod:`batchnorm.doctor.read.leveldb` reads."""

import struct
from collections.abc import Sequence

from batchnorm.doctor.read.crc32c import crc32c, masked
from batchnorm.doctor.read.leveldb import FOOTER, MAGIC, UNCOMPRESSED
from batchnorm.doctor.read.wire import write_varint

# a key is written in full every so many entries; a block has so many, of about 100 bytes
RESTART_INTERVAL = 16
BLOCK_ENTRIES = 512


def write_table(items: Sequence[tuple[bytes, bytes]]) -> bytes:
    """The file for keys in rising order with their values.

    Example:
        >>> from batchnorm.doctor.read.leveldb import read_table
        >>> read_table(write_table([(b"", b"header"), (b"bn/beta", b"1"), (b"bn/gamma", b"2")]), "a table")
        [(b'', b'header'), (b'bn/beta', b'1'), (b'bn/gamma', b'2')]
    """
    body, handles = bytearray(), []
    for start in range(0, len(items), BLOCK_ENTRIES):
        part = items[start : start + BLOCK_ENTRIES]
        handles.append((part[-1][0], append_block(body, part)))
    meta = append_block(body, [])
    index = append_block(body, handles)
    footer = (meta + index).ljust(FOOTER - 8, b"\0") + struct.pack("<Q", MAGIC)
    return bytes(body) + footer


def append_block(body: bytearray, items: Sequence[tuple[bytes, bytes]]) -> bytes:
    """Add a block with its checksum; where it starts and how long it is, encoded."""
    block, restarts, previous = bytearray(), [0], b""
    for index, (key, value) in enumerate(items):
        shared = 0
        if index % RESTART_INTERVAL:
            shared = shared_bytes(previous, key)
        elif index:
            restarts.append(len(block))
        block += (
            write_varint(shared) + write_varint(len(key) - shared) + write_varint(len(value)) + key[shared:] + value
        )
        previous = key
    block += struct.pack(f"<{len(restarts) + 1}I", *restarts, len(restarts))
    handle = write_varint(len(body)) + write_varint(len(block))
    block.append(UNCOMPRESSED)
    body += block + struct.pack("<I", masked(crc32c(bytes(block))))
    return handle


def shared_bytes(first: bytes, second: bytes) -> int:
    """How many bytes both begin with."""
    count = min(len(first), len(second))
    return next((index for index in range(count) if first[index] != second[index]), count)
