"""Section 2 of the paper on one layer, exactly, and the claims about it from made-up rows."""

import dataclasses
from typing import Any

import pytest
import torch

from batchnorm.experiments import outside_gradient
from batchnorm.experiments.outside_gradient import BIAS, INSIDE, OUTSIDE, RATES, SCALE, STUDY, descend, network

OPTIONS = dataclasses.replace(STUDY.options, steps=40, evaluations=4)


def test_bias_moves_by_the_same_step_and_the_loss_stays():
    rows = descend(BIAS, OUTSIDE, 0, OPTIONS).rows
    sizes = [row["size"] for row in rows]
    assert sizes[2] == pytest.approx(2 * sizes[1], rel=1e-12)
    assert [row["loss"] for row in rows] == pytest.approx([rows[0]["loss"]] * 5, rel=1e-14)


@pytest.mark.parametrize("part", [BIAS, SCALE])
def test_through_the_statistics_nothing_moves(part: str):
    rows = descend(part, INSIDE, 0, OPTIONS).rows
    assert max(row["gradient"] for row in rows) < 1e-15
    assert rows[-1]["size"] == pytest.approx(rows[0]["size"], abs=1e-14)


def test_normalization_through_the_statistics_is_batch_norm():
    layer = outside_gradient.Normalization(5, INSIDE, 1e-5)
    reference = torch.nn.BatchNorm1d(5, affine=False)
    x = torch.randn(7, 5, requires_grad=True)
    g = torch.randn(7, 5)
    ours, theirs = (torch.autograd.grad(module(x), x, g)[0] for module in (layer, reference))
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(layer.eval()(x), reference.eval()(x), atol=0.2, rtol=0)


def made_up(change: Any = None) -> list[dict[str, Any]]:
    """Rows in which everything is as the paper says, with what a test changes."""
    rows = []
    for seed in (0, 1, 2):
        for step in (0, 10, 20):
            for where, moves in ((OUTSIDE, 1.0), (INSIDE, 0.0)):
                common = {"seed": seed, "step": step, "loss": 2.3 + seed}
                rows.append({"arm": f"{BIAS}, {where}", "size": moves * step + 1e-15, "gradient": moves, **common})
                rows.append({"arm": f"{SCALE}, {where}", "size": 1.0, "gradient": moves * (1 + step + seed), **common})
                for rate in RATES:
                    accuracy = 0.9 - 0.5 * moves + 0.01 * seed
                    sizes = {"weight_size": 1 + step * moves, "size": 1.0, "test_loss": 1.0, "test_accuracy": accuracy}
                    rows.append({"arm": network(rate, where), **common, **sizes})
    for row in rows:
        if change is not None:
            change(row)
    return rows


def verdicts(rows: list[dict[str, Any]]) -> dict[str, str]:
    return {claim.name: claim.verdict for claim in outside_gradient.conclude(rows, OPTIONS).claims}


def test_claims_hold_for_rows_as_the_paper_has_them():
    assert set(verdicts(made_up()).values()) == {"reproduced"}


def test_bias_that_settles_is_not_reproduced():
    def settle(row: dict[str, Any]) -> None:
        if row["arm"] == f"{BIAS}, {OUTSIDE}":
            row["size"] = min(row["size"], 10.0)

    assert verdicts(made_up(settle))["bias-grows"] == "not reproduced"


def test_moving_loss_is_not_reproduced():
    def learn(row: dict[str, Any]) -> None:
        row["loss"] -= 1e-6 * row["step"]

    assert verdicts(made_up(learn))["loss-stays"] == "not reproduced"


def test_network_that_learns_as_well_has_not_blown_up():
    def equal(row: dict[str, Any]) -> None:
        if "test_accuracy" in row:
            row["test_accuracy"] = 0.9

    assert verdicts(made_up(equal))["network-blows-up"] == "not reproduced"


def test_diverged_network_is_not_comparable_but_drawn():
    def diverge(row: dict[str, Any]) -> None:
        if row["arm"] == network(RATES[-1], OUTSIDE) and row["step"] == 20:
            row |= {"test_accuracy": None, "weight_size": None, "size": None}

    conclusion = outside_gradient.conclude(made_up(diverge), OPTIONS)
    assert conclusion.claims[-1].verdict == "not comparable"
    assert "nan" in conclusion.tables[0].rows[-2][2]
