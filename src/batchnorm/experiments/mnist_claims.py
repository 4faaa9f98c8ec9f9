"""What Figure 1 claims, and the rules by which a run is judged."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from batchnorm.experiments.claims import Claim, interval, judge

SOURCE = "Ioffe & Szegedy 2015, section 4.1, Figure 1"
ARMS = ("plain", "bn")

# The rows of one network in the order of their steps
Run = list[dict[str, Any]]


def figure1_claims(rows: list[dict[str, Any]], seeds: Sequence[int], grid: set[int]) -> tuple[list[Claim], int]:
    """The three claims of Figure 1 from the metrics of a run, and the unit that the figure draws.

    The unit is a typical one by rule: nearest to the median drift in both arms, by rank, for the first seed.

    Args:
        rows: of both arms and all seeds, in the order of their steps.
        seeds: the pairs.
        grid: the steps on which the drift of the percentiles is measured, evenly spaced.
    """
    runs = {
        (arm, seed): [row for row in rows if (row["arm"], row["seed"]) == (arm, seed)] for arm in ARMS for seed in seeds
    }
    pairs = [(runs["plain", seed], runs["bn", seed]) for seed in seeds]
    drifts = [[percentile_drift(run, grid) for run in pair] for pair in pairs]
    ranks = sum(drift.argsort().argsort().sub(len(drift) // 2).abs() for drift in drifts[0])
    claims = [accuracy_claim(pairs), steps_claim(pairs), drift_claim(drifts)]
    return claims, int(torch.as_tensor(ranks).argmin())


def accuracy_claim(pairs: list[tuple[Run, Run]]) -> Claim:
    finals = [[final_accuracy(run) for run in pair] for pair in pairs]
    values = [100 * (bn - plain) for plain, bn in finals]
    mean, low, high, verdict = judge(values, above=0.0)
    plain, bn = (interval([final[i] for final in finals])[0] for i in (0, 1))
    return Claim(
        name="final-accuracy",
        statement="The network with BN ends at a higher test accuracy than the same network without.",
        source=SOURCE + "(a)",
        rule="the 95 % interval of the paired difference over seeds lies above 0",
        paper="higher; curves only, no number",
        unit="percentage points",
        values=values,
        mean=mean,
        low=low,
        high=high,
        verdict=verdict,
        detail=f"plain {plain:.2%}, BN {bn:.2%} (means over seeds at the last step)",
    )


def final_accuracy(run: Run) -> float:
    """NaN for a diverged network, whose test loss is null: that it still hits a tenth of the labels says nothing."""
    return run[-1]["test_accuracy"] if run[-1]["test_loss"] is not None else math.nan


def ratio(bn: float, plain: float) -> float:
    """NaN where there is nothing to compare with."""
    return bn / plain if plain else math.nan


def steps_claim(pairs: list[tuple[Run, Run]]) -> Claim:
    reached = [tuple(steps_to(run, final_accuracy(pair[0])) for run in pair) for pair in pairs]
    values = [steps_ratio(pair, steps) for pair, steps in zip(pairs, reached, strict=True)]
    mean, low, high, verdict = judge(values, below=1.0)
    return Claim(
        name="steps-to-accuracy",
        statement="BN reaches the final accuracy of the network without BN in a fraction of its steps.",
        source=SOURCE + "(a)",
        rule="steps of BN / steps of plain to the plain network's last accuracy, each arm's first evaluation at or "
        "above it, the whole training if BN never is; the 95 % interval over paired seeds lies below 1",
        paper="faster; curves only, no number",
        unit="ratio of steps",
        values=values,
        mean=mean,
        low=low,
        high=high,
        verdict=verdict,
        detail="; ".join(f"plain {shown(plain)}, BN {shown(bn)}" for plain, bn in reached),
    )


def shown(step: int | None) -> str:
    return "never" if step is None else f"{step:,}"


def steps_ratio(pair: tuple[Run, Run], reached: tuple[int | None, ...]) -> float:
    """BN that never gets there counts with the whole training; NaN if it diverged or plain did not learn."""
    plain, bn = reached
    if math.isnan(final_accuracy(pair[1])):
        return math.nan
    return ratio(pair[1][-1]["step"] if bn is None else bn, plain or 0)


def steps_to(run: Run, level: float) -> int | None:
    """The first evaluated step at which the test accuracy is at or above a level."""
    return next((row["step"] for row in run if row["test_accuracy"] >= level), None)


def percentile_drift(run: Run, grid: set[int]) -> Tensor:
    """How far the percentiles of each unit's sigmoid input wander over training, relative to their spread, (units,).

    The standard deviation over a uniform grid of steps of each of the three percentiles, averaged over the three and
    divided by the average distance between the outer two.
    """
    nan = float("nan")
    rows = [row["percentiles"] for row in run if row["step"] in grid]
    curves = torch.tensor(
        [[[nan if v is None else v for v in curve] for curve in row] for row in rows], dtype=torch.float64
    )
    spread = (curves[:, 2] - curves[:, 0]).mean(0)
    return curves.std(0).mean(0) / spread


def drift_claim(drifts: list[list[Tensor]]) -> Claim:
    medians = [[drift.quantile(0.5).item() for drift in pair] for pair in drifts]
    values = [ratio(bn, plain) for plain, bn in medians]
    mean, low, high, verdict = judge(values, below=1.0)
    return Claim(
        name="stable-distribution",
        statement="BN makes the distribution of a sigmoid's input more stable over training.",
        source=SOURCE + "(b, c)",
        rule="drift of BN / drift of plain, where drift is the standard deviation over training of the {15, 50, 85} "
        "percentiles relative to their spread, median over the units of the last hidden layer; the 95 % interval over "
        "paired seeds lies below 1",
        paper="more stable; curves of one unit, no number",
        unit="ratio of drifts",
        values=values,
        mean=mean,
        low=low,
        high=high,
        verdict=verdict,
        detail="; ".join(f"plain {plain:.3f}, BN {bn:.3f}" for plain, bn in medians),
    )
