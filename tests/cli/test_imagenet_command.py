"""Options of ``batchnorm reproduce inception`` and ``ensemble``, and whole runs of both on tiny pictures."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from pictures import write_folders

from batchnorm.cli import options, reproduce_imagenet
from batchnorm.cli.main import run
from batchnorm.experiments.inception_arms import PAPER_ARMS, PRESETS, Options
from batchnorm.experiments.run_folder import open_run
from batchnorm.experiments.training import StoppedError
from batchnorm.files import write_json
from commands import run_command

RECORD = {"verdict": "not reproduced", "claims": []}
TIMING = {"training_seconds": 1.0, "arms": {"BN-x5": {"networks": 1, "steps_per_second": 12.0}}}
TINY = ("--steps", 2, "--batch-size", 4, "--learning-rate", 0.01, "--workers", 0, "--threads", 1)


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return write_folders(tmp_path / "pictures")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the commands asked of the experiments, which only make the folder of a run that was stopped."""
    calls = []

    def experiment(chosen: Options, folder: Path, data: Any, team: Any, **arguments: Any) -> dict[str, Any]:
        calls.append({"options": chosen, "folder": folder, "data": data, "team": team, **arguments})
        config = {"schema_version": 1, "experiment": "inception", "options": {**vars(chosen), "classes": 2}}
        with open_run(folder, config, resume=arguments["resume"], force=arguments["force"]):
            write_json(folder / "timing.json", TIMING)
            return RECORD

    monkeypatch.setattr(reproduce_imagenet, "reproduce_inception", experiment)
    monkeypatch.setattr(reproduce_imagenet, "reproduce_ensemble", experiment)
    monkeypatch.setattr(options, "write_report", lambda folder: [folder / "report.html"])
    return calls


def command(*arguments: object, name: str = "inception") -> int:
    return run(["reproduce", name, *map(str, arguments)])


@pytest.mark.parametrize("name", ["inception", "ensemble"])
def test_help_states_what_happens_without_options(name: str):
    text = " ".join(CliRunner().invoke(getattr(reproduce_imagenet, name), ["--help"]).output.split())
    for words in (
        "default: MNIST",
        "default: small",
        "default: 32",
        "default: 8000; paper: 31 million",
        "paper: 0.0015",
    ):
        assert words in text, words


def test_defaults_are_those_of_the_preset(calls: list[dict[str, Any]], pictures: Path):
    assert command("--data", pictures) == 1
    (call,) = calls
    assert call["options"] == Options(data="pictures", **PRESETS["small"])
    assert call["options"].arms == tuple(PAPER_ARMS)
    assert (call["workers"], call["resume"], call["force"]) == (1, False, False)
    assert call["folder"].name.startswith("inception-2")
    assert call["data"].classes == ["cat", "dog"]


def test_mnist_stands_in_and_the_command_says_so(calls: list[dict[str, Any]], capfd: pytest.CaptureFixture[str]):
    command()
    assert (calls[0]["options"].data, calls[0]["options"].size) == ("mnist", 32)
    assert "without --data the bundled MNIST stands in for ImageNet" in capfd.readouterr().err


def test_options_reach_the_experiment(calls: list[dict[str, Any]], pictures: Path):
    command(
        "--data", pictures, "--arms", "Inception,BN-x5 without decay", "--seeds", 2, "--steps", 100, "--batch-size", 8,
        "--accumulate", 3, "--learning-rate", 0.02, "--precision", "bfloat16", "--contiguous", "--workers", 2,
        "--out", "here",
    )  # fmt: skip
    (call,) = calls
    assert call["options"] == Options(
        data="pictures", arms=("Inception", "BN-x5 without decay"), seeds=(0, 1), steps=100, half_life=100,
        batch_size=8, accumulate=3, base_learning_rate=0.02, precision="bfloat16", channels_last=False,
    )  # fmt: skip
    assert (call["workers"], call["folder"]) == (2, Path("here"))


def test_preset_of_the_paper_needs_no_sweep(calls: list[dict[str, Any]], pictures: Path):
    command("--data", pictures, "--preset", "paper")
    assert calls[0]["options"] == Options(preset="paper", data="pictures", **PRESETS["paper"])
    assert calls[0]["options"].base_learning_rate == 0.0015


