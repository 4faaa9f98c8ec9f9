"""Figure 1 of the paper: test accuracy with and without BN, and how the input of one sigmoid is distributed."""

import math
from typing import TYPE_CHECKING

import numpy as np

from batchnorm.errors import RunError
from batchnorm.report.drawing import COLORS, LINE_STYLES, MUTED, Curve, Drawing, Panel, draw
from batchnorm.report.fields import real
from batchnorm.report.metrics import ARMS, Evaluation
from batchnorm.report.records import Run
from batchnorm.report.text import joined, number, percent, sentence

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HEIGHT = 3.1  # inches
FLOORS = (0.7, 0.5)  # the paper's axis begins at 0.7
PERCENTILES = (85, 50, 15)
PANEL_OF_ARM = {"plain": "b", "bn": "c"}


class Series:
    """Accuracy of every seed of both arms, and the percentiles of the drawn unit, on one grid of steps.

    Attributes:
        steps: ascending; what an arm lacks at a step is NaN.
        accuracy: by arm, shape (seeds, steps).
        percentiles: by arm, shape (3, steps), rows 15, 50 and 85, of the first seed.
        seed: whose percentiles they are.
    """

    def __init__(self, run: Run) -> None:
        rows = run.evaluations
        self.steps = sorted({row.step for row in rows})
        self.seed = min(row.seed for row in rows)
        column = {step: i for i, step in enumerate(self.steps)}
        self.accuracy: dict[str, np.ndarray] = {}
        self.percentiles: dict[str, np.ndarray] = {}
        for arm in ARMS:
            of_arm = [row for row in rows if row.arm == arm]
            if not of_arm:
                continue
            seeds = {seed: i for i, seed in enumerate(sorted({row.seed for row in of_arm}))}
            self.accuracy[arm] = np.full((len(seeds), len(self.steps)), np.nan)
            self.percentiles[arm] = np.full((3, len(self.steps)), np.nan)
            for row in of_arm:
                self.accuracy[arm][seeds[row.seed], column[row.step]] = row.test_accuracy
                if row.seed == self.seed:
                    self.percentiles[arm][:, column[row.step]] = drawn_percentiles(row, run.unit_drawn)


def drawn_percentiles(row: Evaluation, unit: int | None) -> list[float]:
    return [math.nan] * 3 if unit is None or row.percentiles is None else [real(p[unit]) for p in row.percentiles]


def draw_figure1(run: Run) -> Drawing:
    """Draw Figure 1 in the paper's arrangement: (a) accuracy, (b) percentiles without BN, (c) with BN.

    Args:
        run: an MNIST run that is not a sweep.

    Returns:
        :class:`~batchnorm.report.drawing.Drawing` with one panel for (a) and one per arm.

    Raises:
        RunError: the run recorded no percentiles.
        MissingExtraError: matplotlib is not installed.
    """
    if run.unit_drawn is None:
        raise RunError(f"{run.folder / 'claims.json'}: no 'unit_drawn'; expected the unit whose input Figure 1 shows")
    series = Series(run)
    floor = accuracy_floor(series)
    limits = percentile_limits(series)
    panels = [accuracy_panel(series, floor)]
    panels += [percentile_panel(series, arm, limits, run.unit_drawn) for arm in series.percentiles]
    return draw("figure1", panels, HEIGHT, caption(series, floor, run.unit_drawn))


def accuracy_panel(series: Series, floor: float) -> Panel:
    curves, finals = [], []
    for arm, values in reversed(series.accuracy.items()):
        mean = values.mean(0)
        text = [accuracy_text(column) for column in values.T]
        curves.append(Curve(ARMS[arm], COLORS[arm], mean.tolist(), text))
        finals.append(f"{ARMS[arm]} {percent(mean[-1])}")

    def draw_on(axes: "Axes") -> None:
        for arm, values in series.accuracy.items():
            if len(values) > 1:
                low, high = values.min(0), values.max(0)
                axes.fill_between(series.steps, low, high, color=COLORS[arm], alpha=0.2, linewidth=0)
        for arm, values in reversed(series.accuracy.items()):
            line = {"color": COLORS[arm], "linestyle": LINE_STYLES[arm], "linewidth": 1.6}
            axes.plot(series.steps, values.mean(0), label=sentence(ARMS[arm]), **line)
        axes.set_ylim(floor, 1)
        step_axis(axes, series.steps)
        axes.legend(loc="lower right", frameon=False, handlelength=2.6, borderaxespad=0.4, labelspacing=0.5)

    description = f"Test accuracy over training steps. At step {number(series.steps[-1])}: {joined(finals)}."
    labels = [number(step) for step in series.steps]
    return Panel("a", "(a)  Test accuracy", 3.7, 0.14, description, series.steps, labels, curves, draw_on)


