"""What companions change, tiny networks of every variant, and the claims from made-up rows."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from statistics import linear_regression
from typing import Any

import pytest
import torch
from torch import nn

from batchnorm.experiments import regularization
from batchnorm.experiments.claims import NOT_COMPARABLE, NOT_REPRODUCED, REPRODUCED
from batchnorm.experiments.data.mnist import Mnist
from batchnorm.experiments.learning_rates import at_rate, split_rate
from batchnorm.experiments.regularization import BN, COMPANIONS, PLAIN, STUDY, with_dropout, with_l2
from batchnorm.experiments.study import Place

OPTIONS = dataclasses.replace(STUDY.options, steps=3, seeds=(0, 1, 2), rates=(0.1, 0.3), images=120, evaluations=1)


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch, small_mnist: Mnist) -> None:
    monkeypatch.setattr(regularization, "bundled_mnist", lambda: small_mnist)


@pytest.mark.usefixtures("data")
def test_companions_matter_the_less_the_more_they_are():
    rows = list(regularization.noise(0, OPTIONS))
    points = [(math.log(row["batch_size"]), math.log(row["variance"])) for row in rows]
    assert -1.2 < linear_regression(*zip(*points, strict=True)).slope < -0.8


@pytest.mark.usefixtures("data")
def test_all_arms_of_a_seed_see_the_same_part_of_the_images():
    first, again, other = (regularization.some_images(seed, OPTIONS) for seed in (0, 0, 1))
    assert first.train_images.shape == (120, 784)
    assert torch.equal(first.train_images, again.train_images)
    assert not torch.equal(first.train_labels, other.train_labels)


def test_dropout_follows_every_nonlinearity():
    kinds = {network: [type(layer) for layer in regularization.block(3, 2, network, 0.4)] for network in (PLAIN, BN)}
    assert kinds == {
        PLAIN: [nn.Linear, nn.ReLU, nn.Dropout],
        BN: [nn.Linear, regularization.BatchNorm1d, nn.Dropout],
    }
    assert len(regularization.block(3, 2, BN, 0.0)) == 2


@pytest.mark.usefixtures("data")
def test_every_arm_runs_and_every_regularizer_changes_the_network(tmp_path: Path):
    options = dataclasses.replace(OPTIONS, seeds=(0,), rates=(0.3,))
    rows = [
        {"arm": arm, "seed": 0, **row}
        for arm in STUDY.arms(options)
        for row in regularization.run(arm, 0, options, Place(arm, tmp_path)).rows
    ]
    losses = {row["arm"]: row["train_loss"] for row in rows if row.get("step") == 3}
    assert len(set(losses.values())) == len(losses) == 11
    assert len(STUDY.conclude(rows, options).tables[0].rows) == 11


@pytest.mark.usefixtures("data")
def test_dropout_is_drawn_by_the_seed(tmp_path: Path):
    arm = at_rate(with_dropout(PLAIN, 0.4), 0.3)
    first, again = (regularization.run(arm, 5, OPTIONS, Place(name, tmp_path)).rows for name in ("first", "again"))
    assert first == again


def made_up(change: Callable[[str, dict[str, Any]], None] = lambda variant, row: None) -> list[dict[str, Any]]:
    """Rows in which everything is as the paper says, with what a test changes."""
    accuracies = dict.fromkeys(regularization.variants(), 0.94)
    accuracies |= {PLAIN: 0.9, with_dropout(PLAIN, 0.4): 0.92, with_dropout(BN, 0.4): 0.91, with_l2(PLAIN, 0.005): 0.95}
    accuracies |= {with_l2(BN, 0.005): 0.93, with_dropout(PLAIN, 0.1): 0.91}
    rows = []
    for arm in STUDY.arms(OPTIONS):
        for seed in OPTIONS.seeds:
            if arm == COMPANIONS:
                sizes = (4, 16, 64)
                rows += [{"arm": arm, "seed": seed, "batch_size": m, "variance": (1 + seed) / m} for m in sizes]
                continue
            variant, rate = split_rate(arm)
            accuracy = accuracies[variant] - (rate == 0.1) * 0.1 + 0.001 * seed
            row = {"arm": arm, "seed": seed, "step": 3, "test_accuracy": accuracy, "train_accuracy": 1.0}
            rows.append(row | {"test_loss": 0.3, "train_loss": 0.01})
    for row in rows:
        change(row["arm"] if row["arm"] == COMPANIONS else split_rate(row["arm"])[0], row)
    return rows


def verdicts(rows: list[dict[str, Any]]) -> dict[str, str]:
    return {claim.name: claim.verdict for claim in regularization.conclude(rows, OPTIONS).claims}


def test_claims_hold_for_rows_as_the_paper_has_them():
    assert set(verdicts(made_up()).values()) == {REPRODUCED}


@pytest.mark.parametrize(
    ("variant", "field", "value", "refuted"),
    [
        (COMPANIONS, "variance", 0.1, {"companions"}),
        (PLAIN, "train_accuracy", 0.95, {"gap"}),
        (with_dropout(PLAIN, 0.1), "test_accuracy", 0.96, {"instead-of-dropout"}),
        (with_dropout(BN, 0.4), "test_accuracy", 0.97, {"removed-or-reduced", "dropout-brings-less"}),
        (with_l2(BN, 0.005), "test_accuracy", 0.95, {"l2-reduced"}),
    ],
)
def test_other_measurements_are_not_reproduced(variant: str, field: str, value: float, refuted: set[str]):
    def change(name: str, row: dict[str, Any]) -> None:
        if name == variant:
            row[field] = value + 0.001 * row["seed"]

    found = verdicts(made_up(change))
    assert {name for name, verdict in found.items() if verdict == NOT_REPRODUCED} == refuted


def test_gap_of_a_network_without_a_number_is_not_comparable():
    def lose(name: str, row: dict[str, Any]) -> None:
        if name == BN:
            row["train_accuracy"] = None

    assert verdicts(made_up(lose))["gap"] == NOT_COMPARABLE
