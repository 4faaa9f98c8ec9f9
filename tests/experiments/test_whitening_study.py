"""Ranks, correlations and the ignored gradient; tiny networks of every arm, and the claims from made-up rows."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from batchnorm.experiments import whitening_networks
from batchnorm.experiments.claims import NOT_COMPARABLE, NOT_REPRODUCED, REPRODUCED
from batchnorm.experiments.data.mnist import Mnist
from batchnorm.experiments.study import Place
from batchnorm.experiments.whitening import STUDY
from batchnorm.experiments.whitening_networks import (
    ARMS,
    BATCHES,
    BN,
    COST,
    GROUPS,
    METHODS,
    OUTSIDE,
    RANK,
    REGULARIZED,
    WIDTHS,
    ZCA,
    WhiteningOutsideGradient,
    name_of,
)
from batchnorm.nn import Whitening1d

OPTIONS = dataclasses.replace(
    STUDY.options,
    steps=1,
    seeds=(0, 1, 2),
    rates=(0.5, 2.0),
    rounds=1,
    evaluations=1,
    measured_images=32,
    test_images=20,
)


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch, small_mnist: Mnist) -> None:
    monkeypatch.setattr(whitening_networks, "bundled_mnist", lambda: small_mnist)


@pytest.mark.usefixtures("data")
def test_every_arm_runs_and_ends_in_claims(tmp_path: Path):
    options = dataclasses.replace(OPTIONS, rates=(0.5,))
    rows = [
        {"arm": arm, "seed": 0, **row}
        for arm in STUDY.arms(options)
        for row in STUDY.run(arm, 0, options, Place(arm, tmp_path)).rows
    ]
    assert len({row["arm"] for row in rows}) == len(ARMS) + 2
    ends = {row["arm"]: row for row in rows if row.get("step") == 1}
    plain = ends[name_of(BN, 256)]
    assert plain["correlation_after"] == pytest.approx(plain["correlation_before"], rel=1e-3)
    whitened = ends[name_of("ZCA, eps 1e-05", 16)]
    assert whitened["correlation_after"] < whitened["correlation_before"]
    conclusion = STUDY.conclude(rows, options)
    assert [len(table.rows) for table in conclusion.tables] == [len(METHODS), len(WIDTHS), len(ARMS)]
    assert [len(panel.lines) for panel in conclusion.panels] == [len(METHODS)] * 4


@pytest.mark.usefixtures("data")
def test_rank_of_few_examples_is_one_less_than_their_number():
    ranks = {(row["width"], row["batch"]): row["rank"] for row in whitening_networks.measure_ranks(0, OPTIONS)}
    assert [ranks[width, 16] for width in WIDTHS] == [15, 15, 15]
    assert ranks[32, 256] == 32


def test_outside_the_gradient_is_zca_but_for_the_gradient():
    layers = [WhiteningOutsideGradient(5, 1e-3).double(), Whitening1d(5, 1e-3).double()]
    input = torch.randn(9, 5, dtype=torch.float64)
    gradients = []
    for layer in layers:
        x = input.clone().requires_grad_()
        output = layer(x)
        gradients.append(torch.autograd.grad(output.square().sum() + output[:, 0].sum(), x)[0])
    outputs = [layer(input) for layer in layers]
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(layers[0].running_mean, layers[1].running_mean)
    torch.testing.assert_close(layers[0].running_cov, layers[1].running_cov)
    torch.testing.assert_close(*(layer.eval()(input) for layer in layers))
    # the output hardly changes with the input, which only the gradient through the statistics knows
    assert gradients[1].norm() < 0.1 * gradients[0].norm()


def test_correlation_of_features_is_0_for_none_and_1_for_copies():
    column = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    other = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64)

    def found(*columns: torch.Tensor) -> float:
        return whitening_networks.root_mean_square(whitening_networks.correlation(torch.stack(columns, 1)))

    assert found(column, 3 * other) == 0.0
    assert found(column, -2 * column, column) == pytest.approx(1.0)


def made_up(change: Callable[[dict[str, Any]], None] = lambda row: None) -> list[dict[str, Any]]:
    """Rows in which everything is as the sources say, with what a test changes."""
    rows = []
    for seed in range(3):
        for width in WIDTHS:
            for batch in BATCHES:
                place = {"seed": seed, "width": width, "batch": batch}
                rows.append({"arm": RANK, "rank": min(batch - 1, width), **place})
                for method in METHODS:
                    cost = 1.0 if method == BN else 0.1 * width * (1 + 0.01 * seed)
                    rows.append({"arm": COST, "method": method, "milliseconds": cost, **place})
        for name, arm in ARMS.items():
            for rate in OPTIONS.rates:
                row = {"arm": name, "seed": seed, "step": 1, "rate": rate, "batch": arm.batch_size, "width": arm.width}
                worse = arm.method in (OUTSIDE, next(iter(REGULARIZED)))
                row["test_accuracy"] = row["population_accuracy"] = 0.9 - 0.3 * worse + 0.001 * seed
                row["train_loss"] = (0.5 if arm.method == BN else 0.3) * rate * (1 + 0.01 * seed)
                row |= {
                    "correlation_before": 0.4,
                    "correlation_after": 0.4 if arm.method == BN else 0.01 + 0.001 * seed,
                }
                rows.append(row | {"weight_size": 20.0})
    for row in rows:
        change(row)
    return rows


def verdicts(rows: list[dict[str, Any]]) -> dict[str, str]:
    return {claim.name: claim.verdict for claim in STUDY.conclude(rows, OPTIONS).claims}


def test_claims_hold_for_rows_as_the_sources_have_them():
    assert set(verdicts(made_up()).values()) == {REPRODUCED}


@pytest.mark.parametrize(
    ("arms", "change", "refuted"),
    [
        ((COST,), {"milliseconds": 1.0}, {"whitening-is-expensive", "cost-grows-with-width"}),
        ((RANK,), {"rank": 16}, {"few-examples-are-singular"}),
        (
            [name_of(method, 16) for method in REGULARIZED],
            {"population_accuracy": 0.9},
            {"singular-needs-regularization"},
        ),
        ([name_of(OUTSIDE, batch) for batch in BATCHES], {"population_accuracy": 0.95}, {"gradient-must-pass"}),
        ([name_of(BN, 256)], {"correlation_after": 0.015}, {"bn-leaves-correlations"}),
        ([name_of(ZCA, 256)], {"train_loss": 0.9}, {"whitening-trains-faster"}),
        ([name_of(GROUPS, 256)], {"train_loss": 0.9}, {"groups-train-faster"}),
    ],
)
def test_other_measurements_are_not_reproduced(arms: Any, change: dict[str, float], refuted: set[str]):
    found = verdicts(made_up(lambda row: row.update(change) if row["arm"] in arms else None))
    assert {name for name, verdict in found.items() if verdict == NOT_REPRODUCED} == refuted


def test_a_rate_that_diverges_is_not_the_best_and_no_other_is_compared():
    def diverges(at: tuple[float, ...]) -> Callable[[dict[str, Any]], None]:
        return lambda row: (
            row.update(train_loss=None) if row.get("rate") in at and row["arm"] == name_of(ZCA, 256) else None
        )

    assert verdicts(made_up(diverges((2.0,))))["whitening-trains-faster"] == REPRODUCED
    assert verdicts(made_up(diverges((0.5, 2.0))))["whitening-trains-faster"] == NOT_COMPARABLE