@pytest.mark.parametrize("extra", [[], ["--batch-size", "4"]])
def test_resume_takes_the_options_of_the_run(calls: list[dict[str, Any]], pictures: Path, extra: list[str]):
    command("--data", pictures, "--out", "here", "--batch-size", 4, "--arms", "BN-x5", "--quick")
    command("--data", pictures, "--out", "here", "--resume", *extra)
    assert calls[1]["options"] == calls[0]["options"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arms", "BN-x6"], "there is no arm 'BN-x6': expected some of Inception, BN-Baseline"),
        (["--data", "nowhere"], "nowhere: does not exist: expected train/CLASS"),
        (["--resume", "--force"], "--resume continues a run and --force deletes it"),
        (["--steps", "0"], "0 is not in the range x>=1"),
        (["--learning-rate", "nan"], "nan is not a finite number"),
        (["--batch-size", "1"], "1 is not in the range x>=2"),
        (["--resume"], "runs: no run of inception to resume there"),
        (["--device", "tpu"], "'tpu' is not one of 'cpu', 'cuda'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_options_are_refused_in_one_line(
    arguments: list[str], message: str, calls: list[dict[str, Any]], capfd: pytest.CaptureFixture[str]
):
    assert command(*arguments) == 2
    lines = capfd.readouterr().err.strip().splitlines()
    assert message in lines[-1]
    assert not calls
    assert not Path("runs").exists()


def test_stop_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch, pictures: Path, capfd: pytest.CaptureFixture[str]):
    def stopped(*_: Any, **__: Any) -> None:
        raise StoppedError

    monkeypatch.setattr(reproduce_imagenet, "reproduce_inception", stopped)
    assert command("--data", pictures, "--out", "a run") == 130
    expected = f"batchnorm reproduce inception --resume --out 'a run' --data {pictures}"
    assert expected in capfd.readouterr().err


def test_estimate_trains_nothing(pictures: Path, capfd: pytest.CaptureFixture[str]):
    assert command("--data", pictures, "--quick", "--batch-size", 4, "--arms", "Inception,BN-x5", "--estimate") == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0].startswith("12 training and 4 validation images of 2 classes, 64 x 64; 60 steps of 4 images")
    assert [line.split(":")[0] for line in lines[1:3]] == ["Inception", "BN-x5"]
    assert all(word in lines[1] for word in ("GFLOP", "ms per mini-batch", "MiB kept", "1 x 60 steps"))
    assert not Path("runs").exists()


def test_estimate_of_an_ensemble_is_that_of_its_six_networks(pictures: Path, capfd: pytest.CaptureFixture[str]):
    arguments = ("--data", pictures, "--batch-size", 4, "--steps", 1000)
    assert command(*arguments, "--estimate", name="ensemble") == 0
    sweep, networks = capfd.readouterr().out.splitlines()[1:3]
    assert sweep.startswith("Inception, learning rates: ")
    assert "5 x 800 steps" in sweep
    assert networks.startswith("BN-x30: ")
    assert "6 x 1,000 steps" in networks


def test_a_whole_run_ends_in_a_page(pictures: Path, capfd: pytest.CaptureFixture[str]):
    arguments = (
        "--data",
        pictures,
        "--quick",
        *TINY,
        "--arms",
        "Inception,BN-x5",
        "--out",
        "here",
        "--tensorboard",
        "tb",
    )
    assert command(*arguments) in (0, 1)
    output, errors = capfd.readouterr()
    assert "BN-x5 reaches the best accuracy of Inception in fewer steps." in output.replace("\n    ", " ")
    assert "the evidence is in here/report.html" in errors
    assert {path.name for path in Path("here").iterdir()} >= {"report.html", "figure2.svg", "claims.json"}
    assert any(Path("tb").iterdir())
    assert command("--resume", "--out", "here", "--data", pictures) in (0, 1)


def test_a_whole_ensemble_ends_in_a_page(pictures: Path):
    assert command("--data", pictures, "--quick", *TINY, "--out", "here", "--crop-images", 2, name="ensemble") in (0, 1)
    record = json.loads(Path("here/claims.json").read_text())
    assert (len(record["networks"]), record["crop_images"]) == (6, 2)
    assert Path("here/report.html").exists()
    assert command("--resume", "--out", "here", "--data", pictures, name="ensemble") in (0, 1)


def test_two_processes_of_torchrun_make_one_run(pictures: Path, tmp_path: Path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = ["reproduce", "inception", "--data", pictures, "--quick", *TINY, "--arms", "Inception,BN-x5"]
    command = [*torchrun, "-m", "batchnorm", *map(str, arguments), "--out", "here"]
    result = run_command(command, tmp_path, {"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("claims reproduced") == 1
    options = json.loads(Path("here/config.json").read_text())["options"]
    assert (options["world_size"], options["batch_size"]) == (2, 4)
    rows = [json.loads(line) for line in Path("here/metrics.jsonl").read_text().splitlines()]
    assert [(row["arm"], row["step"]) for row in rows] == [
        (arm, step) for arm in ("Inception", "BN-x5") for step in (1, 2)
    ]
