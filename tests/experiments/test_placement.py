"""The identity and the bias before BN, tiny networks of every placement, and the claims from made-up rows."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from batchnorm.experiments import placement
from batchnorm.experiments.claims import NOT_REPRODUCED, REPRODUCED
from batchnorm.experiments.data.mnist import Mnist
from batchnorm.experiments.learning_rates import at_rate, split_rate
from batchnorm.experiments.mnist_network import mlp
from batchnorm.experiments.placement import AFTER, BEFORE, BIASED, IDENTITY, NEITHER, RELU, SIGMOID, STUDY, named
from batchnorm.experiments.study import Place
from batchnorm.nn import BatchNorm1d

OPTIONS = dataclasses.replace(STUDY.options, steps=2, seeds=(0, 1, 2), rates=(0.3, 1.0), evaluations=1)


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch, small_mnist: Mnist) -> None:
    monkeypatch.setattr(placement, "bundled_mnist", lambda: small_mnist)


@pytest.mark.usefixtures("data")
def test_identity_and_the_missing_gradient_of_the_bias_are_exact():
    row = placement.exact(0, OPTIONS)
    assert row["identity"] < 1e-13
    assert row["bias_gradient"] < 1e-13


def test_identities_are_those_of_these_images_and_leave_the_network_alone():
    model = mlp(0, lambda n_in, n_out: nn.Sequential(nn.Linear(n_in, n_out), nn.Sigmoid()), hidden=(7,)).double()
    images, others = torch.rand(2, 9, 784, dtype=torch.float64)
    with torch.no_grad():
        normalized = placement.with_identities(model, images, 1e-5)
        assert len(list(model.modules())) == 5
        torch.testing.assert_close(normalized(images), model(images))
        assert (normalized(others) - model(others)).abs().max() > 1e-3


def test_blocks_are_what_their_names_say():
    blocks = {
        (activation, variant): placement.block(3, 2, activation, variant, 1e-5)
        for activation, variants in placement.VARIANTS.items()
        for variant in variants
    }
    kinds = {name: [type(layer) for layer in block] for name, block in blocks.items()}
    assert kinds[SIGMOID, BEFORE] == kinds[SIGMOID, NEITHER] == [nn.Linear, BatchNorm1d, nn.Sigmoid]
    assert kinds[RELU, AFTER] == [nn.Linear, nn.ReLU, BatchNorm1d]
    trained = {name: {key for key, p in block.named_parameters() if p.requires_grad} for name, block in blocks.items()}
    assert trained[SIGMOID, BEFORE] == {"0.weight", "1.weight", "1.bias"}
    assert trained[SIGMOID, BIASED] == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert trained[SIGMOID, AFTER] == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert trained[SIGMOID, placement.NO_GAMMA] == {"0.weight", "1.bias"}
    assert trained[SIGMOID, placement.NO_BETA] == {"0.weight", "1.weight"}
    assert trained[SIGMOID, NEITHER] == {"0.weight"}
    assert trained[RELU, placement.WITHOUT] == {"0.weight", "0.bias"}


@pytest.mark.usefixtures("data")
def test_every_arm_runs_and_ends_in_claims(tmp_path: Path):
    options = dataclasses.replace(OPTIONS, seeds=(0,), rates=(1.0,))
    rows = [
        {"arm": arm, "seed": 0, **row}
        for arm in STUDY.arms(options)
        for row in placement.run(arm, 0, options, Place(arm, tmp_path)).rows
    ]
    assert len({row["arm"] for row in rows}) == 11
    biases = {row["arm"]: row["bias"] for row in rows if row.get("step") == 2}
    assert biases[at_rate(named(SIGMOID, BIASED), 1.0)] < 1e-6 < biases[at_rate(named(SIGMOID, AFTER), 1.0)]
    assert len(STUDY.conclude(rows, options).tables[0].rows) == 10


def made_up(change: Callable[[str, int, dict[str, Any]], None] = lambda variant, seed, row: None) -> list[dict]:
    """Rows in which everything is as the paper says, with what a test changes."""
    rows = []
    for arm in STUDY.arms(OPTIONS):
        for seed in OPTIONS.seeds:
            row = {"arm": arm, "seed": seed, "step": 2, "gamma": 1.0, "beta": 1.0, "bias": 0.0}
            row |= {"identity": 1e-15, "bias_gradient": 1e-15}
            variant = arm if arm == IDENTITY else split_rate(arm)[0]
            best = variant == named(SIGMOID, AFTER) or arm.endswith("0.3")
            lost = 0.01 * variant.endswith((AFTER, NEITHER))
            row["test_accuracy"] = (0.95 if best else 0.5) - lost + 0.001 * seed
            change(variant, seed, row)
            rows.append(row)
    return rows


def verdicts(rows: list[dict[str, Any]]) -> dict[str, str]:
    return {claim.name: claim.verdict for claim in placement.conclude(rows, OPTIONS).claims}


def test_claims_hold_for_rows_as_the_paper_has_them():
    assert set(verdicts(made_up()).values()) == {REPRODUCED}


@pytest.mark.parametrize(
    ("variant", "change", "refuted"),
    [
        (IDENTITY, {"identity": 1e-3}, "identity"),
        (IDENTITY, {"bias_gradient": 1e-3}, "bias-has-no-gradient"),
        (named(SIGMOID, BIASED), {"test_accuracy": 0.9}, "bias-is-ignored"),
        (named(SIGMOID, AFTER), {"test_accuracy": 0.99}, "before-sigmoid"),
        (named(RELU, AFTER), {"test_accuracy": 0.99}, "before-relu"),
        (named(SIGMOID, NEITHER), {"test_accuracy": 0.96}, "gamma-beta"),
    ],
)
def test_other_measurements_are_not_reproduced(variant: str, change: dict[str, float], refuted: str):
    def changed(name: str, seed: int, row: dict[str, Any]) -> None:
        if name == variant:
            row.update({field: value * (1 + 0.001 * seed) for field, value in change.items()})

    found = verdicts(made_up(changed))
    assert [name for name, verdict in found.items() if verdict == NOT_REPRODUCED] == [refuted]


@pytest.mark.parametrize(("lost", "verdict"), [(0.0005, REPRODUCED), (0.0015, NOT_REPRODUCED)])
def test_as_good_allows_a_tenth_of_a_point(lost: float, verdict: str):
    def change(variant: str, seed: int, row: dict[str, Any]) -> None:
        if variant == named(RELU, AFTER) and row["arm"].endswith("0.3"):
            row["test_accuracy"] = 0.95 + lost + 0.001 * seed

    assert verdicts(made_up(change))["before-relu"] == verdict
