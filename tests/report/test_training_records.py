"""Records of the ImageNet experiments are read whole, or refused with one line that says which and where."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from synthetic import write
from synthetic_training import PAPER_ARMS, STEPS, accuracy, read_rows, row, write_ensemble, write_inception, write_rows

from batchnorm.errors import RunError
from batchnorm.report import load_run, write_report

MISSING = object()
ESCAPE = "\x1b[2J<b>\n"


@pytest.fixture
def inception_folder(tmp_path: Path) -> Path:
    return write_inception(tmp_path / "inception")


@pytest.fixture
def ensemble_folder(tmp_path: Path) -> Path:
    return write_ensemble(tmp_path / "ensemble")


def change(folder: Path, name: str, place: tuple[Any, ...], value: Any) -> None:
    """Replace, or with MISSING remove, one field of a record: ``place`` leads to it."""
    record = json.loads((folder / name).read_text())
    inner = record
    for step in place[:-1]:
        inner = inner[step]
    if value is MISSING:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    write(folder, name, record)


def refusal(folder: Path) -> str:
    with pytest.raises(RunError) as raised:
        write_report(folder)
    line = str(raised.value)
    assert "\n" not in line
    assert "\x1b" not in line
    assert len(line) < 600
    assert not (folder / "report.html").exists()
    return line


def test_inception_run_holds_what_the_files_say(inception_folder: Path) -> None:
    run = load_run(inception_folder)
    assert list(run.names) == list(PAPER_ARMS)
    assert (run.setting.preset, run.setting.data, run.setting.width) == ("small", "tiny-imagenet-100", 0.5)
    assert len(run.evaluations) == 5 * len(STEPS)
    first = run.evaluations[0]
    assert (first.arm, first.seed, first.step) == ("Inception", 0, 250)
    assert first.accuracy == accuracy("Inception", 0, 250)
    assert math.isnan(first.accuracy_population)
    assert run.arms[0].changes == []
    assert run.baseline_accuracy == run.arms[0].best_accuracy
    assert run.arms[4].steps_to_baseline is None
    assert run.base_learning_rate.chosen == 0.02
    assert math.isnan(run.base_learning_rate.candidates[3][1])
    assert [timing.arm for timing in run.timing] == list(PAPER_ARMS)


def test_ensemble_holds_what_the_files_say(ensemble_folder: Path) -> None:
    run = load_run(ensemble_folder)
    assert [network.name for network in run.networks] == [f"network {i}" for i in range(1, 7)]
    assert run.networks[2].variations == ["Dropout 10 %", "per-activation BN in the last module"]
    assert run.networks[1].errors.single_top1 == 0.522
    assert run.ensemble.crops_top5 == pytest.approx(0.18)
    assert run.crop_images == 500
    assert run.base_learning_rate is None


def test_a_diverged_network_has_no_accuracy_although_it_hits_labels(tmp_path: Path) -> None:
    run = load_run(write_inception(tmp_path / "run", diverged={"BN-x30": 1000}))
    of_arm = [row for row in run.evaluations if row.arm == "BN-x30"]
    assert [math.isnan(row.accuracy) for row in of_arm] == [row.step >= 1000 for row in of_arm]
    assert math.isnan(of_arm[-1].top5)


@pytest.mark.parametrize(
    ("place", "value", "line"),
    [
        (("preset",), MISSING, "options: no field 'preset'; expected str"),
        (("preset",), 3, "options: 'preset' is 3; expected str"),
        (("data",), ["a"], "options: 'data' is [\"a\"]; expected str"),
        (("classes",), "many", "options: 'classes' is many; expected int"),
        (("steps",), -1, "options: 'steps' is -1; expected a whole number from 0"),
        (("size",), 64.5, "options: 'size' is 64.5; expected int"),
        (("width",), math.nan, "options: 'width' is NaN; expected a finite number"),
        (("width",), None, "options: 'width' is null; expected int or float"),
        (("batch_size",), True, "options: 'batch_size' is true; expected int"),
        (("training_images",), MISSING, "options: no field 'training_images'"),
        (("validation_images",), 10**30, "expected a whole number from 0"),
    ],
)
@pytest.mark.parametrize("kind", ["inception", "ensemble"])
def test_wrong_option_is_named(tmp_path: Path, kind: str, place: tuple[Any, ...], value: Any, line: str) -> None:
    folder = (write_inception if kind == "inception" else write_ensemble)(tmp_path / "run")
    change(folder, "config.json", ("options", *place), value)
    assert line in refusal(folder)


@pytest.mark.parametrize(
    ("place", "value", "line"),
    [
        (("arms",), MISSING, "no field 'arms'; expected list"),
        (("arms",), {}, "'arms' is {}; expected list"),
        (("arms",), [], "no arms; expected at least one"),
        (("arms", 1), "BN", "'arms' has BN in place 1; expected objects"),
        (("arms", 1, "arm"), None, "arms: 'arm' is null; expected str"),
        (("arms", 1, "arm"), "Inception", "Inception is there twice; expected every arm once"),
        (("arms", 1, "changes"), "no Dropout", "arm BN-Baseline: 'changes' is no Dropout; expected list"),
        (("arms", 1, "changes"), [1], "arm BN-Baseline: 'changes' has 1; expected texts"),
        (("arms", 1, "learning_rate"), None, "arm BN-Baseline: 'learning_rate' is null"),
        (("arms", 1, "weight_decay"), math.nan, "'weight_decay' is NaN; expected a finite number"),
        (("arms", 1, "dropout"), MISSING, "no field 'dropout'"),
        (("arms", 1, "parameters"), 1.5, "'parameters' is 1.5; expected int"),
        (("arms", 1, "steps_to_baseline"), "never", "'steps_to_baseline' is never; expected int"),
        (("arms", 1, "steps_to_baseline"), MISSING, "no field 'steps_to_baseline'"),
        (("arms", 1, "best_accuracy"), 45.2, "'best_accuracy' is 45.2; expected a fraction from 0 to 1, or null"),
        (("arms", 1, "best_step"), -250, "'best_step' is -250; expected a whole number from 0"),
        (("arms", 1, "arm"), "other", "line 33: 'arm' is BN-Baseline; expected an arm of claims.json"),
        (("baseline_accuracy",), 39, "'baseline_accuracy' is 39.0; expected a fraction"),
        (("baseline_accuracy",), MISSING, "no field 'baseline_accuracy'"),
        (("base_learning_rate",), MISSING, "no field 'base_learning_rate'; expected dict or null"),
        (("base_learning_rate",), 0.02, "'base_learning_rate' is 0.02; expected dict or null"),
        (("base_learning_rate", "candidates"), [3], "base_learning_rate: 'candidates' has 3 in place 0"),
        (("base_learning_rate", "candidates", 0, "learning_rate"), "x", "base_learning_rate: 'learning_rate' is x"),
        (("base_learning_rate", "chosen"), math.inf, "base_learning_rate: 'chosen' is Infinity"),
        (("base_learning_rate", "rule"), None, "base_learning_rate: 'rule' is null; expected str"),
        (("verdict",), ESCAPE, "expected reproduced or not reproduced or not comparable"),
        (("arms", 1, "parameters"), ESCAPE, "'parameters' is \\x1b[2J<b>; expected int"),
    ],
)
def test_wrong_claims_of_inception_are_named(
    inception_folder: Path, place: tuple[Any, ...], value: Any, line: str
) -> None:
    change(inception_folder, "claims.json", place, value)
    assert line in refusal(inception_folder)


@pytest.mark.parametrize(
    ("place", "value", "line"),
    [
        (("networks",), MISSING, "no field 'networks'"),
        (("networks",), [], "no arms; expected at least one"),
        (("networks", 0), 1, "'networks' has 1 in place 0; expected objects"),
        (("networks", 0, "name"), 1, "networks: 'name' is 1; expected str"),
        (("networks", 0, "variations"), [None], "network 1: 'variations' has null; expected texts"),
        (("networks", 0, "single_top1"), 52, "network 1: 'single_top1' is 52.0; expected a fraction"),
        (("networks", 0, "crops_top5"), MISSING, "network 1: no field 'crops_top5'"),
        (("ensemble",), None, "'ensemble' is null; expected dict"),
        (("ensemble", "crops_top1"), "low", "ensemble: 'crops_top1' is low"),
        (("crop_images",), 500.0, "'crop_images' is 500.0; expected int"),
        (("base_learning_rate",), [], "'base_learning_rate' is []; expected dict or null"),
    ],
)
def test_wrong_claims_of_an_ensemble_are_named(
    ensemble_folder: Path, place: tuple[Any, ...], value: Any, line: str
) -> None:
    change(ensemble_folder, "claims.json", place, value)
    assert line in refusal(ensemble_folder)


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("arm", ESCAPE, "line 3: 'arm' is \\x1b[2J<b>; expected an arm of claims.json"),
        ("arm", None, "line 3: 'arm' is null; expected str"),
        ("seed", -1, "line 3: 'seed' is -1"),
        ("step", 2.5, "line 3: 'step' is 2.5; expected int"),
        ("step", 250, "seed 0 of arm Inception has a step twice"),
        ("validation_accuracy", 1.01, "line 3: 'validation_accuracy' is 1.01; expected a fraction"),
        ("validation_accuracy", "high", "line 3: 'validation_accuracy' is high"),
        ("validation_top5", -0.1, "line 3: 'validation_top5' is -0.1"),
        ("validation_top5", MISSING, "line 3: no field 'validation_top5'"),
        ("validation_loss", "nan", "line 3: 'validation_loss' is nan; expected int or float or null"),
        ("validation_loss", MISSING, "line 3: no field 'validation_loss'"),
        ("training_loss", [], "line 3: 'training_loss' is []"),
        ("learning_rate", None, "line 3: 'learning_rate' is null"),
        ("learning_rate", math.nan, "line 3: 'learning_rate' is NaN; expected a finite number"),
        ("skipped_images", -1, "line 3: 'skipped_images' is -1"),
        ("validation_accuracy_population", 7, "line 3: 'validation_accuracy_population' is 7"),
    ],
)
def test_wrong_row_is_named(inception_folder: Path, name: str, value: Any, line: str) -> None:
    rows = read_rows(inception_folder)
    if value is MISSING:
        del rows[2][name]
    else:
        rows[2][name] = value
    write_rows(inception_folder, rows)
    assert line in refusal(inception_folder)


def test_arm_without_rows_is_named(inception_folder: Path) -> None:
    write_rows(inception_folder, [row for row in read_rows(inception_folder) if row["arm"] != "BN-x5"])
    assert "metrics.jsonl: no row of arm BN-x5; expected rows of every arm in claims.json" in refusal(inception_folder)


def test_unfinished_seed_is_named(tmp_path: Path) -> None:
    folder = write_inception(tmp_path / "run", arms=("Inception", "BN-x5"), seeds=(0, 1))
    write_rows(folder, [row for row in read_rows(folder) if (row["seed"], row["step"]) != (1, 8000)])
    line = "seed 1 of arm Inception has 31 evaluations up to step 7750; expected 32 up to step 8000"
    assert line in refusal(folder)


@pytest.mark.parametrize(
    ("place", "value", "line"),
    [
        (("arms", "BN-x5"), 3, "arm BN-x5: 3; expected an object"),
        (("arms", "BN-x5", "step_microseconds", "batch"), None, "arm BN-x5: 'batch' is null"),
        (("arms", "BN-x5", "networks"), MISSING, "arm BN-x5: no field 'networks'"),
        (("training_seconds",), math.nan, "'training_seconds' is NaN"),
    ],
)
def test_wrong_timing_is_named(inception_folder: Path, place: tuple[Any, ...], value: Any, line: str) -> None:
    change(inception_folder, "timing.json", place, value)
    assert line in refusal(inception_folder)


@pytest.mark.parametrize("name", ["config.json", "environment.json", "metrics.jsonl", "claims.json", "timing.json"])
@pytest.mark.parametrize("data", [None, b"{", b"\xff", b"[]"])
@pytest.mark.parametrize("kind", ["inception", "ensemble"])
def test_missing_or_garbled_record_is_named(tmp_path: Path, kind: str, name: str, data: bytes | None) -> None:
    folder = (write_inception if kind == "inception" else write_ensemble)(tmp_path / "run")
    if data is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(data)
    assert re.search(rf"{re.escape(name)}: .*(missing|not JSON|not a JSON object|not an object)", refusal(folder))


def test_hostile_arm_is_not_quoted_raw(inception_folder: Path) -> None:
    change(inception_folder, "claims.json", ("arms", 0, "arm"), ESCAPE * 1000)
    assert "line 1: 'arm' is Inception" in refusal(inception_folder)
    write_rows(inception_folder, [row(ESCAPE * 1000, 0, step) for step in (250, 250)])
    change(
        inception_folder,
        "claims.json",
        ("arms",),
        [json.loads((inception_folder / "claims.json").read_text())["arms"][0]],
    )
    assert "has a step twice" in refusal(inception_folder)
