"""Accuracy of any number of arms over training: gathered from the rows, drawn, and put in words."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from batchnorm.report.looks import Look
from batchnorm.report.metrics import Evaluation
from batchnorm.report.text import percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Curves:
    """The accuracy of every network on one grid of steps.

    Attributes:
        steps: ascending, those of all arms together.
        accuracy: by arm, shape (seeds, steps); NaN where a network diverged or was not evaluated.
        evaluated: by arm, the places in ``steps`` of its evaluations.
    """

    steps: list[int]
    accuracy: dict[str, np.ndarray]
    evaluated: dict[str, list[int]]

    def mean(self, arm: str) -> np.ndarray:
        """Over the seeds; NaN where one of them diverged."""
        return self.accuracy[arm].mean(0)

    @property
    def seeds(self) -> int:
        return max(len(values) for values in self.accuracy.values())


def gather(rows: Sequence[Evaluation], arms: Iterable[str]) -> Curves:
    """The rows of each arm on one grid; an arm without rows is left out."""
    steps = sorted({row.step for row in rows})
    column = {step: i for i, step in enumerate(steps)}
    curves = Curves(steps, {}, {})
    for arm in arms:
        of_arm = [row for row in rows if row.arm == arm]
        if not of_arm:
            continue
        seeds = {seed: i for i, seed in enumerate(sorted({row.seed for row in of_arm}))}
        curves.accuracy[arm] = np.full((len(seeds), len(steps)), np.nan)
        curves.evaluated[arm] = sorted({column[row.step] for row in of_arm})
        for row in of_arm:
            curves.accuracy[arm][seeds[row.seed], column[row.step]] = row.accuracy
    return curves


def draw_curves(axes: "Axes", curves: Curves, looks: Mapping[str, Look], labels: Mapping[str, str]) -> None:
    """A line per arm, and a band from the lowest to the highest seed. The first arm lies on top."""
    for arm, values in curves.accuracy.items():
        if len(values) > 1:
            places = curves.evaluated[arm]
            low, high = values[:, places].min(0), values[:, places].max(0)
            steps = [curves.steps[i] for i in places]
            axes.fill_between(steps, low, high, color=looks[arm].color, alpha=0.2, linewidth=0)
    for arm in reversed(curves.accuracy):
        places = curves.evaluated[arm]
        steps = [curves.steps[i] for i in places]
        axes.plot(steps, curves.mean(arm)[places], label=labels[arm], linewidth=1.6, **looks[arm].line)


def step_axis(axes: "Axes", first: int, last: int) -> None:
    """Steps in thousands or millions, as in the paper."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.set_xlim(first, max(last, first + 1))
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10], integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: short(step)))
    axes.set_xlabel("training steps", labelpad=3)


def short(step: float) -> str:
    """A number of steps as an axis shows it.

    Example:
        >>> short(500), short(2500), short(31e6)
        ('500', '2.5K', '31M')
    """
    if step >= 1e6:
        return f"{step / 1e6:g}M"
    return f"{step / 1000:g}K" if step >= 1000 else f"{step:g}"


def accuracy_floor(curves: Curves, floors: Sequence[float]) -> float:
    """Where the accuracy axis begins: as high as leaves every curve visible for most of its length."""
    means = [curves.mean(arm) for arm in curves.accuracy]
    finite = [mean[np.isfinite(mean)] for mean in means]
    for floor in floors:
        if all(np.mean(mean > floor) > 0.6 for mean in finite if len(mean)):
            return floor
    return 0.0


def accuracy_text(column: np.ndarray) -> str:
    """Mean of the seeds and their range."""
    mean = percent(float(column.mean()))
    if len(column) == 1 or not np.isfinite(column).all():
        return mean
    return f"{mean} ({100 * column.min():.2f} to {100 * column.max():.2f})"
