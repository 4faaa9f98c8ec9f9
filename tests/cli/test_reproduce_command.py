"""Options of ``batchnorm reproduce mnist``: what they mean, and how wrong ones are refused before anything is made."""

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from batchnorm.cli import options, reproduce
from batchnorm.cli.main import run
from batchnorm.experiments.mnist import Options
from batchnorm.experiments.run_folder import open_run
from batchnorm.files import write_json

RECORD = {"verdict": "reproduced", "claims": []}
TIMING = {"training_seconds": 1.0, "arms": {"bn": {"networks": 3, "steps_per_second": 700.0}}}


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the command asked of the experiment, which only makes the folder of a run that was stopped."""
    calls = []

    def stand_in(name: str):
        def experiment(options: Options, folder: Path, **arguments: Any) -> dict[str, Any]:
            calls.append({"name": name, "options": options, "folder": folder, **arguments})
            grid = {"learning_rate": [0.1, 1.0], "init_std": [0.1], "sweep": True} if name == "sweep" else {}
            config = {"schema_version": 1, "experiment": "mnist", "options": {**vars(options), **grid}}
            with open_run(folder, config, resume=arguments["resume"], force=arguments["force"]):
                write_json(folder / "timing.json", TIMING)
                return RECORD

        return experiment

    monkeypatch.setattr(reproduce, "reproduce_mnist", stand_in("mnist"))
    monkeypatch.setattr(reproduce, "sweep_mnist", stand_in("sweep"))
    monkeypatch.setattr(options, "write_report", lambda folder: [folder / "report.html"])
    return calls


def mnist(*arguments: object) -> int:
    return run(["reproduce", "mnist", *map(str, arguments)])


@pytest.mark.parametrize("arguments", [["--help"], ["mnist", "--help"]])
def test_help_is_shown(arguments: list[str]):
    result = CliRunner().invoke(reproduce.reproduce, arguments)
    assert result.exit_code == 0
    assert "Usage: " in result.output


def test_help_states_every_default():
    text = " ".join(CliRunner().invoke(reproduce.mnist, ["--help"]).output.split())
    defaults = Options()
    for default in (50_000, 3, defaults.learning_rate, defaults.init_std, "binary", "cpu", "runs/mnist-TIME"):
        assert f"default: {default}" in text, default


def test_defaults_are_those_of_the_experiment(calls: list[dict[str, Any]]):
    assert mnist() == 0
    (call,) = calls
    assert call["options"] == Options()
    assert call["name"] == "mnist"
    assert call["workers"] == len(os.sched_getaffinity(0))
    assert call["data_folder"] is None
    assert call["folder"].parent == Path("runs")
    assert call["folder"].name.startswith("mnist-2")


def test_options_reach_the_experiment(calls: list[dict[str, Any]]):
    mnist(
        *("--out", "a", "--seeds", 5, "--steps", 70, "--input", "gray", "--learning-rate", ".25"),
        *("--init-std", 0, "--threads", 5, "--data", "files", "--force"),
    )
    (call,) = calls
    expected = Options(steps=70, seeds=(0, 1, 2, 3, 4), input="gray", learning_rate=0.25, init_std=0.0, stacks=2)
    assert call["options"] == expected
    assert (call["folder"], call["data_folder"], call["workers"]) == (Path("a"), Path("files"), 5)
    assert (call["force"], call["resume"]) == (True, False)


@pytest.mark.parametrize(("threads", "stacks"), [(1, 1), (2, 1), (3, 1), (4, 2), (6, 3), (64, 3)])
def test_seeds_are_spread_over_the_cores(calls: list[dict[str, Any]], threads: int, stacks: int):
    mnist("--threads", threads, "--out", "a")
    assert calls[0]["options"].stacks == stacks


def test_a_resumed_run_keeps_its_stacks_on_other_cores(calls: list[dict[str, Any]]):
    mnist("--threads", 6, "--out", "a")
    mnist("--threads", 1, "--out", "a", "--resume")
    assert [(call["options"].stacks, call["workers"]) for call in calls] == [(3, 6), (3, 1)]


@pytest.mark.parametrize("option", ["--learning-rate", "--init-std"])
def test_a_sweep_refuses_a_point_of_its_grid(option: str, capsys: pytest.CaptureFixture[str]):
    assert run(["reproduce", "mnist", "--sweep", option, "1"]) == 2
    assert "--sweep trains its own grid" in capsys.readouterr().err


def test_quick_is_few_steps_and_seeds_unless_they_are_given(calls: list[dict[str, Any]]):
    mnist("--quick", "--out", "a")
    mnist("--quick", "--seeds", 4, "--out", "b")
    mnist("--quick", "--steps", 30, "--out", "c")
    sizes = [(call["options"].steps, len(call["options"].seeds)) for call in calls]
    assert sizes == [(1000, 2), (1000, 4), (30, 2)]


@pytest.mark.parametrize("out", [[], ["--out", "runs/mnist-20260101-000000"]], ids=["the latest run", "a named run"])
@pytest.mark.parametrize(
    "arguments",
    [
        ["--seeds", "2", "--learning-rate", ".1"],
        ["--quick"],
        ["--input", "gray", "--steps", "9", "--init-std", ".3"],
        [],
    ],
    ids=str,
)
def test_resume_takes_the_options_of_the_run(calls: list[dict[str, Any]], arguments: list[str], out: list[str]):
    mnist("--steps", "8", "--out", "runs/mnist-20250101-000000")
    assert mnist(*arguments, "--out", "runs/mnist-20260101-000000") == 0
    assert mnist("--resume", *out) == 0
    _, begun, resumed = calls
    assert resumed["options"] == begun["options"]
    assert resumed["folder"] == Path("runs/mnist-20260101-000000")
    assert resumed["resume"]


def test_resume_with_the_same_options_is_the_same(calls: list[dict[str, Any]]):
    assert mnist("--quick", "--out", "a") == mnist("--quick", "--out", "a", "--resume") == 0
    assert calls[0]["options"] == calls[1]["options"]


def test_resume_of_a_sweep_is_a_sweep(calls: list[dict[str, Any]]):
    assert mnist("--sweep", "--seeds", 2, "--steps", 20, "--out", "a") == 0
    assert mnist("--resume", "--out", "a") == 0
    assert [call["name"] for call in calls] == ["sweep", "sweep"]
    assert calls[0]["options"] == calls[1]["options"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "9"], "made with steps=8, now asked for steps=9"),
        (["--seeds", "1"], "made with seeds=[0, 1, 2], now asked for seeds=[0]"),
        (["--learning-rate", "7"], f"made with learning_rate={Options.learning_rate}, now asked for learning_rate=7.0"),
        (["--sweep"], f"made with init_std={Options.init_std}, now asked for init_std=[0.1]"),
    ],
)
def test_resume_with_other_options_is_refused(calls, arguments: list[str], message: str, capsys):
    mnist("--steps", "8", "--out", "a")
    capsys.readouterr()
    assert mnist("--resume", "--out", "a", *arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("text", ["{}", '{"options": 3}', '{"options": {}}', "[]", "nonsense"])
def test_resume_of_a_broken_configuration_is_one_line(calls, text: str, capsys):
    Path("a").mkdir()
    Path("a/config.json").write_text(text)
    assert mnist("--resume", "--out", "a") == 2
    captured = capsys.readouterr().err
    assert captured.startswith("batchnorm: a/config.json: ")
    assert captured.count("\n") == 1


def test_resume_without_any_run_is_refused(capsys):
    assert mnist("--resume") == 2
    assert capsys.readouterr().err == "batchnorm: runs: no run of mnist to resume there; name its folder with --out\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "Invalid value for '--steps': 0 is not in the range x>=1."),
        (["--steps", "1e3"], "Invalid value for '--steps': '1e3' is not a valid integer range."),
        (["--seeds", "0"], "Invalid value for '--seeds': 0 is not in the range x>=1."),
        (["--threads", "0"], "Invalid value for '--threads': 0 is not in the range x>=1."),
        (["--learning-rate", "0"], "Invalid value for '--learning-rate': 0.0 is not in the range x>0."),
        (["--learning-rate", "-1"], "Invalid value for '--learning-rate': -1.0 is not in the range x>0."),
        (["--learning-rate", "nan"], "Invalid value for '--learning-rate': nan is not a finite number."),
        (["--learning-rate", "inf"], "Invalid value for '--learning-rate': inf is not a finite number."),
        (["--init-std", "nan"], "Invalid value for '--init-std': nan is not a finite number."),
        (["--init-std", "-0.1"], "Invalid value for '--init-std': -0.1 is not in the range x>=0."),
        (["--input", "color"], "Invalid value for '--input': 'color' is not one of 'binary', 'gray'."),
        (["--resume", "--force"], "--resume continues a run and --force deletes it: give one of them"),
        (["--device", "nonsense"], "batchnorm: device 'nonsense' cannot be used here: "),
        (["--device", "meta"], "batchnorm: device 'meta' cannot be used here: "),
        (["--device", "cpu:x"], "batchnorm: device 'cpu:x' cannot be used here: "),
        (["--data", "nowhere"], "batchnorm: nowhere: no train-images-idx3-ubyte.gz or train-images-idx3-ubyte: "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
@pytest.mark.parametrize("sweep", [[], ["--sweep"]], ids=["run", "sweep"])
def test_wrong_values_are_one_line_before_any_folder_is_made(
    arguments: list[str], message: str, sweep: list[str], tmp_path: Path, capsys
):
    assert mnist(*arguments, *sweep) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_one_line_before_any_folder_is_made(tmp_path: Path, capsys):
    assert mnist("--device", "cuda") == 2
    captured = capsys.readouterr().err
    assert captured.startswith("batchnorm: device 'cuda' cannot be used here: ")
    assert captured.endswith("; try --device cpu\n")
    assert captured.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("verdict", "status"), [("reproduced", 0), ("not reproduced", 1), ("not comparable", 1)])
def test_the_exit_status_is_the_verdict(calls, monkeypatch: pytest.MonkeyPatch, verdict: str, status: int):
    monkeypatch.setitem(RECORD, "verdict", verdict)
    assert mnist("--out", "a") == status


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("steps", "abc", "steps: 'abc' is not"),
        ("learning_rate", -3, "learning_rate: -3"),
        ("seeds", 5, "list of seeds"),
    ],
)
def test_resume_of_an_edited_configuration_is_one_line(calls, capsys, name: str, value: object, message: str):
    mnist("--out", "a")
    config = json.loads(Path("a/config.json").read_text())
    config["options"][name] = value
    Path("a/config.json").write_text(json.dumps(config))
    capsys.readouterr()
    assert mnist("--out", "a", "--resume") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert "choose another --out" in line.lower()


def test_resume_of_a_sweep_refuses_a_point_of_its_grid(calls, capsys):
    mnist("--sweep", "--out", "a")
    assert mnist("--out", "a", "--resume", "--learning-rate", 1) == 2
    assert "--sweep trains its own grid" in capsys.readouterr().err


def test_an_existing_run_is_refused(calls, capsys):
    mnist("--out", "a")
    capsys.readouterr()
    assert mnist("--out", "a") == 2
    assert "a: exists already and is not empty; continue it with --resume" in capsys.readouterr().err
    assert mnist("--out", "a", "--force", "--steps", 3) == 0
    assert json.loads(Path("a/config.json").read_text())["options"]["steps"] == 3


def test_a_full_disk_under_the_report_is_one_line_and_no_verdict(calls, monkeypatch: pytest.MonkeyPatch, capsys):
    def full(folder: Path) -> None:
        raise OSError(28, "No space left on device", f"{folder}/figure1.svg")

    monkeypatch.setattr(options, "write_report", full)
    assert mnist("--out", "a") == 2
    assert capsys.readouterr().err == "batchnorm: [Errno 28] No space left on device: 'a/figure1.svg'\n"


def test_without_matplotlib_there_is_a_warning_first_and_still_a_verdict(
    calls, monkeypatch: pytest.MonkeyPatch, capsys
):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "matplotlib" else find_spec(name, *rest)
    )
    assert mnist("--out", "a") == 0
    captured = capsys.readouterr()
    first, *_, last = captured.err.splitlines()
    assert first == "matplotlib is not installed, so there will be no figures: pip install matplotlib"
    assert last == "the evidence is in a"
    assert captured.out == "no claims\n"
