"""Section 3.3 on one layer and on tiny networks, and its claims from made-up rows."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from batchnorm.experiments import scale
from batchnorm.experiments.claims import NOT_COMPARABLE, NOT_REPRODUCED, REPRODUCED
from batchnorm.experiments.data.mnist import Mnist
from batchnorm.experiments.learning_rates import at_rate, split_rate
from batchnorm.experiments.scale import BN, DECAYED, FIELDS, IDENTITIES, PLAIN, RATE, STUDY, scaled
from batchnorm.experiments.study import Place

SCALES = (0.1, 1.0, 10.0)
OPTIONS = dataclasses.replace(STUDY.options, steps=40, rates=(RATE, 2.0), scales=SCALES, evaluations=2)


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch, small_mnist: Mnist) -> None:
    monkeypatch.setattr(scale, "bundled_mnist", lambda: small_mnist)


@pytest.mark.usefixtures("data")
def test_identities_hold_to_rounding_without_eps():
    rows = list(scale.compare(0.0, 0, OPTIONS))
    assert {row["factor"] for row in rows} == {s * factor for s in (1, -1) for factor in scale.FACTORS}
    assert max(row[field] for row in rows for field in (*FIELDS, "along_weight")) < 1e-13


@pytest.mark.usefixtures("data")
def test_eps_breaks_the_identities_the_more_the_smaller_the_weights():
    rows = [row for row in scale.compare(1e-5, 0, OPTIONS) if row["factor"] > 0]
    for field in FIELDS:
        values = [row[field] for row in rows]
        assert values == sorted(values, reverse=True)
        assert values[0] > 0.1 > 1e-8 > values[-1]


@pytest.mark.usefixtures("data")
def test_weights_grow_by_the_squares_of_the_steps(tmp_path: Path):
    first, *_, last = scale.run(at_rate(scaled(BN, 1.0), RATE), 0, OPTIONS, Place("bn", tmp_path)).rows
    assert last["size"] ** 2 - first["size"] ** 2 == pytest.approx(last["stepped"], rel=0.02)
    assert last["effective_rate"] == pytest.approx(RATE / last["size"] ** 2)


@pytest.mark.usefixtures("data")
def test_every_arm_runs_and_scales_only_hidden_weights(tmp_path: Path):
    options = dataclasses.replace(OPTIONS, steps=2, rates=(RATE,))
    runs = {arm: scale.run(arm, 0, options, Place(arm, tmp_path)).rows for arm in STUDY.arms(options)}
    assert len(runs) == len(IDENTITIES) + 3 * len(SCALES)
    for kind in (PLAIN, BN, DECAYED):
        sizes = [runs[at_rate(scaled(kind, factor), RATE)][0]["size"] for factor in SCALES]
        assert sizes == pytest.approx([sizes[1] * factor for factor in SCALES])
    ends = [runs[at_rate(scaled(kind, 1.0), RATE)][-1]["size"] for kind in (DECAYED, BN)]
    assert ends[0] < ends[1]
    claims = STUDY.conclude([{"arm": arm, "seed": 0, **row} for arm in runs for row in runs[arm]], options).claims
    assert {claim.verdict for claim in claims} == {NOT_COMPARABLE}


def made_up(change: Callable[[dict[str, Any]], None] = lambda row: None) -> list[dict[str, Any]]:
    """Rows in which everything is as the sources say, with what a test changes."""
    rows = []
    for arm in STUDY.arms(OPTIONS):
        for seed in (0, 1, 2):
            if arm in IDENTITIES:
                deviation = 1e-15 * (1 + seed) + IDENTITIES[arm]
                fields = dict.fromkeys((*FIELDS, "along_weight"), deviation)
                rows += [{"arm": arm, "seed": seed, "factor": factor, **fields} for factor in (-10.0, 0.1, 10.0)]
                continue
            kind, factor = split_rate(arm)[0].split(", scale ")
            accuracy = 0.9 - (0.3 if kind == PLAIN else 0.03) * (factor != "1") + 0.01 * seed
            start = float(factor)
            end = 1.0 + 0.01 * seed if kind == DECAYED else start + 0.5
            for step, size in ((0, start), (40, end)):
                measured = {"size": size, "stepped": size**2 - start**2, "effective_rate": RATE / size**2}
                rows.append({"arm": arm, "seed": seed, "step": step, "test_accuracy": accuracy, **measured})
    for row in rows:
        change(row)
    return rows


def verdicts(rows: list[dict[str, Any]]) -> dict[str, str]:
    return {claim.name: claim.verdict for claim in scale.conclude(rows, OPTIONS).claims}


def test_claims_hold_for_rows_as_the_sources_have_them():
    assert set(verdicts(made_up()).values()) == {REPRODUCED}


@pytest.mark.parametrize(
    ("field", "value", "refuted"),
    [
        ("output", 1e-6, {"same-output", "negative"}),
        ("grad_weight", 1e-6, {"inverse-gradient", "negative"}),
        ("along_weight", 1e-6, {"orthogonal"}),
        ("stepped", 0.1, {"weights-grow"}),
        ("size", 2.0, {"weights-grow", "effective-rate", "scale-forgotten"}),
        ("test_accuracy", 0.9, {"resilient-one-rate", "resilient-best-rates"}),
    ],
)
def test_other_measurements_are_not_reproduced(field: str, value: float, refuted: set[str]):
    def change(row: dict[str, Any]) -> None:
        if field in row and row.get("step") != 0:
            row[field] = value * (1 + 0.001 * row["seed"])

    found = verdicts(made_up(change))
    assert {name for name, verdict in found.items() if verdict == NOT_REPRODUCED} == refuted


def test_diverged_weights_are_not_comparable():
    def diverge(row: dict[str, Any]) -> None:
        if row["arm"] == at_rate(scaled(BN, 1.0), RATE) and row["step"] == 40:
            row["size"] = None

    found = verdicts(made_up(diverge))
    names = {name for name, verdict in found.items() if verdict == NOT_COMPARABLE}
    assert names == {"weights-grow", "effective-rate", "scale-forgotten"}
