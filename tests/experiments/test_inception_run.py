"""A run of the ImageNet experiments from tiny pictures to claims, stopped and resumed, and what it refuses."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pictures import write_folders

from batchnorm.errors import RunError
from batchnorm.experiments.data.image_set import ImageData
from batchnorm.experiments.data.images import open_images
from batchnorm.experiments.distributed import Team
from batchnorm.experiments.ensemble import (
    VARIATIONS,
    Errors,
    ensemble_claims,
    errors,
    joined,
    network_variations,
    reproduce_ensemble,
)
from batchnorm.experiments.inception import Callbacks, reproduce_inception
from batchnorm.experiments.inception_arms import Options, arm_named
from batchnorm.experiments.inception_task import InceptionTask, Job
from batchnorm.experiments.training import StoppedError, read_rows

OPTIONS = Options(
    data="pictures",
    steps=6,
    evaluations=2,
    size=32,
    width=0.05,
    batch_size=4,
    half_life=6,
    base_learning_rate=0.01,
    arms=("Inception", "BN-x5"),
)
ALONE = Team(torch.device("cpu"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> ImageData:
    return open_images(write_folders(tmp_path_factory.mktemp("pictures")))


def run(folder: Path, data: ImageData, options: Options = OPTIONS, **settings: Any) -> dict[str, Any]:
    return reproduce_inception(options, folder, data, ALONE, workers=0, **settings)


def test_a_run_leaves_its_records(tmp_path: Path, pictures: ImageData):
    folder = tmp_path / "run"
    rows: list[dict[str, Any]] = []
    record = run(folder, pictures, callbacks=Callbacks(on_row=rows.append))
    assert sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")) == [
        "checkpoints", "claims.json", "config.json", "environment.json", "metrics.jsonl", "timing.json",
    ]  # fmt: skip
    assert list(read_rows(folder / "metrics.jsonl")) == rows
    assert [(row["arm"], row["step"]) for row in rows] == [
        ("Inception", 3), ("Inception", 6), ("BN-x5", 3), ("BN-x5", 6),
    ]  # fmt: skip
    assert all(row["skipped_images"] == 0 and 0 <= row["validation_accuracy"] <= 1 for row in rows)
    assert rows[1]["validation_accuracy_population"] is None
    assert 0 <= rows[3]["validation_accuracy_population"] <= 1
    assert [claim["name"] for claim in record["claims"]] == ["steps-BN-x5", "accuracy-BN-x5-over-Inception"]
    assert [arm["arm"] for arm in record["arms"]] == ["Inception", "BN-x5"]
    assert record["base_learning_rate"] is None
    config = json.loads((folder / "config.json").read_text())
    assert (config["options"]["classes"], config["options"]["training_images"]) == (2, 12)
    # a finished run is not trained again
    assert run(folder, pictures, resume=True) == record


def test_a_stopped_run_resumes_bit_for_bit(tmp_path: Path, pictures: ImageData, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("batchnorm.experiments.inception.LOOK_EVERY", 1)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run(whole, pictures)
    seen: list[tuple[str, int]] = []
    for name, step in (("Inception", 2), ("BN-x5", 4)):
        place = (name, step)
        callbacks = Callbacks(
            on_progress=lambda job, step, steps: seen.append((job, step)),
            should_stop=lambda place=place: seen[-1] == place,
        )
        with pytest.raises(StoppedError):
            run(stopped, pictures, resume=stopped.exists(), callbacks=callbacks)
        torch.manual_seed(step)
    run(stopped, pictures, resume=True)
    assert (stopped / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    for name in ("Inception", "BN-x5"):
        file = f"checkpoints/{name}.safetensors"
        assert (stopped / file).read_bytes() == (whole / file).read_bytes()


def test_base_learning_rate_is_the_best_of_a_sweep(tmp_path: Path, pictures: ImageData):
    record = run(tmp_path / "run", pictures, dataclasses.replace(OPTIONS, base_learning_rate=None, arms=("Inception",)))
    sweep = record["base_learning_rate"]
    losses = [candidate["validation_loss"] for candidate in sweep["candidates"]]
    assert len(losses) == 5
    best = sweep["candidates"][losses.index(min(losses))]
    assert sweep["chosen"] == best["learning_rate"] == record["arms"][0]["learning_rate"]
    assert sweep["rule"] == "the lowest validation loss of Inception after 6 steps with seed 0"


def test_run_with_other_settings_is_not_resumed(tmp_path: Path, pictures: ImageData):
    run(tmp_path / "run", pictures)
    with pytest.raises(RunError, match=r"made with width=0\.05, now asked for width=0\.1"):
        run(tmp_path / "run", pictures, dataclasses.replace(OPTIONS, width=0.1), resume=True)


def task(arm: str, data: ImageData, **changes: Any) -> InceptionTask:
    options = dataclasses.replace(OPTIONS, **changes)
    return InceptionTask(Job(arm, arm_named(arm), 0, 6, frozenset({6}), 0.01), options, data, ALONE, 0)


def test_l2_is_of_weights_alone(pictures: ImageData):
    groups = task("BN-x5", pictures).optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [4e-5, 0]
    assert {p.dim() for p in groups[0]["params"]} == {2, 4}
    assert {p.dim() for p in groups[1]["params"]} == {1}


def test_bfloat16_is_used_for_the_network_alone(pictures: ImageData):
    found = task("BN-x5", pictures, precision="bfloat16")
    loss = found.loss(*found.batch(0))
    assert loss.dtype is torch.float32
    loss.backward()
    assert all(p.dtype is torch.float32 for p in found.model.parameters())


@pytest.mark.parametrize("channels_last", [True, False])
def test_memory_format_is_that_of_images_and_weights(pictures: ImageData, channels_last: bool):
    found = task("BN-x5", pictures, channels_last=channels_last)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    images, _ = found.batch(0)
    assert images.is_contiguous(memory_format=layout)
    assert found.model.stages.conv2[1][0].weight.is_contiguous(memory_format=layout)


def test_population_accuracy_leaves_the_running_statistics(pictures: ImageData):
    found = task("BN-x5", pictures)
    found.loss(*found.batch(0))
    before = {name: value.clone() for name, value in found.model.state_dict().items()}
    assert 0 <= found.population_accuracy() <= 1
    assert all(torch.equal(value, before[name]) for name, value in found.model.state_dict().items())


def test_an_ensemble_leaves_its_records(tmp_path: Path, pictures: ImageData):
    options = dataclasses.replace(OPTIONS, steps=2, evaluations=1, half_life=2)
    record = reproduce_ensemble(options, tmp_path / "run", pictures, ALONE, crop_images=3, workers=0)
    assert [network["name"] for network in record["networks"]] == [f"network {i}" for i in range(1, 7)]
    assert record["networks"][5]["variations"] == ["Dropout 10 %", "per-activation BN in the last module"]
    assert record["crop_images"] == 3
    for rates in (*record["networks"], record["ensemble"]):
        assert rates["single_top5"] == rates["crops_top5"] == 0  # of two classes
        assert 0 <= rates["crops_top1"] <= 1
    assert [claim["name"] for claim in record["claims"]] == [
        "crops-top1", "crops-top5", "ensemble-top1", "ensemble-top5",
    ]  # fmt: skip


def test_an_ensemble_can_be_stopped_while_it_is_evaluated(tmp_path: Path, pictures: ImageData):
    options = dataclasses.replace(OPTIONS, steps=1, evaluations=1, half_life=1)
    rows: list[dict[str, Any]] = []
    callbacks = Callbacks(on_row=rows.append, should_stop=lambda: len(rows) == 6)
    with pytest.raises(StoppedError):
        reproduce_ensemble(options, tmp_path / "run", pictures, ALONE, crop_images=2, workers=0, callbacks=callbacks)
    record = reproduce_ensemble(options, tmp_path / "run", pictures, ALONE, crop_images=2, workers=0, resume=True)
    assert len(record["networks"]) == 6


def test_image_that_cannot_be_read_counts_for_nobody():
    labels = torch.tensor([0, 1, 2])
    right, wrong = torch.eye(3), torch.eye(3).flip(1)
    predictions = [torch.stack([wrong, right]), torch.stack([right, right])]
    for prediction in predictions:
        prediction[:, 1] = torch.nan
    found = Errors(predictions, labels)
    assert found.images == 2
    assert found.mean(0, 0).tolist() == [0.5, 0.5]
    assert found.mean(1, 0).tolist() == [0.0, 0.0]


def test_what_processes_predicted_is_put_in_order():
    whole = torch.arange(30.0).view(2, 5, 3)
    assert torch.equal(joined((whole[:, 0::2], whole[:, 1::2]), 5), whole)


def test_variations_are_those_of_section_4_3():
    networks = [OPTIONS.network(arm_named("BN-x30"), 10, **network_variations(v, OPTIONS)) for v in VARIATIONS]
    assert [network.dropout.p for network in networks] == [0, 0.05, 0.1, 0, 0.05, 0.1]
    scales = [network.stages.conv2[0][0].weight.std().item() for network in networks]
    assert min(scales[0], scales[4]) > 1.3 * max(scales[1], scales[2], scales[3], scales[5])


def test_errors_count_guesses():
    probabilities = torch.eye(7)[[0, 1, 2]] + torch.linspace(0.2, 0, 7)
    top1, top5 = errors(probabilities, torch.tensor([0, 2, 6]))
    assert top1.tolist() == [0, 1, 1]
    assert top5.tolist() == [0, 0, 1]


def test_ensemble_is_better_where_every_image_says_so():
    class Known:
        ensemble = ((torch.zeros(50),) * 2,) * 2

        def mean(self, crops: int, top: int) -> torch.Tensor:
            return torch.tensor([1.0, 0.0] * 25) if crops else torch.ones(50)

    claims = ensemble_claims(Known())
    assert [claim.verdict for claim in claims] == ["reproduced"] * 4
    assert claims[0].mean == pytest.approx(50)
