"""Checkpoints in several files: an index says which file has which tensor."""

import json
from collections.abc import Callable
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from batchnorm.doctor.read.source import Source, shown
from batchnorm.doctor.read.table import Table
from batchnorm.errors import DataError

LARGEST_INDEX = 16 << 20
MOST_PARTS = 1_000_000
MOST_SHARDS = 2000


def read_index(source: Source, read: Callable[[Source], Table]) -> Table:
    """The tensors of all files that the index names; ``read`` reads one of them.

    Raises:
        DataError: the index is none, or names a file elsewhere; none of its files can be read.
    """
    expected = weight_map(source)
    table, folder = Table(source.name), source.path.parent
    files = list(dict.fromkeys(expected.values()))
    table.facts["shards"] = len(files)
    for file in files:
        try:
            shard = read(Source(folder / file))
        except DataError as error:
            table.faults.add("BN004", file, "a file of the index cannot be read", reason=str(error))
            continue
        take(table, shard, file, expected)
    if not table.tensors:
        raise source.error(f"none of the {len(files)} files of this index can be read")
    for name, file in expected.items():
        if name not in table.tensors:
            table.faults.add("BN004", name, f"the index says that {shown(file)} has it, but it does not")
    return table


def weight_map(source: Source) -> dict[str, str]:
    """File of each tensor, by the tensor's name."""
    if source.size > LARGEST_INDEX:
        raise source.error(f"has {source.size} bytes; expected an index of at most {LARGEST_INDEX}")
    raw = source.read(0, source.size)
    if sum(raw.count(part) for part in b"[{,") > MOST_PARTS:
        raise source.error("has more parts than any index needs")
    try:
        index: Any = json.loads(raw)
    except (ValueError, RecursionError):
        raise source.error("is no checkpoint: it begins like JSON, and is no valid JSON") from None
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not names:
        raise source.error('is JSON without the "weight_map" of an index of a sharded checkpoint')
    for file in (files := set(map(str, names.values()))):
        if not stays(file):
            raise source.error(f"names {shown(file)}, which does not lie in its folder")
    if len(files) > MOST_SHARDS:
        raise source.error(f"names {len(files)} files; expected at most {MOST_SHARDS}")
    # "./a" and "a" are one file
    return {name: str(PurePosixPath(str(file))) for name, file in names.items()}


def stays(file: str) -> bool:
    """Whether a path leads to a file of the same folder or one in it, on any system."""
    parts = PureWindowsPath(file).parts
    whole = PurePosixPath(file).is_absolute() or PureWindowsPath(file).drive or PureWindowsPath(file).root
    return bool(parts) and not whole and ".." not in parts and "\0" not in file and len(file) < 256


def take(table: Table, shard: Table, file: str, expected: dict[str, str]) -> None:
    """Put the tensors, problems and faults of one file into the table of all."""
    for name, tensor in shard.tensors.items():
        if expected.get(name, file) != file:
            table.faults.add("BN003", name, f"is in {shown(file)}, but the index names another file")
        table.add(tensor)
    table.unreadable.update(shard.unreadable)
    table.versions.update(shard.versions)
    for code, faults in shard.faults.items():
        for fault in faults:
            measured = {key: value for key, value in fault.items() if key not in ("where", "problem")}
            table.faults.add(code, fault["where"], fault["problem"], **{**measured, "file": file})
