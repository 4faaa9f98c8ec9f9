"""Statistics of every kind, tiny networks of every method and batch, and the claims from made-up rows."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from batchnorm.experiments import batch_size, batch_size_networks
from batchnorm.experiments.batch_size import STUDY
from batchnorm.experiments.batch_size_networks import ARMS, BATCHES, BN, NOISE, RENORMED, Arm
from batchnorm.experiments.claims import NOT_REPRODUCED, REPRODUCED
from batchnorm.experiments.data.mnist import Mnist
from batchnorm.experiments.mnist_network import normalized_by_batch
from batchnorm.experiments.study import Place

OPTIONS = dataclasses.replace(
    STUDY.options,
    steps=4,
    rates=(0.5,),
    train_images=1000,
    validation_images=200,
    test_images=60,
    statistics_images=20,
    noise_batches=5,
)


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch, small_mnist: Mnist) -> None:
    monkeypatch.setattr(batch_size_networks, "bundled_mnist", lambda: small_mnist)


@pytest.mark.usefixtures("data")
def test_every_arm_runs_and_ends_in_claims(tmp_path: Path):
    rows = [
        {"arm": arm, "seed": 0, **row}
        for arm in STUDY.arms(OPTIONS)
        for row in STUDY.run(arm, 0, OPTIONS, Place(arm, tmp_path)).rows
    ]
    fields = ("validation_accuracy", "disagreement", *batch_size.STATISTICS)
    assert all(0 <= row[field] <= 1 for row in rows if row["arm"] != NOISE for field in fields)
    compared = {row["batch"]: row["images_compared"] for row in rows if row["arm"] in ARMS}
    assert compared == {2: 20, 4: 20, 8: 16, 16: 16, 32: 20, 64: 20, 128: 20, 512: 20}
    conclusion = STUDY.conclude(rows, OPTIONS)
    assert len(conclusion.tables[0].rows) == len(ARMS) == 25
    assert [len(panel.lines) for panel in conclusion.panels] == [4, 4, 5, 3]


@pytest.mark.usefixtures("data")
def test_variance_of_batch_means_is_that_of_the_values_over_m():
    rows = batch_size_networks.measure_noise(0, dataclasses.replace(OPTIONS, noise_batches=100)).rows
    assert [row["batch"] for row in rows] == list(BATCHES)
    # 100 units of 100 means each; units see the same images, so their errors do not average out
    assert [row["noise_of_mean"] * row["batch"] for row in rows] == pytest.approx([1.0] * len(rows), rel=0.4)


def test_all_networks_of_the_sweep_see_as_many_images():
    images = {
        batch_size_networks.steps_of(arm, STUDY.options) * arm.batch_size for arm in ARMS.values() if not arm.long
    }
    assert max(images) == 16_000
    # what does not fill a batch
    assert min(images) > 16_000 - max(BATCHES)


def test_running_averages_look_back_over_as_many_images_whatever_the_batch():
    kept = {(1 - batch_size_networks.momentum(batch)) ** (512 / batch) for batch in BATCHES}
    assert max(kept) == pytest.approx(min(kept))
    assert batch_size_networks.momentum(32) == pytest.approx(0.1)


def test_renorm_has_the_proportions_of_its_source():
    layer = batch_size_networks.layer(Arm(RENORMED, 2), 125_000, 3)
    assert (layer.warmup_steps, layer.rmax_steps, layer.dmax_steps) == (5_000, 40_000, 25_000)


def test_normalized_by_batch_changes_nothing_for_good():
    model = batch_size_networks.network(0, OPTIONS, Arm(BN, 4)).eval()
    model[0].train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    with normalized_by_batch(model):
        assert not model(torch.rand(4, 784)).requires_grad
    with pytest.raises(ValueError, match=r"got input size torch.Size\(\[1, 100\]\)"), normalized_by_batch(model):
        model(torch.rand(1, 784))
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model[0][1].track_running_stats


def made_up(change: Callable[[dict[str, Any]], None] = lambda row: None) -> list[dict[str, Any]]:
    """Rows in which everything is as the sources say, with what a test changes."""
    rows = []
    for seed in range(3):
        for name, arm in ARMS.items():
            for rate, lost in ((0.1, 0.0), (0.5, 0.2)):
                accuracy = 0.95 - lost - 0.2 / arm.batch_size * (arm.method != RENORMED) + 0.001 * seed
                accuracy += 0.01 * (arm.method not in (BN, RENORMED))
                row = {"arm": name, "seed": seed, "batch": arm.batch_size, "rate": rate, "images_compared": 2000}
                row |= dict.fromkeys(batch_size.STATISTICS, accuracy)
                row |= {"validation_accuracy": accuracy, "disagreement": (1 + 0.1 * seed) / arm.batch_size}
                row["default_accuracy"] = accuracy - 0.01
                rows.append(row)
        for batch in BATCHES:
            noise = (1 + 0.01 * seed) / batch
            rows.append({"arm": NOISE, "seed": seed, "batch": batch, "noise_of_mean": noise, "noise_of_var": 2 * noise})
    for row in rows:
        change(row)
    return rows


def verdicts(rows: list[dict[str, Any]]) -> dict[str, str]:
    return {claim.name: claim.verdict for claim in STUDY.conclude(rows, STUDY.options).claims}


def test_claims_hold_for_rows_as_the_sources_have_them():
    assert set(verdicts(made_up()).values()) == {REPRODUCED}


@pytest.mark.parametrize(
    ("arms", "change", "refuted"),
    [
        (("BN, batch 2",), {"test_accuracy": 0.96}, {"small-batches-hurt"}),
        (ARMS, {"disagreement": 0.1}, {"modes-disagree"}),
        (ARMS, {"default_accuracy": 0.96}, {"population-beats-averages"}),
        (("Batch Renorm, batch 4",), {"test_accuracy": 0.5}, {"renorm-helps-small-batches"}),
        (("BN, batch 512, long",), {"test_accuracy": 0.99}, {"ghost-generalizes"}),
        ((NOISE,), {"noise_of_mean": 0.1}, {"noise-falls"}),
    ],
)
def test_other_measurements_are_not_reproduced(arms: Any, change: dict[str, float], refuted: set[str]):
    def changed(row: dict[str, Any]) -> None:
        if row["arm"] in arms:
            row.update({field: value * (1 + 0.001 * row["seed"]) for field, value in change.items()})

    found = verdicts(made_up(changed))
    assert {name for name, verdict in found.items() if verdict == NOT_REPRODUCED} == refuted


def test_the_rate_is_chosen_on_validation_images():
    def better_on_test(row: dict[str, Any]) -> None:
        if row["arm"] == "BN, batch 2" and row["rate"] == 0.5:
            row["test_accuracy"] = 1.0

    assert verdicts(made_up(better_on_test))["small-batches-hurt"] == REPRODUCED


def test_modes_that_never_disagree_do_not_make_an_infinite_slope():
    def none(row: dict[str, Any]) -> None:
        if row["arm"].startswith(BN) and row["batch"] == 512:
            row["disagreement"] = 0.0

    claims = {claim.name: claim for claim in STUDY.conclude(made_up(none), STUDY.options).claims}
    assert all(map(math.isfinite, claims["modes-disagree"].values))
