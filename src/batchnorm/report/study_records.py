"""The records of a study: its arms, and the panels and tables that it made of its rows."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchnorm.report.fields import NUMBER, broken, items, objects, text, texts
from batchnorm.report.records import Records, Run, read_run
from batchnorm.report.text import clean
from batchnorm.report.training_records import NAME_LIMIT, shown_names

TEXT_LIMIT = 1000
CELL_LIMIT = 200


@dataclass(frozen=True)
class StudyLine:
    """y against x, with a band; NaN where a number was not finite."""

    name: str
    x: list[float]
    y: list[float]
    low: list[float]
    high: list[float]


@dataclass(frozen=True)
class StudyPanel:
    """A pair of axes and its lines."""

    name: str
    title: str
    x: str
    y: str
    lines: list[StudyLine]
    x_log: bool
    y_log: bool


@dataclass(frozen=True)
class StudyTable:
    """Texts under heads."""

    name: str
    heading: str
    columns: list[str]
    rows: list[list[str]]
    caption: str


@dataclass(frozen=True)
class StudyRun(Run):
    """A run of a study."""

    title: str
    source: str
    panels: list[StudyPanel]
    tables: list[StudyTable]
    caption: str


def read_study(records: Records) -> StudyRun:
    claims, path = records.claims, records.folder / "claims.json"
    return StudyRun(
        **vars(read_run(records, shown_names(texts(claims, "arms", path), path))),
        title=clean(text(claims, "title", path)),
        source=clean(text(claims, "source", path)),
        panels=[read_panel(entry, path) for entry in objects(claims, "panels", path)],
        tables=[read_table(entry, path) for entry in objects(claims, "tables", path)],
        caption=clean(text(claims, "caption", path), TEXT_LIMIT),
    )


def read_panel(entry: dict[str, Any], path: Path) -> StudyPanel:
    name = text(entry, "name", path, "panels: ")
    where = f"panel {clean(name, NAME_LIMIT)}: "
    check_name(name, path, where)
    lines = [read_line(line, path, where) for line in objects(entry, "lines", path, where)]
    if not any(line.x for line in lines):
        raise broken(path, f"{where}no points", "at least one line with a point")
    return StudyPanel(
        name=name,
        title=clean(text(entry, "title", path, where), NAME_LIMIT),
        x=clean(text(entry, "x", path, where), NAME_LIMIT),
        y=clean(text(entry, "y", path, where), NAME_LIMIT),
        lines=lines,
        x_log=flag(entry, "x_log", path, where),
        y_log=flag(entry, "y_log", path, where),
    )


def read_line(entry: dict[str, Any], path: Path, where: str) -> StudyLine:
    name = clean(text(entry, "name", path, where), NAME_LIMIT)
    where = f"{where}line {name}: "
    x, y = (numbers(items(entry, axis, path, where), axis, path, where) for axis in ("x", "y"))
    bands = [
        y if entry.get(side) is None else numbers(items(entry, side, path, where), side, path, where)
        for side in ("low", "high")
    ]
    if any(len(values) != len(x) for values in (y, *bands)) or not all(map(math.isfinite, x)):
        raise broken(path, f"{where}'x', 'y', 'low' and 'high' do not belong together", "as many finite x as y")
    return StudyLine(name, x, y, *bands)


def numbers(values: Sequence[Any], name: str, path: Path, where: str) -> list[float]:
    """Numbers, NaN for null."""
    for value in values:
        if isinstance(value, bool) or not (value is None or isinstance(value, NUMBER)):
            raise broken(path, f"{where}'{name}' has {clean(value, 40)}", "numbers or null")
    return [math.nan if value is None else float(value) for value in values]


def flag(entry: dict[str, Any], name: str, path: Path, where: str) -> bool:
    if not isinstance(entry.get(name), bool):
        raise broken(path, f"{where}'{name}' is {clean(entry.get(name), 40)}", "true or false")
    return entry[name]


def read_table(entry: dict[str, Any], path: Path) -> StudyTable:
    name = text(entry, "name", path, "tables: ")
    where = f"table {clean(name, NAME_LIMIT)}: "
    check_name(name, path, where)
    columns = [clean(head, CELL_LIMIT) for head in texts(entry, "columns", path, where)]
    rows = []
    for row in items(entry, "rows", path, where):
        if not isinstance(row, list) or len(row) != len(columns) or not all(isinstance(cell, str) for cell in row):
            raise broken(path, f"{where}a row is {clean(row, 40)}", f"{len(columns)} texts")
        rows.append([clean(cell, CELL_LIMIT) for cell in row])
    return StudyTable(
        name=name,
        heading=clean(text(entry, "heading", path, where)),
        columns=columns,
        rows=rows,
        caption=clean(text(entry, "caption", path, where), TEXT_LIMIT),
    )


def check_name(name: str, path: Path, where: str) -> None:
    """It becomes part of links and of names of files."""
    if not name.isascii() or not name.replace("-", "").isalnum():
        raise broken(path, f"{where}'name' is {clean(name, 40)}", "letters, digits and hyphens")
