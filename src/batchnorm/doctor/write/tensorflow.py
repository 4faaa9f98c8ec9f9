"""Writes TensorFlow V2 checkpoints: a copy of one, with some tensors replaced or added."""

import contextlib
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from batchnorm.doctor.read.bundle import DTYPES, Bundle, Entry, read_bundle
from batchnorm.doctor.read.crc32c import crc32c, masked
from batchnorm.doctor.read.object_graph import KEY
from batchnorm.doctor.read.source import shown
from batchnorm.doctor.read.tensorflow import find_prefix
from batchnorm.doctor.read.wire import Budget, Message, write_varint
from batchnorm.doctor.write.leveldb import write_table
from batchnorm.errors import DataError
from batchnorm.files import TEMPORARY, current_umask, sync_folder, write_atomic

CHUNK = 1 << 24
LENGTH_DELIMITED = 2


@dataclass(frozen=True)
class Part:
    """What the new checkpoint has under a key.

    Attributes:
        dtype: number in TensorFlow's types.proto.
        shape: encoded.
        size: in bytes.
        crc: masked CRC-32C.
        slices: encoded fields of a partitioned tensor.
        chunks: yields the bytes.
    """

    dtype: int
    shape: bytes
    size: int
    crc: int
    slices: bytes
    chunks: Callable[[], Iterator[bytes]]

    def record(self, offset: int) -> bytes:
        """The entry of the index."""
        numbers = field(1, self.dtype) + delimited(2, self.shape) + field(4, offset) + field(5, self.size)
        return numbers + write_varint(6 << 3 | 5) + struct.pack("<I", self.crc) + self.slices


def write_tensorflow(source: str | Path, prefix: str | Path, tensors: Mapping[str, np.ndarray]) -> list[Path]:
    """Write a copy of a checkpoint in which some tensors are replaced or added; the source stays as it is.

    Args:
        source: the checkpoint, as :func:`batchnorm.doctor.read.tensorflow.read_tensorflow` takes it.
        prefix: of the new one; no file of that name may exist.
        tensors: by key. One that the source has keeps its dtype there; a new one has the dtype of the array.

    Returns:
        The files: one ``.data-00000-of-00001``, ``.meta`` if the source has a graph, and ``.index``, which is written
        last: without it there is no checkpoint.

    Raises:
        DataError: the source cannot be read; a shape differs from the source's; a tensor is partitioned or no numbers;
            or a name is new in an object-based checkpoint, where TensorFlow would not find it.
        FileExistsError: the new checkpoint has a file already.
        OSError: the disk is full or the folder cannot be written; then nothing is left behind.

    Example:
        >>> from batchnorm.doctor.read.tensorflow import read_tensorflow
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "old.index").write_bytes(write_table([(b"", b"\\x08\\x01")]))
        >>> (folder / "old.data-00000-of-00001").touch()
        >>> paths = write_tensorflow(folder / "old", folder / "new", {"bn/moving_mean": np.zeros(3, "f4")})
        >>> [path.name for path in paths]
        ['new.data-00000-of-00001', 'new.index']
        >>> [(layer.path, layer.num_features) for layer in read_tensorflow(folder / "new").layers]
        [('bn', 3)]
    """
    bundle = read_bundle(find_prefix(Path(source)))
    parts = {key: copied(bundle, key, entry) for key, entry in bundle.entries.items()}
    for name, array in tensors.items():
        parts[name.encode()] = given(bundle, name, np.asarray(array))
    data, meta, index = (Path(f"{prefix}.{ending}") for ending in ("data-00000-of-00001", "meta", "index"))
    for path in (data, meta, index):
        if path.exists():
            raise FileExistsError(f"{path} exists; a checkpoint is never overwritten. Try: another prefix")
    written: list[Path] = []
    try:
        graph = Path(f"{bundle.prefix}.meta")
        written.append(data)
        records = write_data(data, dict(sorted(parts.items())))
        if graph.exists():
            written.append(meta)
            shutil.copyfile(graph, meta)
        write_atomic(index, write_table([(b"", header(bundle)), *records]))
    except BaseException:
        for path in written:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        raise
    return [*written, index]


