"""The file of a benchmark: a header and one JSON object per line, appended as soon as it is measured."""

import json
import os
import re
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from batchnorm.benchmarks.timing import time_in_turn
from batchnorm.environment import describe_environment, installed_version
from batchnorm.errors import DataError, RunError

SCHEMA_VERSION = 1
PACKAGES = ("batchnorm", "torch", "numpy", "numba", "jax", "jaxlib", "transformers")
COPIED_BYTES = 64 * 2**20
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
# What two parts of one record must have in common
FIXED = ("threads", "huge_pages", "packages", "environment")

Record = dict[str, Any]


def make_header(seconds: float) -> Record:
    """Where and when, and how fast this machine copies 64 MiB."""
    return {
        "kind": "header",
        "schema_version": SCHEMA_VERSION,
        "date": time.strftime("%Y-%m-%d"),
        "environment": describe_environment(),
        "packages": {name: installed_version(name) for name in PACKAGES},
        "threads": torch.get_num_threads(),
        "huge_pages": huge_pages(),
        "seconds": seconds,
        "copy_gigabytes_per_second": round(copy_bandwidth() / 1e9, 2),
    }


def copy_bandwidth() -> float:
    """Bytes read and written per second by torch's copy of 64 MiB."""
    source = torch.ones(COPIED_BYTES, dtype=torch.uint8)
    destination = torch.zeros_like(source)
    times = time_in_turn({"copy": lambda: destination.copy_(source)}, seconds=0.2)
    return 2 * COPIED_BYTES / times["copy"].median


def huge_pages() -> str | None:
    """Whether the system gives out pages of 2 MiB by itself, which large new tensors profit from."""
    try:
        chosen = re.search(r"\[(\w+)\]", HUGE_PAGES.read_text())
    except OSError:
        return None
    return chosen.group(1) if chosen else None


def start_file(path: Path, header: Record, resume: bool) -> list[Record]:
    """Make the file, or cut off what a stopped run left half-written; the records that stand there already.

    Raises:
        RunError: the file exists, and is not to be resumed or was made elsewhere.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        append(path, [header])
        return []
    if not resume:
        raise RunError(f"{path}: exists already; continue it with --resume, or choose another --out")
    data = path.read_bytes()
    with open(path, "r+b") as file:
        file.truncate(data.rfind(b"\n") + 1)
    records = read_records(path)
    for name in FIXED:
        if records[0].get(name) != header[name]:
            raise RunError(f"{path}: made with another {name.replace('_', ' ')}; choose another --out")
    return records


def append(path: Path, records: Iterable[Record]) -> None:
    """Add lines at the end, on the disk before this returns."""
    lines = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
    with open(path, "ab") as file:
        file.write(lines.encode())
        file.flush()
        os.fsync(file.fileno())


def read_records(path: Path) -> list[Record]:
    """The header and all others.

    Raises:
        DataError: not a file of this kind, or of another version.
    """
    try:
        records = [json.loads(line) for line in path.read_text().splitlines()]
    except ValueError as error:
        raise DataError(f"{path}: expected one JSON object per line: {error}") from error
    if not records or not all(isinstance(record, dict) and "kind" in record for record in records):
        raise DataError(f"{path}: expected records of batchnorm bench")
    if records[0]["kind"] != "header" or records[0].get("schema_version") != SCHEMA_VERSION:
        raise DataError(f"{path}: expected a header with schema_version {SCHEMA_VERSION} in the first line")
    return records


def is_done(records: Sequence[Record], suite: str, name: str) -> bool:
    """Whether a case was measured, or failed, in an earlier part of the record."""
    return any(
        record.get("suite") == suite and record.get("case") == name and record.get("peer") == "ours"
        for record in records
    )
