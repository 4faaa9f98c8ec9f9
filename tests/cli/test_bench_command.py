"""``batchnorm bench``: what it prints, what it writes, and its exit status."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from batchnorm.benchmarks import peers, run
from batchnorm.benchmarks.records import read_records
from batchnorm.cli import bench as command
from batchnorm.cli.main import run as run_batchnorm

SMALL = ["--case", "very small 2x3", "--peers", "torch", "--seconds", "0.001", "--threads", "1"]


@pytest.fixture(autouse=True)
def threads_come_back():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def bench(*arguments: object):
    return CliRunner().invoke(command.bench, [str(argument) for argument in arguments], standalone_mode=False)


def test_a_run_is_recorded_and_summarized(tmp_path):
    path = tmp_path / "record.jsonl"
    result = bench(*SMALL, "--out", path)
    assert result.return_value == 0
    assert "1/1 very small 2x3 bn+relu float32 contiguous" in result.stderr
    assert "times as fast as torch" in result.stderr
    assert "BN+ReLU forward+backward float32 against torch, geometric mean: " in result.stdout
    assert "training step" not in result.stdout
    assert [record["kind"] for record in read_records(path)] == ["header", "time", "time", "time"]


def test_resuming_measures_only_what_is_missing(tmp_path):
    path = tmp_path / "record.jsonl"
    bench(*SMALL, "--out", path)
    before = path.read_text()
    result = bench(*SMALL, "--out", path, "--resume")
    assert "measured before" in result.stderr
    assert path.read_text() == before
    bench(*SMALL, "--suite", "full", "--out", path, "--resume")
    assert {record.get("suite") for record in read_records(path)[1:]} == {"quick", "full"}


def test_the_record_survives_an_interruption(tmp_path, monkeypatch: pytest.MonkeyPatch, capsys):
    path = tmp_path / "record.jsonl"
    measured = run.measure_case

    def interrupted(case, *arguments):
        if "8x16" in case.name:
            raise KeyboardInterrupt
        return measured(case, *arguments)

    monkeypatch.setattr(command, "measure_case", interrupted)
    arguments = ["--suite", "full", "--case", "very small", "--peers", "torch", "--seconds", "0.001"]
    assert run_batchnorm(["bench", *arguments, "--out", str(path)]) == 130
    assert "stopped; what was measured is in" in capsys.readouterr().err
    assert {tuple(record["shape"]) for record in read_records(path)[1:]} == {(2, 3)}


def test_a_failed_check_is_said_and_ends_with_status_1(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(run, "beyond_budget", lambda *_: "output is off by 1, allowed are 0.1")
    result = bench(*SMALL, "--out", tmp_path / "record.jsonl")
    assert result.return_value == 1
    assert "ours failed: output is off by 1, allowed are 0.1" in result.stderr


def test_a_missing_peer_is_one_line(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda _: None)
    path = tmp_path / "record.jsonl"
    result = bench(*SMALL, "--peers", "torch,jax", "--out", path)
    assert result.return_value == 0
    assert "without jax: JAX is not installed: pip install 'batchnorm[bench]'\n" in result.stderr
    assert [record["peer"] for record in read_records(path) if record["kind"] == "skipped"] == ["jax"]


def test_a_compiler_that_fails_is_one_line(tmp_path, monkeypatch: pytest.MonkeyPatch):
    def compile_fails(*_, **__):
        raise RuntimeError("no working C++ compiler\nlong story")

    monkeypatch.setattr(peers.torch, "compile", compile_fails)
    result = bench(*SMALL, "--peers", "torch,torch.compile", "--out", tmp_path / "record.jsonl")
    assert result.return_value == 0
    assert "without torch.compile: RuntimeError: no working C++ compiler\n" in result.stderr


def test_scaling_has_sizes_and_threads(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(command, "SIZE_CASES", [command.Case("size", (4, 3))])
    monkeypatch.setattr(command, "THREAD_CASES", [command.Case("threads", (4, 3))])
    monkeypatch.setattr(command, "usable_cpus", lambda: 3)
    path = tmp_path / "record.jsonl"
    assert bench("--suite", "none", "--scaling", "--seconds", "0.001", "--out", path).return_value == 0
    found = read_records(path)[1:]
    assert {record["threads"] for record in found if record["suite"] == "threads"} == {1, 2, 3}
    assert {record["threads"] for record in found if record["suite"] == "size"} == {3}


def test_listing_measures_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(command, "measure", lambda *_: pytest.fail("measured"))
    result = bench("--suite", "none", "--steps", "--list")
    assert result.stdout.splitlines()[0] == "ResNet-18 contiguous"
    assert len(result.stdout.splitlines()) == 6


def test_the_table_is_the_page_of_the_files(tmp_path):
    path = tmp_path / "record.jsonl"
    bench(*SMALL, "--out", path)
    result = bench("--table", path)
    assert result.return_value == 0
    assert result.stdout.startswith("# Benchmarks\n")
    assert "| very small 2x3 bn+relu float32 contiguous | forward+backward |" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--peers", "tensorflow"], "'tensorflow' is not one of torch, torch-inplace, torch.compile, jax."),
        (["--table"], "--table and FILES belong together."),
        (["--case", "nothing like this"], "no case is chosen."),
        (["--suite", "none"], "no case is chosen."),
        (["--resume"], "--resume needs --out."),
        (["--seconds", "0"], "Invalid value for '--seconds'"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert run_batchnorm(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error


def test_a_file_that_is_no_record_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "other.jsonl"
    path.write_text(json.dumps({"kind": "something"}))
    assert run_batchnorm(["bench", "--table", str(path)]) == 2
    assert "expected a header" in capsys.readouterr().err
