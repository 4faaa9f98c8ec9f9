"""What the page of a study shows: its panels as one figure, its tables, what its steps cost."""

import math
from typing import TYPE_CHECKING

from batchnorm.report.contents import Column, Contents, Section, Table
from batchnorm.report.curves import short
from batchnorm.report.drawing import BOTTOM, LEFT, TOP, Curve, Drawing, Panel, draw
from batchnorm.report.looks import Look, looks
from batchnorm.report.panels import (
    AXES_HEIGHT,
    AXES_WIDTH,
    LABEL_GAP,
    LEADER,
    LETTER,
    Label,
    label_ends,
    shortened,
)
from batchnorm.report.sections import figure_section, timing_section
from batchnorm.report.study_records import StudyLine, StudyPanel, StudyRun, StudyTable
from batchnorm.report.text import ascii_only, joined, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = 2
MOST_TIMED = 12
STYLES = ("page.css", "arms.css")


def study_contents(run: StudyRun) -> Contents:
    drawing = draw_study(run)
    sections = [
        figure_section(drawing, "What was measured", name="figure", table=False),
        *(table_of(table).section() for table in run.tables),
        timing(run),
    ]
    return Contents(run.title, run.source, [drawing], sections, styles=STYLES)


def timing(run: StudyRun) -> Section:
    """Left out where there are more arms than a reader compares; timing.json has them all."""
    sentence = "Time of one step by phase, of the first seed of each arm."
    return timing_section(run, sentence) if len(run.timing) <= MOST_TIMED else Section("timing.html", None)


def draw_study(run: StudyRun) -> Drawing:
    """All panels of a study, two in a row. A line of one name looks the same in every panel.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    names = dict.fromkeys(line.name for panel in run.panels for line in panel.lines)
    shown = looks(names)
    most = max(len(panel.lines) for panel in run.panels)
    height = BOTTOM + TOP + max(AXES_HEIGHT, LABEL_GAP * (most + 2))
    panels = [panel_of(panel, shown) for panel in run.panels]
    return draw("figure", panels, height, run.caption, min(COLUMNS, len(panels)))


def panel_of(panel: StudyPanel, shown: dict[str, Look]) -> Panel:
    positions = sorted({x for line in panel.lines for x in line.x})
    curves = []
    for line in panel.lines:
        at = dict(zip(line.x, zip(line.y, line.low, line.high, strict=True), strict=True))
        values = [at.get(x, (math.nan,) * 3) for x in positions]
        look = shown[line.name]
        curves.append(Curve(line.name, look.color, [v[0] for v in values], [reading(*v) for v in values], look.dashes))
    labels = [Label(end_of(line), shortened(line.name), shown[line.name]) for line in panel.lines]

    def draw_on(axes: "Axes") -> None:
        for line in reversed(panel.lines):
            draw_line(axes, line, shown[line.name])
        set_axes(axes, panel, positions)
        label_ends(axes, labels)

    ends = joined([f"{curve.name} {curve.text[-1]}" for curve in curves])
    last = f"{panel.x} {number(positions[-1])}"
    description = f"{panel.title}: {panel.y} over {panel.x}. At {last}: {ends}."
    right = LEADER + 0.12 + LETTER * max(len(label.text) for label in labels)
    width = LEFT + AXES_WIDTH + right
    texts = [number(x) for x in positions]
    return Panel(panel.name, panel.title, width, right, description, positions, texts, curves, draw_on, panel.x)


def end_of(line: StudyLine) -> float:
    """The last value that is a finite number; 0 where none is."""
    return next((y for y in reversed(line.y) if math.isfinite(y)), 0.0)


def reading(y: float, low: float, high: float) -> str:
    """A value, and the range over the seeds where there is one."""
    if low == high or not math.isfinite(low + high):
        return number(y)
    return f"{number(y)} ({number(low)} to {number(high)})"


def draw_line(axes: "Axes", line: StudyLine, look: Look) -> None:
    marker = {"marker": "o", "markersize": 3.2} if len(line.x) <= 12 else {}
    if any(low != high for low, high in zip(line.low, line.high, strict=True)):
        axes.fill_between(line.x, line.low, line.high, color=look.color, alpha=0.2, linewidth=0)
    axes.plot(line.x, line.y, linewidth=1.6, **marker, **look.line)


def set_axes(axes: "Axes", panel: StudyPanel, positions: list[float]) -> None:
    """Scales, names, and steps in thousands."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    if panel.y_log:
        axes.set_yscale("log")
        axes.minorticks_off()
    if panel.x_log:
        axes.set_xscale("log")
        axes.set_xticks(positions, [short(x) for x in positions])
        axes.minorticks_off()
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: short(x)))
    axes.set_xlabel(ascii_only(panel.x), labelpad=3, parse_math=False)
    # powers of ten take more of the margin than percent
    axes.set_ylabel(ascii_only(panel.y), labelpad=0, parse_math=False)


def table_of(table: StudyTable) -> Table:
    """The first column heads the rows."""
    columns = [Column(name, words=not numeric(table, i)) for i, name in enumerate(table.columns)]
    return Table(table.name, table.heading, columns, table.rows, caption=table.caption)


def numeric(table: StudyTable, column: int) -> bool:
    return all(row[column][:1].lstrip("-+").isdigit() or not row[column][:1].isalpha() for row in table.rows)
