"""A baseline: findings that are known, so that new ones alone count."""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from batchnorm.doctor.finding import Finding
from batchnorm.errors import DataError
from batchnorm.files import write_json

SCHEMA_VERSION = 1
# bytes; a million findings are fewer, and a checkpoint by mistake may be more
LARGEST = 1 << 27
Known = Counter[tuple[str, str]]


def write_baseline(path: Path, findings: Iterable[Finding]) -> None:
    """Write code and layer of each finding. Only an earlier baseline is overwritten.

    Raises:
        DataError: the file exists and is something else.
        OSError: it cannot be written.
    """
    if path.exists():
        read_baseline(path)
    records = sorted((finding.code, finding.layer) for finding in findings)
    write_json(
        path,
        {"schema_version": SCHEMA_VERSION, "findings": [{"code": code, "layer": layer} for code, layer in records]},
    )


def read_baseline(path: Path) -> Known:
    """How many findings are known of each rule in each layer.

    Raises:
        DataError: the file is no baseline, or of a later version.
        OSError: there is no such file.
    """
    try:
        with path.open("rb") as file:
            record = json.loads(file.read(LARGEST))
        version = record["schema_version"]
        known = Counter((item["code"], item["layer"]) for item in record["findings"])
        if not all(isinstance(part, str) for pair in known for part in pair):
            raise TypeError
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise DataError(f"{path} is no baseline: expected a file of batchnorm doctor --write-baseline") from error
    if version != SCHEMA_VERSION:
        raise DataError(f"{path} is a baseline of version {version!r}, expected {SCHEMA_VERSION}: write it anew")
    return known


def compare(findings: Iterable[Finding], known: Known) -> tuple[list[Finding], Known]:
    """Findings that are new, and what is known but was not found again."""
    left = Counter(known)
    new = []
    for finding in findings:
        place = finding.code, finding.layer
        if left[place] > 0:
            left[place] -= 1
        else:
            new.append(finding)
    return new, +left
