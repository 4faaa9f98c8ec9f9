"""What section 4.2 claims, and the rules by which a run is judged."""

import math
from collections.abc import Sequence
from typing import Any

from batchnorm.experiments.claims import NORMAL_QUANTILE, Claim, interval, judge
from batchnorm.experiments.inception_arms import BASELINE

SOURCE = "Ioffe & Szegedy 2015, section 4.2, Figure 3"

# arm: steps to 72.2 % and best accuracy in the paper
FIGURE_3 = {
    "Inception": (31.0e6, 72.2),
    "BN-Baseline": (13.3e6, 72.7),
    "BN-x5": (2.1e6, 73.0),
    "BN-x30": (2.7e6, 74.8),
    "BN-x5-Sigmoid": (None, 69.8),
}
SAMPLING = "with one seed, the 95 % interval that the number of validation images allows"

# The rows of one network in the order of their steps
Run = list[dict[str, Any]]


class Runs:
    """The metrics of all networks of a run, and how many validation images an accuracy is the mean of."""

    def __init__(self, rows: list[dict[str, Any]], seeds: Sequence[int], images: int) -> None:
        self.seeds, self.images = tuple(seeds), images
        self.by_network: dict[tuple[str, int], Run] = {}
        for row in rows:
            self.by_network.setdefault((row["arm"], row["seed"]), []).append(row)

    def of(self, arm: str) -> list[Run]:
        """One run per seed; none if the arm was not trained."""
        return [self.by_network[arm, seed] for seed in self.seeds if (arm, seed) in self.by_network]

    def error(self, accuracy: float) -> float:
        """Half the 95 % interval of an accuracy on the validation images."""
        return NORMAL_QUANTILE * math.sqrt(max(accuracy * (1 - accuracy), 0.0) / self.images)


def inception_claims(runs: Runs, num_classes: int) -> list[Claim]:
    """The claims of section 4.2 that the arms of a run allow to judge."""
    faster = ("BN-Baseline", "BN-x5", "BN-x30")
    claims = [steps_claim(runs, arm) for arm in faster if runs.of(arm) and runs.of(BASELINE)]
    pairs = [("BN-Baseline", BASELINE), ("BN-x5", BASELINE), ("BN-x30", BASELINE), ("BN-x30", "BN-x5")]
    claims += [accuracy_claim(runs, arm, other) for arm, other in pairs if runs.of(arm) and runs.of(other)]
    return claims + ([sigmoid_claim(runs, num_classes)] if runs.of("BN-x5-Sigmoid") else [])


def best(run: Run) -> float:
    """The best validation accuracy along the training; NaN for a network that diverged before its first evaluation."""
    return max((row["validation_accuracy"] for row in run if row["validation_loss"] is not None), default=math.nan)


def steps_to(run: Run, level: float) -> int | None:
    """The first evaluated step at or above a validation accuracy."""
    return next((row["step"] for row in run if row["step"] and row["validation_accuracy"] >= level), None)


def steps_ratio(run: Run, plain: Run, margin: float = 0.0) -> float:
    """Steps to the plain network's best accuracy, moved by a margin, over its own; the whole training if never."""
    level = best(plain)
    own = steps_to(plain, level)
    if own is None or math.isnan(best(run)):
        return math.nan
    return (steps_to(run, level + margin) or run[-1]["step"]) / own


def steps_claim(runs: Runs, arm: str) -> Claim:
    pairs = list(zip(runs.of(arm), runs.of(BASELINE), strict=True))
    values = [steps_ratio(run, plain) for run, plain in pairs]
    run, plain = pairs[0]
    margin = runs.error(best(plain))
    alone = steps_ratio(run, plain, -margin), steps_ratio(run, plain, margin)
    mean, low, high, verdict = judge(values, below=1.0, alone=alone)
    steps = FIGURE_3[arm][0] or math.nan
    return Claim(
        name=f"steps-{arm}",
        statement=f"{arm} reaches the best accuracy of {BASELINE} in fewer steps.",
        source=SOURCE,
        rule=f"steps of {arm} / steps of {BASELINE} to the latter's best validation accuracy, the whole training if "
        f"never; the 95 % interval over seeds, or {SAMPLING} ({BASELINE}'s best accuracy plus and minus its error), "
        "lies below 1",
        paper=f"{steps / 31.0e6:.3f} ({steps / 1e6:g} of 31 million steps)",
        unit="ratio of steps",
        values=values,
        mean=mean,
        low=low,
        high=high,
        verdict=verdict,
        detail="; ".join(
            f"{BASELINE} {best(plain):.2%} at step {steps_to(plain, best(plain))}, "
            f"{arm} at {steps_to(run, best(plain)) or 'none'}"
            for run, plain in pairs
        ),
    )


def accuracy_claim(runs: Runs, arm: str, other: str) -> Claim:
    pairs = [(best(run), best(against)) for run, against in zip(runs.of(arm), runs.of(other), strict=True)]
    values = [100 * (ours - theirs) for ours, theirs in pairs]
    half = 100 * math.hypot(*map(runs.error, pairs[0]))
    mean, low, high, verdict = judge(values, above=0.0, alone=(values[0] - half, values[0] + half))
    ours, theirs = FIGURE_3[arm][1], FIGURE_3[other][1]
    return Claim(
        name=f"accuracy-{arm}-over-{other}",
        statement=f"{arm} reaches a higher best accuracy than {other}.",
        source=SOURCE,
        rule=f"difference of the best validation accuracies; the 95 % interval over seeds, or {SAMPLING}, lies above 0",
        paper=f"{ours - theirs:+.1f} ({ours} % against {theirs} %)",
        unit="percentage points",
        values=values,
        mean=mean,
        low=low,
        high=high,
        verdict=verdict,
        detail="; ".join(f"{other} {theirs:.2%}, {arm} {ours:.2%}" for ours, theirs in pairs),
    )


def sigmoid_claim(runs: Runs, num_classes: int) -> Claim:
    values = [100 * best(run) for run in runs.of("BN-x5-Sigmoid")]
    chance = 100 / num_classes
    half = 100 * runs.error(values[0] / 100)
    mean, low, high, verdict = judge(values, above=chance, alone=(values[0] - half, values[0] + half))
    plain = [100 * best(run) for run in runs.of("Inception-Sigmoid")]
    return Claim(
        name="sigmoid",
        statement="With BN, Inception can be trained with sigmoids in place of ReLU.",
        source="Ioffe & Szegedy 2015, section 4.2.2, Figure 3",
        rule=f"best validation accuracy; the 95 % interval over seeds, or {SAMPLING}, lies above chance, {chance:g} %",
        paper="69.8 %; without BN never above chance, 0.1 %",
        unit="%",
        values=values,
        mean=mean,
        low=low,
        high=high,
        verdict=verdict,
        detail=f"without BN {interval(plain)[0]:.2f} %" if plain else "without BN not trained in this run",
    )
