"""The IDX format of the MNIST database: 2 zero bytes, type, number of dimensions, big-endian sizes, then the values."""

import gzip
import hashlib
import struct
import zlib
from pathlib import Path

import numpy as np

from batchnorm.errors import DataError

UNSIGNED_BYTE = 0x08


def read_idx(path: Path, shape: tuple[int, ...], md5: str) -> np.ndarray:
    """Read one IDX file of unsigned bytes, plain or gzip, and check that it is the expected one.

    Args:
        path: the file; a name ending in ``.gz`` is decompressed.
        shape: the sizes its header must state.
        md5: digest of the uncompressed file, as published.

    Returns:
        uint8 array of the given shape.

    Raises:
        DataError: the file is missing, damaged, truncated, has trailing bytes or other contents. The message says
            what was expected, what was found, and what the file begins with.
    """
    header = struct.pack(f">BBBB{len(shape)}I", 0, 0, UNSIGNED_BYTE, len(shape), *shape)
    length = len(header) + int(np.prod(shape))
    content = read_bounded(path, length + 1)
    begin = f"it begins with {content[:16].hex(' ')}" if content else "it is empty"
    if content[: len(header)] != header:
        raise DataError(
            f"{path}: expected an IDX header {header.hex(' ')} (unsigned bytes of shape {shape}), but {begin}"
        )
    if len(content) != length:
        found = f"{len(content)}" if len(content) < length else f"more than {length}"
        raise DataError(
            f"{path}: expected {length} bytes, found {found}: the file is not complete or not alone; {begin}"
        )
    digest = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if digest != md5:
        raise DataError(f"{path}: expected md5 {md5}, found {digest}: other data than the MNIST database; {begin}")
    return np.frombuffer(content, np.uint8, offset=len(header)).reshape(shape)


def read_bounded(path: Path, limit: int) -> bytes:
    """At most ``limit`` bytes of the uncompressed file: a small archive cannot fill the memory."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            return file.read(limit)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        with open(path, "rb") as raw:
            begin = raw.read(16).hex(" ")
        reason = str(error).rstrip(".")
        raise DataError(f"{path}: expected a complete gzip file, but {reason}; it begins with {begin}") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
