"""What the page of a run shows: plain data between the experiments, which fill it, and the page, which renders it."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from batchnorm.report.drawing import Drawing


@dataclass(frozen=True)
class Section:
    """A part of the page: a file of templates/ and what it shows; None leaves the part out."""

    template: str
    content: Any


@dataclass(frozen=True)
class Contents:
    """Everything on a page besides what all pages have: verdict, claims, settings.

    Attributes:
        title: of the page, without the verdict.
        source: where the paper describes the experiment.
        drawings: the figures, to be written as files too.
        sections: what stands between claims and settings.
        banner: sentences that a reader must know before any number.
        records: files that it was drawn from besides those of every run.
        styles: files of rules, in order.
    """

    title: str
    source: str
    drawings: list[Drawing]
    sections: list[Section]
    banner: Sequence[str] = ()
    records: Sequence[str] = ()
    styles: Sequence[str] = ("page.css",)


@dataclass(frozen=True)
class Cell:
    """A text of a table, what is said below it in small letters, and whether it is marked as best or chosen."""

    text: str
    note: str = ""
    mark: str = ""


@dataclass(frozen=True)
class Column:
    """The head of a column; neighbours of one group stand under a common head. ``words``: texts, not numbers."""

    name: str
    group: str = ""
    words: bool = False


@dataclass(frozen=True)
class Table:
    """A section with one table. The first cell of a row is its head.

    Attributes:
        name: unique in the page, for links.
        heading: of the section.
        columns: with the one of the heads of the rows.
        rows: as many cells each as there are columns; a text is a cell of its own.
        foot: a last row that sums up the others.
        lead: what is said before the table.
        caption: what is said after it.
        label: of the table for those who hear it; the heading by default.
    """

    name: str
    heading: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell | str]]
    foot: Sequence[Cell | str] = ()
    lead: str = ""
    caption: str = ""
    label: str = ""

    @property
    def groups(self) -> list[tuple[str, list[Column]]]:
        """Neighbours under their common head, from the left; empty if no column has one."""
        if not any(column.group for column in self.columns):
            return []
        return [(name, list(columns)) for name, columns in itertools.groupby(self.columns, lambda each: each.group)]

    def section(self) -> Section:
        return Section("table.html", self)
