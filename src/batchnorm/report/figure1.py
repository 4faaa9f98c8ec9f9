"""Figure 1 of the paper: test accuracy with and without BN, and how the input of one sigmoid is distributed."""

import math
from typing import TYPE_CHECKING

import numpy as np

from batchnorm.errors import RunError
from batchnorm.report.curves import Curves, accuracy_floor, accuracy_text, draw_curves, gather, step_axis
from batchnorm.report.drawing import MUTED, Curve, Drawing, Panel, draw
from batchnorm.report.fields import real
from batchnorm.report.looks import looks
from batchnorm.report.mnist_records import ARMS, MnistEvaluation, MnistRun
from batchnorm.report.text import joined, number, percent, sentence

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HEIGHT = 3.1  # inches
FLOORS = (0.7, 0.5)  # the paper's axis begins at 0.7
PERCENTILES = (85, 50, 15)
PANEL_OF_ARM = {"plain": "b", "bn": "c"}
LOOKS = looks(ARMS)


class Percentiles:
    """Percentiles of the drawn unit of the first seed.

    Attributes:
        by_arm: shape (3, steps), rows 15, 50 and 85; what an arm lacks at a step is NaN.
        seed: whose percentiles they are.
    """

    def __init__(self, run: MnistRun, curves: Curves) -> None:
        self.steps = curves.steps
        self.seed = min(row.seed for row in run.evaluations)
        self.by_arm = {arm: np.full((3, len(curves.steps)), np.nan) for arm in curves.accuracy}
        column = {step: i for i, step in enumerate(curves.steps)}
        for row in run.evaluations:
            if row.seed == self.seed:
                self.by_arm[row.arm][:, column[row.step]] = drawn_percentiles(row, run.unit_drawn)


def drawn_percentiles(row: MnistEvaluation, unit: int | None) -> list[float]:
    return [math.nan] * 3 if unit is None or row.percentiles is None else [real(p[unit]) for p in row.percentiles]


def draw_figure1(run: MnistRun) -> Drawing:
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
    curves = gather(run.evaluations, ARMS)
    percentiles = Percentiles(run, curves)
    floor = accuracy_floor(curves, FLOORS)
    limits = percentile_limits(percentiles)
    panels = [accuracy_panel(curves, floor)]
    panels += [percentile_panel(percentiles, arm, limits, run.unit_drawn) for arm in percentiles.by_arm]
    return draw("figure1", panels, HEIGHT, caption(curves, percentiles, floor, run.unit_drawn))


def accuracy_panel(curves: Curves, floor: float) -> Panel:
    lines, finals = [], []
    for arm, values in reversed(curves.accuracy.items()):
        mean = curves.mean(arm)
        text = [accuracy_text(column) for column in values.T]
        lines.append(Curve(ARMS[arm], LOOKS[arm].color, mean.tolist(), text))
        finals.append(f"{ARMS[arm]} {percent(mean[-1])}")

    def draw_on(axes: "Axes") -> None:
        draw_curves(axes, curves, LOOKS, {arm: sentence(name) for arm, name in ARMS.items()})
        axes.set_ylim(floor, 1)
        step_axis(axes, curves.steps[0], curves.steps[-1])
        axes.legend(loc="lower right", frameon=False, handlelength=2.6, borderaxespad=0.4, labelspacing=0.5)

    description = f"Test accuracy over training steps. At step {number(curves.steps[-1])}: {joined(finals)}."
    labels = [number(step) for step in curves.steps]
    return Panel("a", "(a)  Test accuracy", 3.7, 0.14, description, curves.steps, labels, lines, draw_on)


def percentile_panel(percentiles: Percentiles, arm: str, limits: tuple[float, float], unit: int) -> Panel:
    values, steps = percentiles.by_arm[arm][::-1], percentiles.steps
    color = LOOKS[arm].color
    names = [f"{percentile}th percentile" for percentile in PERCENTILES]
    curves = [
        Curve(name, color, row.tolist(), [number(value, 2) for value in row.tolist()])
        for name, row in zip(names, values, strict=True)
    ]

    def draw_on(axes: "Axes") -> None:
        axes.axhline(0, color=MUTED, linewidth=0.6, zorder=1)
        axes.fill_between(steps, values[2], values[0], color=color, alpha=0.13, linewidth=0)
        for row, width in zip(values, (1.0, 1.7, 1.0), strict=True):
            axes.plot(steps, row, color=color, linewidth=width)
        axes.set_ylim(*limits)
        step_axis(axes, steps[0], steps[-1])
        label_ends(axes, values[:, -1].tolist(), limits)
        axes.set_ylabel("input of the sigmoid", labelpad=2)

    ends = joined([number(value, 2) for value in values[::-1, -1].tolist()])
    description = (
        f"15th, 50th and 85th percentile of the input of sigmoid {unit} of the last hidden layer, {ARMS[arm]}, "
        f"over training steps. At step {number(steps[-1])}: {ends}."
    )
    title = f"({PANEL_OF_ARM[arm]})  {sentence(ARMS[arm])}"
    labels = [number(step) for step in steps]
    return Panel(PANEL_OF_ARM[arm], title, 2.75, 0.36, description, steps, labels, curves, draw_on)


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


def percentile_limits(percentiles: Percentiles) -> tuple[float, float]:
    """One scale for (b) and (c) that hides nothing."""
    values = np.concatenate([rows.ravel() for rows in percentiles.by_arm.values()])
    values = values[np.isfinite(values)]
    if not len(values):
        return -1.0, 1.0
    low, high = min(float(values.min()), -1.0), max(float(values.max()), 1.0)
    return low - 0.06 * (high - low), high + 0.06 * (high - low)


def caption(curves: Curves, percentiles: Percentiles, floor: float, unit: int) -> str:
    """What the curves are, and how much lies where the axes do not reach."""
    seeds = curves.seeds
    mean = f"mean of {seeds} seeds; the band runs from the lowest to the highest" if seeds > 1 else "one seed"
    below = [clipped(curves, arm, floor) for arm in curves.accuracy]
    cut = joined([text for text in below if text]) if any(below) else ""
    hidden = f" The axis begins at {floor:g}; below it lie {cut}." if cut else ""
    panels = joined([f"({PANEL_OF_ARM[arm]})" for arm in percentiles.by_arm])
    return (
        f"(a) Accuracy on the test set during training, {mean}.{hidden} {panels} What one sigmoid of the last hidden "
        f"layer receives (unit {unit}, seed {percentiles.seed}): 15th, 50th and 85th percentile over test images."
    )


def clipped(curves: Curves, arm: str, floor: float) -> str:
    """The evaluations of an arm that lie below the axis, in words; empty if there are none."""
    lowest = curves.accuracy[arm].min(0)
    below = [i for i, value in enumerate(lowest) if value < floor]
    if not below:
        return ""
    until = f"the last at step {number(curves.steps[below[-1]])}, the lowest {percent(float(lowest[below].min()))}"
    return f"{len(below)} of {len(curves.evaluated[arm])} evaluations {ARMS[arm]} ({until})"
