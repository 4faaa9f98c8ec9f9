"""One panel for the accuracy of any number of arms: lines named at their ends, a level, and where each reaches it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from batchnorm.report.curves import Curves, accuracy_floor, accuracy_text, draw_curves, step_axis
from batchnorm.report.drawing import BOTTOM, INK, LEFT, MUTED, TOP, Curve, Panel
from batchnorm.report.looks import Look, looks
from batchnorm.report.text import ascii_only, joined, number, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes

AXES_WIDTH, AXES_HEIGHT = 3.2, 2.4  # inches
LABEL_GAP = 0.135  # inches from one label to the next
LEADER = 0.2  # inches from the end of a line to its name
LETTER = 0.062  # inches, an average letter of a label
LABEL_LETTERS = 26
LABEL_SIZE = 7.5
MARK = {"markeredgecolor": "white", "markeredgewidth": 0.8, "linestyle": "none", "zorder": 4, "clip_on": False}
FLOORS = (0.4,)  # where the axis of the paper's Figure 2 begins


@dataclass(frozen=True)
class Lines:
    """What the panel shows: the curves, the arms' names, a named level of accuracy, and steps to mark on it."""

    curves: Curves
    names: Mapping[str, str]
    quantity: str = "Validation accuracy"
    level: float = math.nan
    level_name: str = ""
    marks: Mapping[str, int] = field(default_factory=dict)  # by arm
    alone: str = "one seed"  # what is said where an arm has one

    @property
    def looks(self) -> dict[str, Look]:
        return looks(self.names)

    @property
    def floor(self) -> float:
        return accuracy_floor(self.curves, FLOORS)

    @property
    def top(self) -> float:
        """Above everything that is drawn."""
        values = np.concatenate([self.level, *(values.ravel() for values in self.curves.accuracy.values())], axis=None)
        highest = float(values[np.isfinite(values)].max(initial=self.floor))
        return min(highest + 0.06 * max(highest - self.floor, 0.1), 1.0)


class Label(NamedTuple):
    """A name at the right of the axes; ``look`` is that of its line."""

    y: float
    text: str
    look: Look


def lines_panel(lines: Lines, name: str, title: str) -> Panel:
    """A panel of these lines."""
    curves, labels = lines.curves, end_labels(lines)
    shown = [
        Curve(lines.names[arm], look.color, curves.mean(arm).tolist(), readings(curves, arm), look.dashes)
        for arm, look in lines.looks.items()
    ]

    def draw_on(axes: "Axes") -> None:
        draw_curves(axes, curves, lines.looks, {arm: ascii_only(text) for arm, text in lines.names.items()})
        axes.set_ylim(lines.floor, lines.top)
        step_axis(axes, min(curves.steps[0], 0), curves.steps[-1])
        draw_level(axes, lines)
        draw_ends(axes, lines)
        label_ends(axes, labels)

    ends = joined([f"{curve.name} {curve.text[-1]}" for curve in shown])
    description = f"{lines.quantity} over training steps. At step {number(curves.steps[-1])}: {ends}."
    right = LEADER + 0.12 + LETTER * max(len(label.text) for label in labels)
    steps = [number(step) for step in curves.steps]
    return Panel(name, title, LEFT + AXES_WIDTH + right, right, description, curves.steps, steps, shown, draw_on)


def panel_height(lines: Lines) -> float:
    """Inches; as many as the labels need."""
    return BOTTOM + TOP + max(AXES_HEIGHT, LABEL_GAP * (len(lines.names) + 2))


def readings(curves: Curves, arm: str) -> list[str]:
    """What an arm had reached at every step, or that it diverged."""
    evaluated, texts = set(curves.evaluated[arm]), []
    for i, column in enumerate(curves.accuracy[arm].T):
        lost = int(np.isnan(column).sum())
        if i in evaluated and lost:
            texts.append("diverged" if lost == len(column) else f"{lost} of {len(column)} diverged")
        else:
            texts.append(accuracy_text(column))
    return texts


def last_finite(curves: Curves, arm: str) -> int | None:
    """The place of the last step at which every seed of an arm still had an accuracy."""
    places = [i for i in curves.evaluated[arm] if np.isfinite(curves.mean(arm)[i])]
    return places[-1] if places else None


def has_diverged(curves: Curves, arm: str) -> bool:
    """Whether the last evaluation of an arm lacks the accuracy of a seed."""
    return last_finite(curves, arm) != curves.evaluated[arm][-1]


def end_labels(lines: Lines) -> list[Label]:
    """The name of every line at its last value, and that of the level."""
    labels = []
    for arm, look in lines.looks.items():
        last = last_finite(lines.curves, arm)
        y = lines.floor if last is None else float(lines.curves.mean(arm)[last])
        suffix = ", diverged" if has_diverged(lines.curves, arm) else ""
        labels.append(Label(y, shortened(lines.names[arm]) + suffix, look))
    if math.isfinite(lines.level):
        labels.append(Label(lines.level, shortened(lines.level_name), Look(MUTED, (1, 1.6))))
    return labels


def shortened(name: str) -> str:
    """A name as letters that every font has, not too long for the margin."""
    text = ascii_only(name)
    return text if len(text) <= LABEL_LETTERS else f"{text[: LABEL_LETTERS - 3]}..."


