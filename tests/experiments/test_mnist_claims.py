"""The claims of Figure 1 on rows whose verdict is known."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from batchnorm.experiments.claims import NOT_COMPARABLE, NOT_REPRODUCED, REPRODUCED, Claim
from batchnorm.experiments.mnist_claims import figure1_claims, percentile_drift, steps_to

STEPS = (0, 10, 20, 30, 40)
GRID = set(STEPS)
# Three units: percentiles move by the factor of the unit, in the middle unit typically
UNITS = (0.5, 1.0, 3.0)

Curve = Callable[[int], float]


def network(arm: str, seed: int, accuracy: Curve, movement: float, loss: float | None = 0.5) -> list[dict[str, Any]]:
    return [
        {
            "arm": arm,
            "seed": seed,
            "step": step,
            "test_accuracy": accuracy(step),
            "test_loss": loss,
            "percentiles": [[q + unit * movement * step for unit in UNITS] for q in (-1.0, 0.0, 1.0)],
        }
        for step in STEPS
    ]


def rises(to: float, by: int) -> Curve:
    """From 0.1 to a level, reached at a step."""
    return lambda step: 0.1 + (to - 0.1) * min(step / by, 1.0)


def judged(plain: Curve, bn: Curve, *, seeds: int = 3, movements: tuple[float, float] = (0.1, 0.01)) -> list[Claim]:
    rows = []
    for seed in range(seeds):
        # Seeds differ a little, or every interval would be a point
        rows += network("plain", seed, lambda step, seed=seed: plain(step) + 1e-4 * seed, movements[0])
        rows += network("bn", seed, lambda step, seed=seed: bn(step) + 2e-4 * seed, movements[1] * (1 + 0.01 * seed))
    claims, _ = figure1_claims(rows, range(seeds), GRID)
    assert [claim.name for claim in claims] == ["final-accuracy", "steps-to-accuracy", "stable-distribution"]
    return claims


def test_better_bn_reproduces_every_claim():
    accuracy, steps, drift = judged(rises(0.9, 40), rises(0.95, 20))
    assert {claim.verdict for claim in (accuracy, steps, drift)} == {REPRODUCED}
    assert accuracy.values == pytest.approx([5.0, 5.01, 5.02])
    assert accuracy.mean == pytest.approx(5.01)
    assert steps.values == [0.5, 0.5, 0.5]
    assert steps.detail == "plain 40, BN 20; plain 40, BN 20; plain 40, BN 20"
    assert drift.values == pytest.approx([0.1, 0.101, 0.102])


def test_worse_bn_reproduces_no_claim():
    accuracy, steps, drift = judged(rises(0.95, 20), rises(0.9, 40), movements=(0.01, 0.1))
    assert {claim.verdict for claim in (accuracy, steps, drift)} == {NOT_REPRODUCED}
    assert accuracy.mean == pytest.approx(-4.99)
    assert steps.values == [2.0, 2.0, 2.0]
    assert steps.detail.startswith("plain 20, BN never")
    assert drift.values == pytest.approx([10.0, 10.1, 10.2])


def test_equal_arms_reproduce_no_claim():
    rows = [row for seed in (0, 1) for arm in ("plain", "bn") for row in network(arm, seed, rises(0.9, 40), 0.1)]
    claims, _ = figure1_claims(rows, (0, 1), GRID)
    assert [(claim.verdict, claim.mean) for claim in claims] == [
        (NOT_REPRODUCED, 0.0),
        (NOT_REPRODUCED, 1.0),
        (NOT_REPRODUCED, pytest.approx(1.0)),
    ]


def test_one_seed_is_not_comparable():
    for claim in judged(rises(0.9, 40), rises(0.95, 20), seeds=1):
        assert (claim.verdict, claim.low, claim.high) == (NOT_COMPARABLE, None, None)
        assert claim.mean is not None


@pytest.mark.parametrize("diverged", ["plain", "bn"])
def test_a_diverged_network_is_not_comparable(diverged: str):
    """It has a null loss, an accuracy of a tenth that means nothing, and nulls in its percentiles."""
    rows = []
    for seed in range(3):
        for arm in ("plain", "bn"):
            own = network(arm, seed, rises(0.9, 20), 0.1, None if (arm, seed) == (diverged, 1) else 0.5)
            if (arm, seed) == (diverged, 1):
                own[-1]["percentiles"] = [[None] * 3] * 3
            rows += own
    claims, unit = figure1_claims(rows, range(3), GRID)
    assert [claim.verdict for claim in claims] == [NOT_COMPARABLE] * 3
    assert all(math.isnan(claim.values[1]) and math.isfinite(claim.values[0]) for claim in claims)
    assert unit == 1


def test_a_plain_network_that_does_not_learn_is_no_measure_of_steps():
    """Its last accuracy is the one it began with, so it took no steps to get there."""
    accuracy, steps, _ = judged(lambda step: 0.1135, rises(0.95, 20))
    assert accuracy.verdict == REPRODUCED
    assert (steps.verdict, steps.mean) == (NOT_COMPARABLE, None)
    assert steps.detail.startswith("plain 0, BN 10")


def test_curves_that_do_not_move_are_not_comparable():
    drift = judged(rises(0.9, 40), rises(0.95, 20), movements=(0.0, 0.1))[2]
    assert (drift.verdict, drift.mean) == (NOT_COMPARABLE, None)


def test_steps_to_is_the_first_evaluation_at_or_above_the_level():
    run = network("bn", 0, rises(0.9, 40), 0.1)
    assert steps_to(run, 0.1) == 0
    assert steps_to(run, run[2]["test_accuracy"]) == 20
    assert steps_to(run, run[2]["test_accuracy"] + 1e-9) == 30
    assert steps_to(run, 0.91) is None
    assert steps_to(run, math.nan) is None


def test_drift_is_the_wandering_relative_to_the_spread():
    """A line with slope s over the steps 0 to 40 has the standard deviation 10 s sqrt(2.5); the spread is 2."""
    drift = percentile_drift(network("plain", 0, rises(0.9, 40), 0.1), GRID)
    expected = [unit * 0.1 * 10 * math.sqrt(2.5) / 2 for unit in UNITS]
    torch.testing.assert_close(drift, torch.tensor(expected, dtype=torch.float64))


def test_drift_does_not_depend_on_location_or_scale():
    run = network("plain", 0, rises(0.9, 40), 0.1)
    moved = [
        row | {"percentiles": [[7 - 3 * value for value in curve] for curve in reversed(row["percentiles"])]}
        for row in run
    ]
    torch.testing.assert_close(percentile_drift(run, GRID), percentile_drift(moved, GRID))


def test_drift_counts_only_the_uniform_grid():
    run = network("plain", 0, rises(0.9, 40), 0.1)
    dense = [*run, {**run[1], "step": 11, "percentiles": [[1e6] * 3] * 3}]
    assert percentile_drift(dense, GRID).equal(percentile_drift(run, GRID))


def test_curves_that_stand_still_have_no_drift():
    assert percentile_drift(network("plain", 0, rises(0.9, 40), 0.0), GRID).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("order", [(0.5, 1.0, 3.0), (3.0, 0.5, 1.0), (1.0, 3.0, 0.5)])
def test_the_unit_drawn_is_the_one_of_median_drift(monkeypatch: pytest.MonkeyPatch, order: tuple[float, ...]):
    monkeypatch.setitem(globals(), "UNITS", order)
    rows = [row for arm in ("plain", "bn") for row in network(arm, 0, rises(0.9, 40), 0.1)]
    assert figure1_claims(rows, (0,), GRID)[1] == order.index(1.0)
