"""The claims of section 4.2 on rows whose verdict is known."""

import math
from typing import Any

import pytest

from batchnorm.experiments.claims import NOT_COMPARABLE, NOT_REPRODUCED, REPRODUCED, Claim
from batchnorm.experiments.inception_arms import PAPER_ARMS
from batchnorm.experiments.inception_claims import Runs, best, inception_claims, steps_to

STEPS = (100, 200, 300, 400, 500)


def network(arm: str, accuracies: tuple[float, ...], seed: int = 0, loss: float | None = 1.0) -> list[dict[str, Any]]:
    return [
        {"arm": arm, "seed": seed, "step": step, "validation_accuracy": accuracy, "validation_loss": loss}
        for step, accuracy in zip(STEPS, accuracies, strict=True)
    ]


PLAIN = network("Inception", (0.1, 0.2, 0.3, 0.39, 0.4))


def judged(*networks: list[dict[str, Any]], images: int = 5000, seeds: int = 1) -> dict[str, Claim]:
    runs = Runs([row for rows in networks for row in rows], range(seeds), images)
    return {claim.name: claim for claim in inception_claims(runs, num_classes=100)}


def test_each_claim_needs_its_arms():
    assert judged(PLAIN) == {}
    assert list(judged(PLAIN, network("BN-x30", (0.1,) * 5))) == ["steps-BN-x30", "accuracy-BN-x30-over-Inception"]
    assert list(judged(network("BN-x5", (0.1,) * 5), network("BN-x30", (0.2,) * 5))) == ["accuracy-BN-x30-over-BN-x5"]
    everything = judged(PLAIN, *(network(arm, (0.1,) * 5) for arm in PAPER_ARMS if arm != "Inception"))
    assert len(everything) == 3 + 4 + 1


def test_network_that_is_faster_whatever_the_sampling_error_reproduces_the_claim():
    claim = judged(PLAIN, network("BN-x5", (0.3, 0.5, 0.5, 0.5, 0.5)))["steps-BN-x5"]
    assert claim.verdict == REPRODUCED
    assert claim.values == [0.4]
    assert (claim.low, claim.high) == (0.4, 0.4)
    assert claim.paper == "0.068 (2.1 of 31 million steps)"
    assert claim.detail == "Inception 40.00% at step 500, BN-x5 at 200"


def test_error_of_the_validation_images_counts_with_one_seed():
    # 0.405 is above the plain network's 0.4, but not above what 500 images allow it to be
    rows = network("BN-x5", (0.1, 0.405, 0.405, 0.405, 0.405))
    few, many = (judged(PLAIN, rows, images=images)["steps-BN-x5"] for images in (500, 500_000))
    assert (few.mean, few.high, few.verdict) == (0.4, 1.0, NOT_REPRODUCED)
    assert (many.mean, many.high, many.verdict) == (0.4, 0.4, REPRODUCED)


def test_network_that_never_gets_there_counts_with_its_whole_training():
    claim = judged(PLAIN, network("BN-Baseline", (0.1, 0.2, 0.2, 0.2, 0.2)))["steps-BN-Baseline"]
    assert (claim.values, claim.verdict) == ([1.0], NOT_REPRODUCED)
    assert claim.detail.endswith("BN-Baseline at none")


@pytest.mark.parametrize("diverged", ["Inception", "BN-x30"])
def test_diverged_network_cannot_be_compared(diverged: str):
    rows = {"Inception": PLAIN, "BN-x30": network("BN-x30", (0.5,) * 5)}
    rows[diverged] = network(diverged, (0.01,) * 5, loss=None)
    assert {claim.verdict for claim in judged(*rows.values()).values()} == {NOT_COMPARABLE}


def test_several_seeds_are_compared_in_pairs():
    networks = [
        network(arm, tuple(accuracy + 0.01 * seed for accuracy in accuracies), seed)
        for seed in range(3)
        for arm, accuracies in (("Inception", (0.1, 0.2, 0.3, 0.39, 0.4)), ("BN-x30", (0.2, 0.3, 0.45, 0.46, 0.47)))
    ]
    claims = judged(*networks, seeds=3)
    claim = claims["accuracy-BN-x30-over-Inception"]
    assert claim.values == pytest.approx([7.0] * 3)
    assert claim.verdict == REPRODUCED
    assert claim.paper == "+2.6 (74.8 % against 72.2 %)"
    assert claims["steps-BN-x30"].values == pytest.approx([0.6] * 3)


def test_difference_within_the_error_of_the_images_reproduces_nothing():
    rows = network("BN-x30", (0.1, 0.2, 0.3, 0.39, 0.405))
    claim = judged(PLAIN, rows)["accuracy-BN-x30-over-Inception"]
    assert claim.verdict == NOT_REPRODUCED
    half = 100 * 1.96 * math.sqrt((0.4 * 0.6 + 0.405 * 0.595) / 5000)
    assert claim.high == pytest.approx(0.5 + half)


@pytest.mark.parametrize(("accuracy", "verdict"), [(0.012, NOT_REPRODUCED), (0.2, REPRODUCED)])
def test_sigmoids_are_judged_against_chance(accuracy: float, verdict: str):
    rows = network("BN-x5-Sigmoid", (accuracy,) * 5)
    claim = judged(PLAIN, rows)["sigmoid"]
    assert claim.verdict == verdict
    assert claim.detail == "without BN not trained in this run"
    claim = judged(PLAIN, rows, network("Inception-Sigmoid", (0.01,) * 5))["sigmoid"]
    assert claim.detail == "without BN 1.00 %"


def test_step_0_is_not_where_a_level_is_reached():
    rows = [{"step": 0, "validation_accuracy": 0.5, "validation_loss": 1.0}, *PLAIN]
    assert steps_to(rows, 0.15) == 200
    assert best(rows) == 0.5
