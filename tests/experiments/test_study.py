"""What all studies share: rows to lines and claims, names of jobs, run folders that resume."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from batchnorm.experiments import outside_gradient
from batchnorm.experiments.catalogue import EXPERIMENTS
from batchnorm.experiments.mnist_network import MnistNetwork, mlp
from batchnorm.experiments.study import (
    Line,
    Place,
    Study,
    claim,
    job_name,
    line,
    reproduce_study,
    study_named,
    values_at_end,
)
from batchnorm.experiments.training import StoppedError

ROWS = [
    {"arm": "BN", "seed": seed, "step": step, "loss": loss}
    for seed, losses in ((0, [2.0, 1.0]), (1, [4.0, None]))
    for step, loss in enumerate(losses)
]
WORDS = {"source": "s", "rule": "the loss", "unit": "nats", "detail": ""}


def test_line_is_the_mean_with_a_band_from_the_lowest_to_the_highest():
    found = line(ROWS[:1] + ROWS[2:3], "BN", "loss")
    assert found == Line("BN", [0], [3.0], [2.0], [4.0])
    assert line(ROWS[:2], "BN", "loss", name="short") == Line("short", [0, 1], [2.0, 1.0])


def test_diverged_seed_leaves_no_mean():
    assert math.isnan(line(ROWS, "BN", "loss").y[1])
    assert values_at_end(ROWS, "BN", "loss")[0] == 1.0
    assert math.isnan(values_at_end(ROWS, "BN", "loss")[1])


@pytest.mark.parametrize(
    ("values", "bound", "verdict"),
    [
        ([1.0, 1.1, 1.2], {"above": 0.5}, "reproduced"),
        ([1.0, 1.1, 1.2], {"below": 0.5}, "not reproduced"),
        ([0.0, 1.0, 2.0], {"above": 0.0}, "not reproduced"),
        ([1.0], {"above": 0.0}, "not comparable"),
        ([1.0, math.nan], {"above": 0.0}, "not comparable"),
    ],
)
def test_claim_is_judged_by_the_interval_over_seeds(values: list[float], bound: dict[str, float], verdict: str):
    found = claim("loss", "The loss is high.", values, **WORDS, **bound)
    assert found.verdict == verdict
    side, value = next(iter(bound.items()))
    assert found.rule == f"the loss; the 95 % interval over seeds lies {side} {value:g}"


def test_job_names_are_file_names():
    assert (
        job_name("network, learning rate 0.5, outside / inside", 3) == "network-learning-rate-0.5-outside-inside-seed3"
    )


@pytest.mark.parametrize("name", [entry.name for entry in EXPERIMENTS if entry.module])
def test_study_says_what_it_leaves_open_and_names_its_jobs_apart(name: str):
    study = study_named(name)
    assert isinstance(study, Study)
    assert study.notes
    arms = list(study.arms(study.options))
    assert len({job_name(arm, 0) for arm in arms}) == len(arms)
    assert len(study.options.seeds) >= 3
    quick = dataclasses.replace(study.options, **study.quick)
    assert quick.steps <= study.options.steps
    assert len(quick.seeds) == 2


def test_networks_of_one_seed_begin_alike_whatever_stands_between():
    plain = mlp(3, lambda n_in, n_out: nn.Sequential(nn.Linear(n_in, n_out), nn.ReLU()), hidden=(8, 4))
    bn = mlp(
        3, lambda n_in, n_out: nn.Sequential(nn.Linear(n_in, n_out, bias=False), nn.BatchNorm1d(n_out)), hidden=(8, 4)
    )
    for one, other in ((plain[0][0], bn[0][0]), (plain[1][0], bn[1][0]), (plain[2], bn[2])):
        assert torch.equal(one.weight, other.weight)
    assert plain[0][0].bias.eq(0).all()


def test_stopped_network_goes_on_with_the_same_bits(small_mnist, tmp_path: Path):
    def network() -> MnistNetwork:
        model = mlp(0, lambda n_in, n_out: nn.Sequential(nn.Linear(n_in, n_out), nn.BatchNorm1d(n_out)), hidden=(8,))
        return MnistNetwork(model, small_mnist, seed=0, steps=120, learning_rate=0.1, momentum=0.9, weight_decay=1e-3)

    whole, resumed = network(), network()
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    rows = whole.train(Place("bn", tmp_path / "a")).rows
    with pytest.raises(StoppedError):
        resumed.train(Place("bn", tmp_path / "b", should_stop=lambda: True))
    again = network()
    assert again.train(Place("bn", tmp_path / "b")).rows == rows
    assert all(map(torch.equal, again.model.state_dict().values(), whole.model.state_dict().values()))


def test_run_folder_is_complete_and_finished_runs_are_not_run_again(tmp_path: Path):
    options = dataclasses.replace(outside_gradient.STUDY.options, steps=4, seeds=(0, 1), evaluations=2)
    record = reproduce_study("outside-gradient", options, tmp_path / "run", workers=2)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names >= {"config.json", "environment.json", "metrics.jsonl", "timing.json", "claims.json"}
    assert "work" not in names
    assert record["arms"] == outside_gradient.arms(options)
    assert record["source"] == "Ioffe & Szegedy 2015, section 2"
    before = (tmp_path / "run/claims.json").stat().st_mtime_ns
    assert reproduce_study("outside-gradient", options, tmp_path / "run", resume=True) == record
    assert (tmp_path / "run/claims.json").stat().st_mtime_ns == before
