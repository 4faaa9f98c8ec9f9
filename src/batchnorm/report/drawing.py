"""Matplotlib, kept in one place: style, panels of fixed geometry, and bytes that depend on the data alone."""

import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from batchnorm.errors import MissingExtraError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

POINTS_PER_INCH = 72
PNG_DPI = 200
INK, MUTED, GRID = "#1f2328", "#59636e", "#e6e8eb"
LEFT, BOTTOM, TOP = 0.52, 0.50, 0.42  # inches around the axes: tick labels, step axis, title
STYLE: dict[Any, Any] = {
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "savefig.facecolor": "white",
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "lines.solid_capstyle": "round",
    "text.usetex": False,
    "svg.fonttype": "path",  # letters as outlines: the same on every machine
    "svg.hashsalt": "batchnorm",
}


@dataclass(frozen=True)
class Curve:
    """One line of a panel, as numbers for the reader: ``values`` against the panel's ``positions``.

    ``dashes`` are those of its line where color alone would not tell the lines apart.
    """

    name: str
    color: str
    values: Sequence[float]
    text: Sequence[str]
    dashes: Sequence[float] | None = None


@dataclass(frozen=True)
class Panel:
    """What one pair of axes shows, and how to draw it.

    ``positions`` lie on the horizontal axis, ``labels`` say them in words; ``draw`` puts the lines on given axes.
    """

    name: str
    title: str
    width: float  # inches
    right: float  # inches kept free for labels at the ends of the lines
    description: str
    positions: Sequence[float]
    labels: Sequence[str]
    curves: list[Curve]
    draw: Callable[["Axes"], None]
    axis: str = ""  # what the positions are, where the panels of a figure differ in it


@dataclass(frozen=True)
class DrawnPanel:
    """A panel as SVG, with the places of its points in the units of that SVG."""

    panel: Panel
    svg: str
    box: tuple[float, float, float, float]  # left, top, right, bottom of the axes
    x: list[float | None]
    y: list[list[float | None]]  # per curve


@dataclass(frozen=True)
class Drawing:
    """A figure as files and as separate panels for the page."""

    name: str
    svg: bytes
    png: bytes
    panels: list[DrawnPanel]
    columns: int
    caption: str


def draw(name: str, panels: list[Panel], height: float, caption: str, columns: int | None = None) -> Drawing:
    """Draw panels side by side into one figure, and each into an SVG of its own.

    Args:
        name: of the files.
        panels: from left to right, then downwards.
        height: of a row, in inches.
        caption: what the reader must know beside the figure.
        columns: panels in a row; all by default.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    columns = columns or len(panels)
    with matplotlib_style():
        rows = [panels[i : i + columns] for i in range(0, len(panels), columns)]
        width = max(sum(panel.width for panel in row) for row in rows)
        figure = new_figure(width, height * len(rows))
        for i, row in enumerate(rows):
            left = 0.0
            for panel in row:
                draw_panel(figure, panel, left, height * (len(rows) - 1 - i), height)
                left += panel.width
        separate = [draw_separately(name, panel, height) for panel in panels]
        return Drawing(name, as_svg(figure), as_png(figure), separate, columns, caption)


@contextmanager
def matplotlib_style() -> Iterator[None]:
    """Our style on top of matplotlib's defaults, whatever the user's own settings are."""
    try:
        import matplotlib
    except ImportError as error:
        raise MissingExtraError("matplotlib is not installed: pip install 'batchnorm[plots]'") from error
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def new_figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=POINTS_PER_INCH)


def draw_panel(figure: "Figure", panel: Panel, left: float, bottom: float, height: float) -> "Axes":
    """Add a panel to a figure at a place given in inches."""
    width_all, height_all = figure.get_size_inches()
    axes_width, axes_height = panel.width - LEFT - panel.right, height - BOTTOM - TOP
    box = (left + LEFT) / width_all, (bottom + BOTTOM) / height_all, axes_width / width_all, axes_height / height_all
    axes = figure.add_axes(box)
    panel.draw(axes)
    axes.set_title(panel.title, loc="left", x=-0.36 / axes_width, pad=9, fontsize=9.5, fontweight="bold")
    return axes


def draw_separately(name: str, panel: Panel, height: float) -> DrawnPanel:
    figure = new_figure(panel.width, height)
    axes = draw_panel(figure, panel, 0, 0, height)
    svg = inline(as_svg(figure).decode(), f"{name}-{panel.name}-")
    # after saving, because only then the limits of the axes are final
    height_points = height * POINTS_PER_INCH
    left, bottom, right, top = (float(v) for v in axes.bbox.extents)
    box = round(left, 1), round(height_points - top, 1), round(right, 1), round(height_points - bottom, 1)
    places = [[place(axes, x, y) for x, y in zip(panel.positions, curve.values, strict=True)] for curve in panel.curves]
    middle = sum(axes.get_ylim()) / 2
    return DrawnPanel(
        panel=panel,
        svg=svg,
        box=box,
        x=[place(axes, x, middle)[0] for x in panel.positions],
        y=[[y if y is not None and box[1] <= y <= box[3] else None for _, y in curve] for curve in places],
    )


def place(axes: "Axes", x: float, y: float) -> tuple[float | None, float | None]:
    """A data point in SVG units, None where it is not finite."""
    x_pixel, y_pixel = (float(v) for v in axes.transData.transform((x, y)))
    height = axes.bbox.y1 + TOP * POINTS_PER_INCH
    return rounded(x_pixel), rounded(height - y_pixel)


def rounded(value: float) -> float | None:
    return round(value, 1) if math.isfinite(value) else None


def as_svg(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return buffer.getvalue()


def as_png(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=PNG_DPI, metadata={"Software": None})
    return buffer.getvalue()


def inline(svg: str, prefix: str) -> str:
    """The SVG element alone, scaling with its container, with ids that are unique in a page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{prefix}', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}", svg)
    # a style element inside a page would apply to all of it
    svg = re.sub(r"<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    return re.sub(r"<svg", '<svg aria-hidden="true" focusable="false"', svg, count=1)