def copied(bundle: Bundle, key: bytes, entry: Entry) -> Part:
    """A tensor of the source, with the checksum that it has there."""
    message = Message(bundle.records[key], Budget(bundle.prefix))
    shape = b"".join(list(message.bytes_of(2))[-1:])
    slices = b"".join(delimited(7, bytes(value)) for value in message.bytes_of(7))
    size = 0 if entry.partitioned else entry.size

    def chunks() -> Iterator[bytes]:
        for start in range(0, size, CHUNK):
            yield bundle.shards[entry.shard].read(entry.offset + start, min(CHUNK, size - start))

    return Part(entry.dtype, shape, size, entry.crc, slices, chunks)


def given(bundle: Bundle, name: str, array: np.ndarray) -> Part:
    """A tensor that replaces one of the source or is new."""
    entry = bundle.entries.get(name.encode())
    if entry is not None:
        dtype, data = entry.dtype, stored_as(bundle, entry, array)
    elif KEY.encode() in bundle.entries:
        raise DataError(
            f"{bundle.prefix}: {shown(name)} is not in this object-based checkpoint; TensorFlow finds variables there "
            "by its graph of objects, so nothing can be added"
        )
    elif not name or name.startswith("\0"):
        raise DataError(f"{shown(name)} cannot be the name of a tensor")
    else:
        code = array.dtype.newbyteorder("<").str
        numbers = [number for number, (label, form) in DTYPES.items() if form == code and label == array.dtype.name]
        if not numbers:
            raise DataError(f"{shown(name)}: TensorFlow checkpoints hold no {array.dtype}")
        dtype, data = numbers[0], np.ascontiguousarray(array).astype(code).tobytes()
    shape = b"".join(delimited(2, field(1, size)) for size in array.shape)
    return Part(dtype, shape, len(data), masked(crc32c(data)), b"", lambda: iter([data]))


def stored_as(bundle: Bundle, entry: Entry, array: np.ndarray) -> bytes:
    """The bytes of an array in the dtype that the source has."""
    label, form = DTYPES.get(entry.dtype, (entry.dtype_name, None))
    if form is None or entry.partitioned:
        raise DataError(f"{bundle.prefix}: {shown(entry.name)} is partitioned or no numbers: it cannot be replaced")
    if array.shape != entry.shape:
        raise DataError(f"{bundle.prefix}: {shown(entry.name)} has shape {entry.shape}, the replacement {array.shape}")
    if label == "bfloat16":
        return to_bfloat16(array.astype(np.float32)).tobytes()
    if not np.can_cast(array.dtype, np.dtype(form), "same_kind"):
        raise DataError(f"{bundle.prefix}: {shown(entry.name)} holds {label}, the replacement {array.dtype}")
    return array.astype(form).tobytes()


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """The upper halves of float32, rounded to the nearest, ties to even."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + (0x7FFF + (bits >> 16 & 1))) >> 16
    return np.where(np.isnan(values), (bits >> 16) | 0x40, rounded).astype("<u2")


def write_data(path: Path, parts: dict[bytes, Part]) -> list[tuple[bytes, bytes]]:
    """The one data file, whole or absent; the entries of the index."""
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=TEMPORARY, dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            records = [(key, part.record(append(file, part))) for key, part in parts.items()]
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~current_umask())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    sync_folder(path.parent)
    return records


def append(file: BinaryIO, part: Part) -> int:
    """Where the bytes begin."""
    offset = file.tell()
    for chunk in part.chunks():
        file.write(chunk)
    return offset


def header(bundle: Bundle) -> bytes:
    """One data file, and the version of the source."""
    versions = Message(bundle.header, Budget(bundle.prefix)).bytes_of(3)
    return field(1, 1) + b"".join(delimited(3, bytes(version)) for version in versions)


def field(number: int, value: int) -> bytes:
    """A number; none is written for 0, as protobuf has it."""
    return write_varint(number << 3) + write_varint(value) if value else b""


def delimited(number: int, value: bytes) -> bytes:
    return write_varint(number << 3 | LENGTH_DELIMITED) + write_varint(len(value)) + value
