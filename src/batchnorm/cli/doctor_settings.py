"""Settings of the doctor in ``pyproject.toml``: ``[tool.batchnorm.doctor]``."""

import difflib
import fnmatch
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from batchnorm.doctor.examine import Examination, chosen_rules
from batchnorm.doctor.finding import Finding, Severity
from batchnorm.errors import DataError
from batchnorm.report.text import clean

FILE, TABLE = "pyproject.toml", ("tool", "batchnorm", "doctor")
KEYS = ("select", "ignore", "fail-on", "per-layer-ignores")


@dataclass(frozen=True)
class Settings:
    """What the file says; options of the command line replace it.

    Attributes:
        select: beginnings of codes; empty for all.
        ignore: beginnings of codes.
        fail_on: the lightest severity that is a failure.
        per_layer_ignores: beginnings of codes by pattern of layers.
    """

    select: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    fail_on: Severity = Severity.ERROR
    per_layer_ignores: dict[str, tuple[str, ...]] = field(default_factory=dict)


def find_settings(folder: Path) -> Settings:
    """Those of the nearest file with the table, in this folder or above.

    Raises:
        DataError: a file is no TOML, or the table has something unknown.
    """
    for place in (folder, *folder.parents):
        path = place / FILE
        if path.is_file() and (table := table_of(path)) is not None:
            return read_settings(path, table)
    return Settings()


def table_of(path: Path) -> Any:
    """None if the file says nothing about the doctor."""
    try:
        with path.open("rb") as file:
            found: Any = tomllib.load(file)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is no TOML ({clean(str(error))})") from error
    for key in TABLE:
        found = found.get(key) if isinstance(found, dict) else None
    return found


def read_settings(path: Path, table: Any) -> Settings:
    where = f"{path}, [{'.'.join(TABLE)}]"
    if not isinstance(table, dict):
        raise DataError(f"{where}: expected a table, found {clean(table)}")
    for key in table:
        if key not in KEYS:
            close = difflib.get_close_matches(key, KEYS, n=1) or [f"one of {', '.join(KEYS)}"]
            raise DataError(f"{where}: there is no {clean(key)!r}; did you mean {close[0]}?")
    fail_on = table.get("fail-on", Severity.ERROR.value)
    if fail_on not in list(Severity):
        raise DataError(f"{where}: fail-on is {clean(fail_on)}, expected one of {', '.join(Severity)}")
    layers = table.get("per-layer-ignores", {})
    if not isinstance(layers, dict):
        raise DataError(f"{where}: per-layer-ignores is {clean(layers)}, expected a table of patterns")
    return Settings(
        codes(table.get("select", []), f"{where}: select"),
        codes(table.get("ignore", []), f"{where}: ignore"),
        Severity(fail_on),
        {pattern: codes(ignored, f"{where}: {clean(pattern)}") for pattern, ignored in layers.items()},
    )


def codes(values: Any, where: str) -> tuple[str, ...]:
    """Beginnings of codes in capitals.

    Raises:
        DataError: something else, or one that no rule's code begins with.
    """
    if not isinstance(values, list | tuple) or not all(isinstance(value, str) for value in values):
        raise DataError(f"{where} is {clean(values)}, expected a list of codes")
    found = tuple(value.strip().upper() for value in values)
    try:
        chosen_rules(found, ())
    except ValueError as error:
        raise DataError(f"{where}: {error}") from error
    return found


def split_ignored(findings: Iterable[Finding], settings: Settings) -> tuple[list[Finding], set[tuple[str, str]]]:
    """Findings that no pattern ignores, and the pairs of pattern and code that ignored something."""
    kept, used = [], set()
    for finding in findings:
        ignoring = {
            (pattern, code)
            for pattern, ignored in settings.per_layer_ignores.items()
            for code in ignored
            if finding.code.startswith(code) and fnmatch.fnmatchcase(finding.layer, pattern)
        }
        used |= ignoring
        if not ignoring:
            kept.append(finding)
    return kept, used


def unused_ignores(settings: Settings, used: set[tuple[str, str]], ran: Sequence[str]) -> list[str]:
    """Ignores that ignored nothing although a rule that they name ran, as the file has them."""
    return [
        f'"{clean(pattern)}" = ["{code}"]'
        for pattern, ignored in settings.per_layer_ignores.items()
        for code in ignored
        if (pattern, code) not in used and any(each.startswith(code) for each in ran)
    ]


def codes_that_ran(examination: Examination, select: Iterable[str], ignore: Iterable[str]) -> list[str]:
    """Of all rules in the catalogue."""
    not_run = {rule.code for rule in examination.not_run}
    return [rule.code for rule in chosen_rules(select, ignore) if rule.code not in not_run]