def percentile_panel(series: Series, arm: str, limits: tuple[float, float], unit: int) -> Panel:
    values = series.percentiles[arm][::-1]
    names = [f"{percentile}th percentile" for percentile in PERCENTILES]
    curves = [
        Curve(name, COLORS[arm], row.tolist(), [number(value, 2) for value in row.tolist()])
        for name, row in zip(names, values, strict=True)
    ]

    def draw_on(axes: "Axes") -> None:
        axes.axhline(0, color=MUTED, linewidth=0.6, zorder=1)
        axes.fill_between(series.steps, values[2], values[0], color=COLORS[arm], alpha=0.13, linewidth=0)
        for row, width in zip(values, (1.0, 1.7, 1.0), strict=True):
            axes.plot(series.steps, row, color=COLORS[arm], linewidth=width)
        axes.set_ylim(*limits)
        step_axis(axes, series.steps)
        label_ends(axes, values[:, -1].tolist(), limits)
        axes.set_ylabel("input of the sigmoid", labelpad=2)

    ends = joined([number(value, 2) for value in values[::-1, -1].tolist()])
    description = (
        f"15th, 50th and 85th percentile of the input of sigmoid {unit} of the last hidden layer, {ARMS[arm]}, "
        f"over training steps. At step {number(series.steps[-1])}: {ends}."
    )
    title = f"({PANEL_OF_ARM[arm]})  {sentence(ARMS[arm])}"
    labels = [number(step) for step in series.steps]
    return Panel(PANEL_OF_ARM[arm], title, 2.75, 0.36, description, series.steps, labels, curves, draw_on)


def step_axis(axes: "Axes", steps: list[int]) -> None:
    """Steps in thousands, as in the paper."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.set_xlim(steps[0], max(steps[-1], steps[0] + 1))
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10], integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: thousands(step)))
    axes.set_xlabel("training steps", labelpad=3)


def thousands(step: float) -> str:
    return f"{step / 1000:g}K" if step >= 1000 else f"{step:g}"


def label_ends(axes: "Axes", ends: list[float], limits: tuple[float, float]) -> None:
    """Name the lines at their right ends, moved apart where they would overlap."""
    gap = 0.062 * (limits[1] - limits[0])
    places = list(ends)
    for i in (0, 2):
        distance = places[i] - places[1]
        places[i] = places[1] + math.copysign(max(abs(distance), gap), 1 - i)
    for percentile, y in zip(PERCENTILES, places, strict=True):
        if math.isfinite(y):
            axes.annotate(
                f"{percentile}th",
                (1, y),
                xycoords=("axes fraction", "data"),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=7.5,
                annotation_clip=False,
            )


def accuracy_floor(series: Series) -> float:
    """Where the accuracy axis begins: as high as leaves every curve visible for most of its length."""
    for floor in FLOORS:
        if all(np.mean(values.mean(0) > floor) > 0.6 for values in series.accuracy.values()):
            return floor
    return 0.0


def percentile_limits(series: Series) -> tuple[float, float]:
    """One scale for (b) and (c) that hides nothing."""
    values = np.concatenate([rows.ravel() for rows in series.percentiles.values()])
    values = values[np.isfinite(values)]
    if not len(values):
        return -1.0, 1.0
    low, high = min(float(values.min()), -1.0), max(float(values.max()), 1.0)
    return low - 0.06 * (high - low), high + 0.06 * (high - low)


def caption(series: Series, floor: float, unit: int) -> str:
    """What the curves are, and how much lies where the axes do not reach."""
    seeds = max(len(values) for values in series.accuracy.values())
    mean = f"mean of {seeds} seeds; the band runs from the lowest to the highest" if seeds > 1 else "one seed"
    below = [clipped(series, arm, floor) for arm in series.accuracy]
    cut = joined([text for text in below if text]) if any(below) else ""
    hidden = f" The axis begins at {floor:g}; below it lie {cut}." if cut else ""
    panels = joined([f"({PANEL_OF_ARM[arm]})" for arm in series.percentiles])
    return (
        f"(a) Accuracy on the test set during training, {mean}.{hidden} {panels} What one sigmoid of the last hidden "
        f"layer receives (unit {unit}, seed {series.seed}): 15th, 50th and 85th percentile over test images."
    )


def clipped(series: Series, arm: str, floor: float) -> str:
    """The evaluations of an arm that lie below the axis, in words; empty if there are none."""
    lowest = series.accuracy[arm].min(0)
    below = [i for i, value in enumerate(lowest) if value < floor]
    if not below:
        return ""
    until = f"the last at step {number(series.steps[below[-1]])}, the lowest {percent(float(lowest[below].min()))}"
    return f"{len(below)} of {len(lowest)} evaluations {ARMS[arm]} ({until})"


def accuracy_text(column: np.ndarray) -> str:
    """Mean of the seeds and their range."""
    mean = percent(float(column.mean()))
    if len(column) == 1 or not np.isfinite(column).all():
        return mean
    return f"{mean} ({100 * column.min():.2f} to {100 * column.max():.2f})"