def draw_level(axes: "Axes", lines: Lines) -> None:
    """The level as a dotted line, and a diamond where an arm reaches it."""
    if not math.isfinite(lines.level):
        return
    axes.axhline(lines.level, color=MUTED, linewidth=0.9, linestyle=(0, (1, 1.6)), zorder=1.5)
    for arm, step in lines.marks.items():
        axes.plot([step], [lines.level], marker="D", markersize=5.5, color=lines.looks[arm].color, **MARK)


def draw_ends(axes: "Axes", lines: Lines) -> None:
    """A cross where a line ends because its network diverged."""
    for arm, look in lines.looks.items():
        last = last_finite(lines.curves, arm)
        if last is not None and has_diverged(lines.curves, arm):
            place = [lines.curves.steps[last]], [lines.curves.mean(arm)[last]]
            axes.plot(*place, marker="x", markersize=6, markeredgewidth=1.6, color=look.color, zorder=5)


def label_ends(axes: "Axes", labels: Sequence[Label]) -> None:
    """Names at the right, each led to by a piece of its line, moved apart where they would overlap."""
    bottom, top = axes.get_ylim()
    width, height = axes.bbox.width / axes.figure.dpi, axes.bbox.height / axes.figure.dpi
    # apart as they are drawn: on a logarithmic axis, of logarithms
    scale = axes.yaxis.get_transform()
    low, high = map(float, scale.transform((bottom, top)))
    ends = [min(max(label.y, bottom), top) for label in labels]
    drawn = [float(place) for place in scale.transform(ends)]
    places = scale.inverted().transform(spread(drawn, LABEL_GAP / height * (high - low), low, high))
    for label, y, place in zip(labels, ends, places, strict=True):
        axes.plot(
            [1, 1 + LEADER / width],
            [y, place],
            transform=axes.get_yaxis_transform(),
            clip_on=False,
            linewidth=1.3,
            **label.look.line,
        )
        axes.annotate(
            label.text,
            (1 + LEADER / width, place),
            xycoords=axes.get_yaxis_transform(),
            xytext=(3, 0),
            textcoords="offset points",
            va="center",
            fontsize=LABEL_SIZE,
            color=INK,
            annotation_clip=False,
            parse_math=False,
        )


def spread(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places moved apart to a gap, in their order, by the smallest sum of squares, and into a range.

    Example:
        >>> spread([5.0, 5.0, 9.0], gap=1.0, low=0.0, high=10.0)
        [4.5, 5.5, 9.0]
    """
    order = sorted(range(len(places)), key=lambda i: places[i])
    gap = min(gap, (high - low) / max(len(places) - 1, 1))
    # less their gaps, places must not fall: neighbours that do are pooled at their mean
    pools: list[tuple[float, int]] = []
    for rank, i in enumerate(order):
        pools.append((places[i] - rank * gap, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (first, m), (second, n) = pools[-2:]
            pools[-2:] = [((m * first + n * second) / (m + n), m + n)]
    moved = [value for value, size in pools for _ in range(size)]
    result = list(places)
    for rank, i in enumerate(order):
        result[i] = min(max(moved[rank], low), high - (len(order) - 1) * gap) + rank * gap
    return result


def about_lines(lines: Lines) -> str:
    """What the lines and bands are, what lies below the axis, and which networks diverged."""
    curves = lines.curves
    seeds = f"mean of {curves.seeds} seeds; the band runs from the lowest to the highest"
    parts = [f"{lines.quantity} during training, {seeds if curves.seeds > 1 else lines.alone}."]
    below = below_axis(lines)
    if below:
        parts.append(f"The axis begins at {lines.floor:g}; below it lie {below}.")
    if math.isfinite(lines.level):
        parts.append(f"The dotted line is the {lines.level_name}, {percent(lines.level)}.")
    if lines.marks:
        parts.append("A diamond marks the step at which a network reaches it.")
    lost = [text for text in (about_divergence(curves, arm, name) for arm, name in lines.names.items()) if text]
    if lost:
        parts.append(f"{joined(lost)}: from there on the loss is not a finite number.")
    return " ".join(parts)


def below_axis(lines: Lines) -> str:
    """How many evaluations the axis hides, the last and the lowest of them; empty if there are none."""
    curves = lines.curves
    lowest = {arm: values.min(0) for arm, values in curves.accuracy.items()}
    hidden = [(i, arm) for arm, values in lowest.items() for i in np.flatnonzero(values < lines.floor).tolist()]
    if not hidden:
        return ""
    last, slowest = max(hidden, key=lambda place: place[0])
    least = min(float(lowest[arm][i]) for i, arm in hidden)
    return (
        f"{len(hidden)} evaluations, the last at step {number(curves.steps[last])} ({lines.names[slowest]}), "
        f"the lowest {percent(least)}"
    )


def about_divergence(curves: Curves, arm: str, name: str) -> str:
    """How many seeds of an arm diverged and since when; empty if none did."""
    lost = np.isnan(curves.accuracy[arm][:, curves.evaluated[arm]])
    if not lost.any():
        return ""
    step = number(curves.steps[curves.evaluated[arm][int(lost.any(0).argmax())]])
    seeds = f" ({int(lost.any(1).sum())} of {len(lost)} seeds)" if len(lost) > 1 else ""
    return f"{name}{seeds} had diverged by step {step}"
