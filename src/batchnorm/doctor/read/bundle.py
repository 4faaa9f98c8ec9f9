"""TensorFlow's V2 checkpoint as a file format: an index of tensors, and shards that hold their bytes.

``NAME.index`` is a table: the empty key has the header, every other key a tensor's dtype, shape and place in
``NAME.data-00000-of-0000N``. Read here and not with TensorFlow, whose import takes seconds and whose C++ ends the
process on some damaged files.

Source: TensorFlow's ``protobuf/tensor_bundle.proto`` and ``util/tensor_bundle/tensor_bundle.cc``.
"""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from batchnorm.doctor.checkpoint import StoredTensor
from batchnorm.doctor.read.crc32c import crc32c, masked
from batchnorm.doctor.read.dtypes import decode
from batchnorm.doctor.read.faults import Faults
from batchnorm.doctor.read.leveldb import read_table
from batchnorm.doctor.read.slices import place_of, read_slices, slice_key
from batchnorm.doctor.read.source import Source, shown
from batchnorm.doctor.read.table import Table
from batchnorm.doctor.read.wire import Budget, Message, decoded, read_varint
from batchnorm.errors import DataError

# an index has about 100 bytes per tensor
MOST_INDEX_BYTES = 1 << 27
MOST_SHARDS = 99_999
# CRC-32C of values, the smallest tensors first: BN layers are always among them. At 6 to 100 MB/s
MOST_CHECKED_BYTES = 1 << 24
MOST_STRING_BYTES = 1 << 26
UNFIT = "is partitioned, and its slices do not make up the whole"
STRING = 7
UNCHECKED = (STRING, 20, 21)
# number in TensorFlow's types.proto -> name, and the NumPy type that its bytes have
DTYPES: dict[int, tuple[str, str | None]] = {
    1: ("float32", "<f4"), 2: ("float64", "<f8"), 3: ("int32", "<i4"), 4: ("uint8", "|u1"), 5: ("int16", "<i2"),
    6: ("int8", "|i1"), 7: ("string", None), 8: ("complex64", "<c8"), 9: ("int64", "<i8"), 10: ("bool", "|b1"),
    14: ("bfloat16", "<u2"), 17: ("uint16", "<u2"), 18: ("complex128", "<c16"), 19: ("float16", "<f2"),
    20: ("resource", None), 21: ("variant", None), 22: ("uint32", "<u4"), 23: ("uint64", "<u8"),
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One tensor of the index.

    Attributes:
        key: in the index.
        name: the key, readable.
        dtype: number in TensorFlow's types.proto.
        shape: of the whole tensor.
        shard: number of the data file.
        offset: in it.
        size: in bytes.
        crc: masked CRC-32C of the bytes.
        partitioned: whether this stands for slices that have entries of their own, and has no bytes.
        internal: whether it is such a slice.
    """

    key: bytes
    name: str
    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    crc: int
    partitioned: bool
    internal: bool

    @property
    def dtype_name(self) -> str:
        return DTYPES.get(self.dtype, (f"type {self.dtype}", None))[0]


@dataclass(frozen=True)
class Bundle:
    """A checkpoint whose index was read; values are read on request.

    Attributes:
        prefix: what the names of its files begin with.
        shards: the data files.
        entries: by key, in the order of the index.
        records: the same entries as bytes, for whoever copies them.
        header: the header's bytes.
    """

    prefix: Path
    shards: list[Source]
    entries: dict[bytes, Entry]
    records: dict[bytes, bytes]
    header: bytes

    def read(self, entry: Entry) -> bytes:
        """The bytes of an entry, as they are."""
        return self.shards[entry.shard].read(entry.offset, entry.size)

    def values(self, entry: Entry) -> np.ndarray:
        """An entry of numbers as an array; bfloat16 as float32."""
        if not entry.partitioned:
            return decode(self.read(entry), entry.dtype_name).reshape(entry.shape)
        parts = self.parts(entry)
        if parts is None:
            raise DataError(f"{self.prefix}: {shown(entry.name)} {UNFIT}")
        whole = np.empty(entry.shape, decode(b"", entry.dtype_name).dtype)
        for place, part in parts:
            whole[place] = self.values(part)
        return whole

    def parts(self, entry: Entry) -> list[tuple[tuple[slice, ...], Entry]] | None:
        """Where the slices of a partitioned tensor lie in it; None if they do not make up the whole."""
        found = []
        for extents in read_slices(Message(self.records[entry.key], Budget(self.prefix))):
            place, part = place_of(extents, entry.shape), self.entries.get(slice_key(entry.key, extents))
            if place is None or part is None or part.partitioned or part.dtype != entry.dtype:
                return None
            if part.shape != tuple(one.stop - one.start for one in place):
                return None
            found.append((place, part))
        whole = math.prod(entry.shape) == sum(math.prod(part.shape) for _, part in found)
        return found if whole and len({part.key for _, part in found}) == len(found) else None

    def text(self, entry: Entry) -> bytes:
        """The one string of a string scalar: its length, a checksum, then the bytes.

        Raises:
            DataError: it is no string scalar, too large, or damaged.
        """
        if entry.dtype != STRING or entry.shape != () or entry.partitioned or entry.size > MOST_STRING_BYTES:
            raise DataError(f"{self.prefix}: {shown(entry.name)} is not one string, or too long")
        data, path = self.read(entry), self.shards[entry.shard].path
        length, at = read_varint(memoryview(data), 0, path)
        if at + 4 + length != len(data):
            raise DataError(f"{path}: damaged: the string {shown(entry.name)} has another length than it says")
        return data[at + 4 :]

    def fill(self, table: Table) -> None:
        """Add all tensors that have a name, and compare checksums."""
        for entry in self.entries.values():
            if not entry.internal:
                problem = ""
                if DTYPES.get(entry.dtype, ("", None))[1] is None:
                    problem = f"is of dtype {entry.dtype_name}"
                elif entry.partitioned and self.parts(entry) is None:
                    problem = UNFIT
                load = partial(self.values, entry)
                table.add(StoredTensor(entry.name, entry.shape, entry.dtype_name, load), problem)
        table.facts["checksums"] = self.check_sums(table.faults)

    def check_sums(self, faults: Faults) -> dict[str, int]:
        """Compare checksums of values; strings have one of another kind.

        Returns:
            How many tensors were ``checked``, and how many were ``left`` because together they are too large.
        """
        budget, checked = MOST_CHECKED_BYTES, 0
        plain = [entry for entry in self.entries.values() if not entry.partitioned and entry.dtype not in UNCHECKED]
        for entry in sorted(plain, key=lambda entry: entry.size):
            budget -= entry.size
            if budget < 0:
                break
            checked += 1
            if (found := masked(crc32c(self.read(entry)))) != entry.crc:
                faults.add("BN002", entry.name, "checksum differs", expected=entry.crc, found=found, bytes=entry.size)
        return {"checked": checked, "left": len(plain) - checked}


def read_bundle(prefix: Path) -> Bundle:
    """Read the index of a checkpoint and check it against its data files.

    Args:
        prefix: such as ``model.ckpt-5``, of ``model.ckpt-5.index``.

    Returns:
        The entries; no values yet.

    Raises:
        DataError: a file is missing, truncated, damaged or compressed, or the index does not fit to the data.
    """
    path = Path(f"{prefix}.index")
    table = read_table(read_small(path, MOST_INDEX_BYTES), path)
    if not table or table[0][0] != b"":
        raise DataError(f"{path}: expected the header of a TensorFlow checkpoint under the empty key, found none")
    budget = Budget(path)
    header = Message(table[0][1], budget)
    count = header.integer(1)
    if header.integer(2) != 0:
        raise DataError(f"{path}: written on a big-endian machine; only little-endian checkpoints are read")
    if not 1 <= count <= MOST_SHARDS:
        raise DataError(f"{path}: damaged: {count:,} data files, expected 1 to {MOST_SHARDS:,}")
    shards = [Source(f"{prefix}.data-{index:05d}-of-{count:05d}") for index in range(count)]
    entries = {key: read_entry(key, value, budget) for key, value in table[1:]}
    check_places(list(entries.values()), shards, path)
    return Bundle(prefix, shards, entries, dict(table[1:]), table[0][1])


def read_entry(key: bytes, value: bytes, budget: Budget) -> Entry:
    message = Message(value, budget)
    shape = tuple(dimension.integer(1) for dimension in message.message(2).messages(2))
    crc = next(message.bytes_of(6), b"")
    entry = Entry(
        key=key,
        name=decoded(key),
        dtype=message.integer(1),
        shape=shape,
        shard=message.integer(3),
        offset=message.integer(4),
        size=message.integer(5),
        crc=int.from_bytes(crc, "little"),
        partitioned=7 in message.fields,
        internal=key.startswith(b"\0"),
    )
    if min(shape, default=0) < 0 or len(shape) > 32:
        raise DataError(f"{budget.path}: damaged: {shown(entry.name)} has shape {str(shape)[:80]}")
    return entry


def check_places(entries: list[Entry], shards: list[Source], path: Path) -> None:
    """Every tensor has the size of its shape, lies inside its shard, and shares no byte with another."""
    reached = [0] * len(shards)
    stored = [entry for entry in entries if not entry.partitioned]
    for entry in sorted(stored, key=lambda entry: (entry.shard, entry.offset, entry.size)):
        name, form = shown(entry.name), DTYPES.get(entry.dtype, ("", None))[1]
        if form and entry.size != math.prod(entry.shape) * np.dtype(form).itemsize:
            raise DataError(
                f"{path}: damaged: {name} has {entry.size:,} bytes, which is not what shape {entry.shape} of "
                f"{entry.dtype_name} takes"
            )
        if not 0 <= entry.shard < len(shards) or min(entry.offset, entry.size) < 0:
            raise DataError(f"{path}: damaged: {name} has no place in the data files")
        shard, end = shards[entry.shard], entry.offset + entry.size
        if end > shard.size:
            raise shard.error(f"truncated: {name} ends at byte {end:,}, the file at {shard.size:,}")
        if entry.size and entry.offset < reached[entry.shard]:
            raise DataError(f"{path}: damaged: {name} shares bytes with another tensor")
        reached[entry.shard] = max(end, reached[entry.shard])


def read_small(path: Path, limit: int) -> bytes:
    """A whole file, if it is no larger than files of its kind are."""
    source = Source(path)
    if source.size > limit:
        raise source.error(f"has {source.size:,} bytes, more than the {limit:,} that are read of such a file")
    return source.read(0, source.size)
