"""The sorted table of keys and values that LevelDB and TensorFlow's ``.index`` files are.

Blocks of keys that leave out what they share with the key before, each with a CRC-32C; a block that lists the blocks; a
footer. Source: LevelDB's ``doc/table_format.md``, and TensorFlow's ``lib/io/format.cc``.
"""

import struct
from collections.abc import Iterator
from itertools import pairwise

from batchnorm.doctor.read.crc32c import crc32c, masked
from batchnorm.doctor.read.wire import read_varint
from batchnorm.errors import DataError

MAGIC = 0xDB4775248B80FB57
FOOTER = 48
# one byte of compression, four of CRC-32C
TRAILER = 5
UNCOMPRESSED, SNAPPY = 0, 1
# a key can repeat a long one before it in three bytes: so the sum of all keys is bounded, not only the file
MOST_KEY_BYTES = 1 << 26


def read_table(data: bytes, path: object) -> list[tuple[bytes, bytes]]:
    """Every key with its value, in the order of the keys.

    Args:
        data: the whole file.
        path: for messages.

    Raises:
        DataError: the file is truncated or damaged, or its blocks are compressed.
    """
    view = memoryview(data)
    if len(view) < FOOTER or struct.unpack_from("<Q", view, len(view) - 8)[0] != MAGIC:
        raise DataError(
            f"{path}: expected a table that ends in {MAGIC:x}, as TensorFlow's .index files do; these "
            f"{len(view):,} bytes do not: the file is truncated or of another format"
        )
    body, footer = view[:-FOOTER], view[-FOOTER:-8]
    _, _, at = read_handle(footer, 0, path)
    start, size, _ = read_handle(footer, at, path)
    found: list[tuple[bytes, bytes]] = []
    key_bytes, reached = 0, 0
    for _, handle in read_block(body, start, size, path):
        start, size, _ = read_handle(memoryview(handle), 0, path)
        if start < reached:
            raise DataError(f"{path}: damaged: the block at byte {start} overlaps the one before it")
        reached = start + size
        for key, value in read_block(body, start, size, path):
            key_bytes += len(key)
            if key_bytes > MOST_KEY_BYTES:
                raise DataError(f"{path}: more than {MOST_KEY_BYTES:,} bytes of names: refused")
            found.append((key, value))
    for (first, _), (second, _) in pairwise(found):
        if first >= second:
            raise DataError(f"{path}: damaged: key {second!r:.80} follows {first!r:.80}, expected rising keys")
    return found


def read_handle(view: memoryview, at: int, path: object) -> tuple[int, int, int]:
    """Where a block starts, how long it is, and where the handle ends."""
    start, at = read_varint(view, at, path)
    size, at = read_varint(view, at, path)
    return start, size, at


def read_block(body: memoryview, start: int, size: int, path: object) -> Iterator[tuple[bytes, bytes]]:
    """The keys and values of one block, after its checksum."""
    end = start + size
    if end + TRAILER > len(body):
        raise DataError(f"{path}: damaged: a block at byte {start} of {size:,} bytes is not inside the file")
    kind, stored = body[end], struct.unpack_from("<I", body, end + 1)[0]
    if masked(crc32c(body[start : end + 1])) != stored:
        raise DataError(f"{path}: damaged: the block at byte {start} does not have the CRC-32C that is stored with it")
    if kind != UNCOMPRESSED:
        name = "Snappy" if kind == SNAPPY else f"method {kind}"
        raise DataError(
            f"{path}: its blocks are compressed ({name}), which this reader does not expand. Try: restore and save it "
            "with TensorFlow 2, which writes the index uncompressed"
        )
    yield from block_entries(body[start:end], path)


def block_entries(block: memoryview, path: object) -> Iterator[tuple[bytes, bytes]]:
    """Each entry: bytes shared with the key before, bytes of its own, length of the value, key, value."""
    restarts = struct.unpack_from("<I", block, len(block) - 4)[0] if len(block) >= 4 else 0
    end = len(block) - 4 - 4 * restarts
    if end < 0:
        raise DataError(f"{path}: damaged: {restarts:,} restart points in a block of {len(block):,} bytes")
    entries, at, key = block[:end], 0, b""
    while at < end:
        shared, at = read_varint(entries, at, path)
        own, at = read_varint(entries, at, path)
        length, at = read_varint(entries, at, path)
        if shared > len(key) or own + length > end - at:
            raise DataError(f"{path}: damaged: an entry of a block does not fit into it")
        key = key[:shared] + bytes(entries[at : at + own])
        yield key, bytes(entries[at + own : at + own + length])
        at += own + length
