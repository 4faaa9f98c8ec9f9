"""Reads safetensors files: a JSON header of names, types, shapes and ranges of bytes, and the bytes."""

import json
import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from batchnorm.doctor.checkpoint import StoredTensor
from batchnorm.doctor.read.dtypes import SIZES, decode
from batchnorm.doctor.read.faults import Faults
from batchnorm.doctor.read.source import Source, shown
from batchnorm.doctor.read.table import Table

LENGTH_SIZE = 8
# A header has about 120 bytes and 10 commas and brackets for each tensor. Parsed, each of these takes up to 250 bytes.
LARGEST_HEADER = 16 << 20
MOST_PARTS = 1_000_000
MOST_DIMENSIONS = 64
KEPT_METADATA, LONGEST_METADATA = 100, 1000
DTYPES = {
    "BOOL": "bool",
    **{
        f"{letter}{bits}": f"{kind}{bits}" for letter, kind in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)
    },
    **{f"F{bits}": f"float{bits}" for bits in (16, 32, 64)},
    "BF16": "bfloat16",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
}
# two values or more in a byte: known, but not read
PACKED_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}

Range = tuple[int, int, str]


def read_safetensors(source: Source) -> Table:
    """The tensors of the file.

    Raises:
        DataError: the header is missing, too large or no JSON.
    """
    table = Table(source.name)
    length = int.from_bytes(source.read_up_to(0, LENGTH_SIZE), "little")
    if length > LARGEST_HEADER or LENGTH_SIZE + length > source.size:
        raise source.error(
            f"its safetensors header claims {length} bytes; expected at most {min(LARGEST_HEADER, source.size)} "
            "(a file that was cut off?)"
        )
    start = LENGTH_SIZE + length
    ranges: list[Range] = []
    for name, entry in parse_header(source, source.read(LENGTH_SIZE, length), table.faults).items():
        if name == "__metadata__":
            table.facts["metadata"] = metadata(entry)
        else:
            add(table, source, start, name, entry, ranges)
    check_cover(ranges, source.size - start, table.faults)
    return table


def parse_header(source: Source, raw: bytes, faults: Faults) -> dict[str, Any]:
    """The object that the header is; names that it has twice are noted."""
    if sum(raw.count(part) for part in b"[{,") > MOST_PARTS:
        raise source.error("its safetensors header has more parts than any checkpoint needs")

    def unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        entries: dict[str, Any] = {}
        for name, value in pairs:
            if name in entries:
                faults.add("BN003", name, "the header has this name twice; the first one counts")
            entries.setdefault(name, value)
        return entries

    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise source.error(f"its safetensors header is no valid JSON ({shown(error)})") from None
    if not isinstance(header, dict):
        raise source.error("its safetensors header is no JSON object")
    return header


def refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def metadata(entry: Any) -> dict[str, str]:
    """Strings by name, as far as they are of a size to be kept."""
    entries = list(entry.items())[:KEPT_METADATA] if isinstance(entry, dict) else []
    return {name[:LONGEST_METADATA]: value[:LONGEST_METADATA] for name, value in entries if isinstance(value, str)}


def add(table: Table, source: Source, start: int, name: str, entry: Any, ranges: list[Range]) -> None:
    """Put a tensor into the table, and its bytes among the ranges."""
    parsed = parse_entry(entry)
    if parsed is None:
        table.faults.add("BN003", name, "has no valid type, shape and offsets")
        return
    code, shape, begin, end = parsed
    dtype = DTYPES.get(code, code.lower())
    problem = check_range(table.faults, name, code, shape, begin, end, source.size - start)
    if begin <= end <= source.size - start:
        ranges.append((begin, end, name))

    def load() -> np.ndarray:
        return decode(source.read(start + begin, end - begin), dtype).reshape(shape)

    table.add(StoredTensor(name, shape, dtype, load), problem)


def parse_entry(entry: Any) -> tuple[str, tuple[int, ...], int, int] | None:
    if not isinstance(entry, dict):
        return None
    code, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(code, str) or not isinstance(shape, list) or not isinstance(offsets, list):
        return None
    if len(code) > 16 or len(shape) > MOST_DIMENSIONS or len(offsets) != 2:
        return None
    if not all(type(n) is int and 0 <= n < 2**63 for n in (*shape, *offsets)):
        return None
    return code, tuple(shape), offsets[0], offsets[1]


def check_range(faults: Faults, name: str, code: str, shape: tuple[int, ...], begin: int, end: int, size: int) -> str:
    """Why the values cannot be read, or ""; noted, unless the type is one that is known and not read."""
    count = math.prod(shape)
    bits = 8 * SIZES[DTYPES[code]] if code in DTYPES else PACKED_BITS.get(code)
    if not begin <= end <= size:
        faults.add("BN003", name, "lies outside the file", begin=begin, end=end, data=size)
        return "lies outside the file"
    if bits is None:
        faults.add("BN003", name, f"has the unknown type {shown(code)}")
        return f"has the unknown type {shown(code)}"
    if count * bits != 8 * (end - begin):
        expected = count * bits // 8
        # JSON without integers of a thousand digits
        faults.add(
            "BN003", name, "has another size than shape and type", bytes=end - begin, expected=min(expected, 2**63)
        )
        return "has another size than shape and type"
    return "" if code in DTYPES else f"has values of type {code}, which are not read"


def check_cover(ranges: list[Range], size: int, faults: Faults) -> None:
    """Note bytes that belong to two tensors, and bytes that belong to none."""
    covered = 0
    for begin, end, name in sorted(ranges):
        if begin < covered:
            faults.add("BN003", name, "shares bytes with the tensor before it", begin=begin, end_before=covered)
        elif begin > covered:
            faults.add("BN003", name, "bytes before it belong to no tensor", bytes=begin - covered)
        covered = max(covered, end)
    if covered < size:
        faults.add("BN003", "", "bytes behind the last tensor belong to none", bytes=size - covered)
