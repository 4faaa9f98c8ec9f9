"""A sweep drawn and tabled: final accuracy of both arms over learning rate and initial scale."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from batchnorm.report.drawing import INK, Curve, Drawing, Panel, draw
from batchnorm.report.looks import looks
from batchnorm.report.mnist_records import ARMS, MnistRun
from batchnorm.report.text import joined, number, percent, sentence

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HEIGHT = 2.9  # inches
COLUMNS = 3
RATE_TICKS = 6
ACCURACY_TICKS = (0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)
LOOKS = looks(ARMS)
MARKERS = {"plain": ("s", "white"), "bn": ("o", LOOKS["bn"].color)}


@dataclass(frozen=True)
class Cell:
    """One accuracy of the heat table. ``heat`` is 0 for the highest error of the sweep and 1 for the lowest."""

    text: str
    interval: str
    heat: float
    best: bool


@dataclass(frozen=True)
class HeatTable:
    """Rows are (init std, arm name, cells), a cell per learning rate, None where the sweep has no point."""

    rates: list[str]
    rows: list[tuple[str, str, list[Cell | None]]]


def draw_sweep(run: MnistRun) -> Drawing:
    """Draw accuracy over learning rate, one panel per initial scale, both arms in each.

    Args:
        run: a sweep.

    Returns:
        :class:`~batchnorm.report.drawing.Drawing`.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    stds = sorted({point.init_std for point in run.points})
    panels = [std_panel(run, i, std) for i, std in enumerate(stds)]
    caption = (
        "Test accuracy at the end of training: mean over seeds, 95 % interval as a bar. "
        "The vertical scale is logarithmic in the error."
    )
    return draw("sweep", panels, HEIGHT, caption, min(COLUMNS, len(panels)))


def std_panel(run: MnistRun, index: int, std: float) -> Panel:
    points = sorted((point for point in run.points if point.init_std == std), key=lambda point: point.learning_rate)
    rates = [point.learning_rate for point in points]
    arms = {arm: [point.arms.get(arm) for point in points] for arm in reversed(ARMS)}
    curves = []
    for arm, results in arms.items():
        values = [math.nan if result is None else -log_error(result["mean"]) for result in results]
        curves.append(Curve(ARMS[arm], LOOKS[arm].color, values, [accuracy_text(result) for result in results]))
    spread = rate_limits(run)

    def draw_on(axes: "Axes") -> None:
        for arm, results in arms.items():
            draw_arm(axes, arm, [(rate, result) for rate, result in zip(rates, results, strict=True) if result])
        accuracy_axis(axes, run)
        rate_axis(axes, rates, spread)
        if index == 0:
            axes.legend(loc="lower right", frameon=False, handlelength=2.6, borderaxespad=0.4, labelspacing=0.5)

    ends = [f"{ARMS[arm]} {best_text(points, arm)}" for arm in arms]
    description = f"Final test accuracy over learning rate, initial scale {number(std)}. Best: {joined(ends)}."
    labels = [number(rate) for rate in rates]
    return Panel(str(index), f"Initial scale {number(std)}", 3.07, 0.14, description, rates, labels, curves, draw_on)


def draw_arm(axes: "Axes", arm: str, results: list[tuple[float, dict[str, float]]]) -> None:
    if not results:
        return
    rates, means = [rate for rate, _ in results], [-log_error(result["mean"]) for _, result in results]
    marker, inside = MARKERS[arm]
    axes.plot(
        rates,
        means,
        linewidth=1.5,
        markersize=4.5,
        label=sentence(ARMS[arm]),
        marker=marker,
        markerfacecolor=inside,
        **LOOKS[arm].line,
    )
    for rate, result in results:
        axes.plot(
            [rate, rate],
            [-log_error(result["low"]), -log_error(result["high"])],
            color=LOOKS[arm].color,
            linewidth=1.0,
            zorder=1.9,
        )


def rate_axis(axes: "Axes", rates: list[float], spread: tuple[float, float]) -> None:
    """A logarithmic axis with the learning rates themselves as ticks."""
    shown = rates[:: max(1, math.ceil(len(rates) / RATE_TICKS))]
    axes.set_xscale("log")
    axes.set_xlim(*spread)
    axes.set_xticks(shown, [number(rate) for rate in shown], color=INK)
    axes.minorticks_off()
    axes.set_xlabel("learning rate", labelpad=3)


def rate_limits(run: MnistRun) -> tuple[float, float]:
    rates = [point.learning_rate for point in run.points]
    margin = max(1.3, (max(rates) / min(rates)) ** 0.06)
    return min(rates) / margin, max(rates) * margin


def accuracy_axis(axes: "Axes", run: MnistRun) -> None:
    """One scale for all panels that hides nothing; spaced by the error, so that high accuracies do not crowd."""
    values = [value for point in run.points for result in point.arms.values() for value in result.values()]
    places = [-log_error(value) for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(places), max(places)
    margin = 0.08 * max(high - low, 0.5)
    axes.set_ylim(low - margin, high + margin)
    ticks = [tick for tick in ACCURACY_TICKS if low - margin <= -log_error(tick) <= high + margin]
    axes.set_yticks([-log_error(tick) for tick in ticks], [f"{tick:g}" for tick in ticks])


def heat_table(run: MnistRun) -> HeatTable:
    """The accuracies of a sweep, both arms at every point, with the best point of each arm marked."""
    rates = sorted({point.learning_rate for point in run.points})
    results = {
        (point.learning_rate, point.init_std, arm): result for point in run.points for arm, result in point.arms.items()
    }
    errors = [log_error(result["mean"]) for result in results.values() if math.isfinite(result["mean"])]
    lowest, highest = min(errors, default=0.0), max(errors, default=0.0)

    def cell(rate: float, std: float, arm: str) -> Cell | None:
        result = results.get((rate, std, arm))
        if result is None:
            return None
        mean, low, high = result["mean"], result["low"], result["high"]
        heat = (highest - log_error(mean)) / (highest - lowest) if math.isfinite(mean) and highest > lowest else 0.0
        interval = f"{100 * low:.2f} to {100 * high:.2f}" if math.isfinite(low + high) else ""
        return Cell(percent(mean), interval, round(heat, 2), run.best.get(arm) == (rate, std))

    rows = [
        (number(std), ARMS[arm], [cell(rate, std, arm) for rate in rates])
        for std in sorted({point.init_std for point in run.points})
        for arm in ARMS
    ]
    return HeatTable([number(rate) for rate in rates], rows)


def log_error(accuracy: float) -> float:
    """The logarithm of the error rate: halving the errors counts the same everywhere."""
    return math.log10(max(1 - accuracy, 1e-4))


def accuracy_text(result: dict[str, float] | None) -> str:
    if result is None:
        return percent(None)
    if not math.isfinite(result["low"] + result["high"]):
        return percent(result["mean"])
    return f"{percent(result['mean'])} ({100 * result['low']:.2f} to {100 * result['high']:.2f})"


def best_text(points: list, arm: str) -> str:
    """The highest mean of an arm in a panel, and where it is."""
    found = [(point.arms[arm]["mean"], point.learning_rate) for point in points if arm in point.arms]
    found = [pair for pair in found if math.isfinite(pair[0])]
    if not found:
        return "no accuracy"
    mean, rate = max(found)
    return f"{percent(mean)} at {number(rate)}"
