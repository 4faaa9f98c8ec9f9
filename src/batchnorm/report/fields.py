"""JSON files and their fields, read with one clear line when they are not what was expected."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from batchnorm.errors import RunError
from batchnorm.report.text import clean

SCHEMA_VERSION = 1
RUN_AGAIN = "run it again with --resume"
NUMBER = (int, float)
OPTIONAL_NUMBER = (int, float, type(None))
LARGEST_COUNT = 2**53
OPTIONAL_TEXT = (str, type(None))
OPTIONAL_OBJECT = (dict, type(None))
T = TypeVar("T")


def read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise broken(path, "missing", "a record that every finished run leaves") from None
    except OSError as error:
        raise broken(path, error.strerror or "unreadable", "a readable file", "check its permissions") from error


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    data = read_bytes(path)
    try:
        record = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise broken(path, "not JSON", "one JSON object") from error
    if not isinstance(record, dict):
        raise broken(path, "not a JSON object", "one JSON object")
    return record


def read_record(path: Path) -> dict[str, Any]:
    """An object that states its schema version."""
    record = read_object(path)
    if record.get("schema_version") != SCHEMA_VERSION:
        found = clean(record.get("schema_version"), 40)
        remedy = "use the version of batchnorm that wrote it, or run the experiment again"
        raise broken(path, f"schema_version is {found}", str(SCHEMA_VERSION), remedy)
    return record


def field(record: dict[str, Any], name: str, kind: type | tuple[type, ...], path: Path, where: str = "") -> Any:
    """A field of the expected type. A bool is no number, although Python counts it as one."""
    kinds = kind if isinstance(kind, tuple) else (kind,)
    expected = " or ".join("null" if each is type(None) else each.__name__ for each in kinds)
    if name not in record:
        raise broken(path, f"{where}no field '{name}'", expected)
    value = record[name]
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise broken(path, f"{where}'{name}' is {clean(value, 40)}", expected)
    return value


def finite(record: dict[str, Any], name: str, path: Path, where: str = "") -> float:
    """A finite number."""
    value = real(field(record, name, NUMBER, path, where))
    if math.isnan(value):
        raise broken(path, f"{where}'{name}' is {clean(record[name], 40)}", "a finite number")
    return value


def count(record: dict[str, Any], name: str, path: Path, where: str = "") -> int:
    """A whole number from 0 that a float holds exactly."""
    value = field(record, name, int, path, where)
    if not 0 <= value < LARGEST_COUNT:
        raise broken(path, f"{where}'{name}' is {clean(value, 40)}", "a whole number from 0")
    return value


def fraction(record: dict[str, Any], name: str, path: Path, where: str = "") -> float:
    """A number from 0 to 1; NaN for null and for what is not finite."""
    value = real(field(record, name, OPTIONAL_NUMBER, path, where))
    if not (math.isnan(value) or 0 <= value <= 1):
        raise broken(path, f"{where}'{name}' is {clean(value, 40)}", "a fraction from 0 to 1, or null")
    return value


def optional(
    read: Callable[[dict[str, Any], str, Path, str], T], record: dict[str, Any], name: str, path: Path, where: str = ""
) -> T | None:
    """A field that may be null, but not absent, read by one of the functions above."""
    return None if name in record and record[name] is None else read(record, name, path, where)


def items(record: dict[str, Any], name: str, path: Path, where: str = "") -> Sequence[Any]:
    return field(record, name, list, path, where)


def objects(record: dict[str, Any], name: str, path: Path, where: str = "") -> list[dict[str, Any]]:
    """A list of objects."""
    found = items(record, name, path, where)
    for i, item in enumerate(found):
        if not isinstance(item, dict):
            raise broken(path, f"{where}'{name}' has {clean(item, 40)} in place {i}", "objects")
    return list(found)


def texts(record: dict[str, Any], name: str, path: Path, where: str = "") -> list[str]:
    """A list of texts."""
    found = items(record, name, path, where)
    for item in found:
        if not isinstance(item, str):
            raise broken(path, f"{where}'{name}' has {clean(item, 40)}", "texts")
    return list(found)


def text(record: dict[str, Any], name: str, path: Path, where: str = "") -> str:
    return field(record, name, str, path, where)


def one_of(record: dict[str, Any], name: str, allowed: tuple[str, ...], path: Path, where: str = "") -> str:
    value = field(record, name, str, path, where)
    if value not in allowed:
        raise broken(path, f"{where}'{name}' is {clean(value, 40)}", " or ".join(allowed))
    return value


def real(value: Any) -> float:
    """A float; NaN for what is not a finite number."""
    try:
        return float(value) if isinstance(value, NUMBER) and math.isfinite(value) else math.nan
    except OverflowError:
        return math.nan


def optional_real(value: Any) -> float | None:
    """A finite float, or None."""
    number = real(value)
    return None if math.isnan(number) else number


def broken(path: Path, problem: str, expected: str, remedy: str = RUN_AGAIN) -> RunError:
    return RunError(f"{clean(str(path))}: {problem}; expected {expected}; {remedy}")
