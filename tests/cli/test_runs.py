"""The command from end to end, in processes of its own."""

import json
import os
import pty
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from test_progress import LINE

from batchnorm.cli.main import run
from commands import BATCHNORM, evidence, run_command, small_run

RECORDS = {".lock", "config.json", "environment.json", "metrics.jsonl", "timing.json", "claims.json", "checkpoints"}
PAGE = {"figure1.svg", "figure1.png", "report.html"}

Done = tuple[subprocess.CompletedProcess[str], Path]


@pytest.fixture(scope="session")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Done:
    folder = tmp_path_factory.mktemp("quick") / "run"
    return run_command([*BATCHNORM, "reproduce", "mnist", "--quick", "--out", str(folder)]), folder


@pytest.fixture(scope="session")
def other_options(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """A run in the usual place, without matplotlib."""
    base = tmp_path_factory.mktemp("other")
    command = small_run("--steps", 60, "--seeds", 2, "--learning-rate", ".1", "--input", "gray", "--threads", 5)
    done = run_command(command, cwd=base, environment={"NO_MATPLOTLIB": "1"})
    (folder,) = (base / "runs").iterdir()
    return done, folder


@pytest.fixture(scope="session")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Done:
    folder = tmp_path_factory.mktemp("sweep") / "run"
    return run_command(small_run("--sweep", "--steps", 20, "--seeds", 2, "--out", folder)), folder


def progress_lines(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stderr.splitlines() if re.search(r" [\d,]+/[\d,]+", line)]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_quick_run_ends_in_a_verdict(quick: Done):
    done, folder = quick
    assert done.returncode in (0, 1), done.stderr
    verdict = json.loads((folder / "claims.json").read_text())["verdict"]
    assert done.returncode == (0 if verdict == "reproduced" else 1)
    assert re.match(r"\d of 3 claims reproduced", done.stdout)
    assert len(re.findall(r"^\[[+x-]\] ", done.stdout, re.MULTILINE)) == 3


def test_verdicts_go_to_standard_output_and_the_rest_to_standard_error(quick: Done):
    done, folder = quick
    assert all(LINE.fullmatch(line) for line in progress_lines(done)), done.stderr
    assert done.stderr.splitlines()[-1] == f"the evidence is in {folder / 'report.html'}"
    assert "steps/s" not in done.stdout


def test_the_run_folder_holds_the_evidence_and_nothing_else(quick: Done):
    _, folder = quick
    assert names(folder) == RECORDS | PAGE
    assert names(folder / "checkpoints") == {
        f"{arm}-seed{seed}.safetensors" for arm in ("plain", "bn") for seed in (0, 1)
    }


def test_the_records_state_what_was_run(quick: Done):
    _, folder = quick
    config = json.loads((folder / "config.json").read_text())
    assert config["options"]["steps"] == 1000
    assert config["options"]["seeds"] == [0, 1]
    assert json.loads((folder / "environment.json").read_text())["packages"]["torch"]
    timing = json.loads((folder / "timing.json").read_text())
    assert set(timing["arms"]) == {"plain", "bn"}
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {(row["arm"], row["seed"]) for row in rows} == {(arm, seed) for arm in ("plain", "bn") for seed in (0, 1)}
    assert {row["step"] for row in rows} >= {0, 100, 1000}


def test_bn_learns_more_in_a_quick_run(quick: Done):
    _, folder = quick
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    finals = {(row["arm"], row["seed"]): row for row in rows if row["step"] == 1000}
    for seed in (0, 1):
        assert finals["bn", seed]["test_accuracy"] > 0.9
        assert finals["bn", seed]["test_accuracy_population"] == pytest.approx(
            finals["bn", seed]["test_accuracy"], abs=0.02
        )
        assert finals["plain", seed]["test_accuracy_population"] is None


@pytest.fixture
def copy(quick: Done, tmp_path: Path) -> Path:
    return Path(shutil.copytree(quick[1], tmp_path / "copy"))


def test_resume_of_a_finished_run_shows_its_verdicts_again(quick: Done, copy: Path, capfd):
    before = evidence(copy)
    assert run(["reproduce", "mnist", "--resume", "--out", str(copy)]) == quick[0].returncode
    assert capfd.readouterr().out == quick[0].stdout
    assert evidence(copy) == before
    assert names(copy) == RECORDS | PAGE


def test_report_rebuilds_the_same_bytes(quick: Done, copy: Path, capfd):
    for name in PAGE:
        (copy / name).unlink()
    assert run(["report", str(copy)]) == 0
    for name in PAGE:
        assert (copy / name).read_bytes() == (quick[1] / name).read_bytes(), name
    captured = capfd.readouterr()
    assert captured.out == quick[0].stdout
    assert set(captured.err.splitlines()) == {f"wrote {copy / name}" for name in PAGE}


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "claims.json", "timing.json", "environment.json"])
@pytest.mark.parametrize("text", [None, "", "{", "[]"], ids=["missing", "empty", "truncated", "a list"])
def test_report_on_a_broken_folder_is_one_line(copy: Path, name: str, text: str | None, capfd):
    (copy / name).unlink()
    if text is not None:
        (copy / name).write_text(text)
    assert run(["report", str(copy)]) == 2
    captured = capfd.readouterr().err
    assert captured.startswith(f"batchnorm: {copy / name}: ")
    assert captured.count("\n") == 1


def test_report_on_no_folder_is_one_line(tmp_path: Path, capfd):
    assert run(["report", str(tmp_path / "nowhere")]) == 2
    assert capfd.readouterr().err.startswith(f"batchnorm: {tmp_path}/nowhere: not a folder; expected")


def test_report_whose_reader_has_gone_is_no_verdict(copy: Path):
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run([*BATCHNORM, "report", str(copy)], stdout=writer, stderr=subprocess.PIPE, timeout=60)
    finally:
        os.close(writer)
    assert done.returncode == 2
    assert b"Traceback" not in done.stderr


def test_without_matplotlib_a_run_warns_first_and_still_gives_verdicts(other_options: Done):
    done, folder = other_options
    assert done.returncode in (0, 1), done.stderr
    lines = done.stderr.splitlines()
    assert lines[0] == "matplotlib is not installed, so there will be no figures: pip install matplotlib"
    assert "of 3 claims reproduced" in done.stdout
    assert names(folder) == RECORDS


def test_resume_without_out_takes_the_latest_run_and_its_options(
    other_options: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd
):
    done, folder = other_options
    shutil.copytree(folder.parent, tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    assert run(["reproduce", "mnist", "--resume"]) == done.returncode
    assert capfd.readouterr().out == done.stdout
    # The figures that were missing
    assert names(tmp_path / "runs" / folder.name) == RECORDS | PAGE
    assert run(["reproduce", "mnist", "--resume", "--learning-rate", ".2"]) == 2
    assert "made with learning_rate=0.1, now asked for learning_rate=0.2" in capfd.readouterr().err


def test_report_adds_the_figures_to_a_run_without_them(other_options: Done, tmp_path: Path):
    copy = shutil.copytree(other_options[1], tmp_path / "copy")
    assert run(["report", str(copy)]) == 0
    assert names(Path(copy)) == RECORDS | PAGE


def test_a_sweep_reports_both_arms_at_every_point(sweep: Done):
    done, folder = sweep
    assert done.returncode in (0, 1), done.stderr
    assert "With each arm at its own best point of the grid" in " ".join(done.stdout.split())
    assert names(folder) == RECORDS | {"sweep.json", "sweep.svg", "sweep.png", "report.html"}
    record = json.loads((folder / "sweep.json").read_text())
    points = {(point["learning_rate"], point["init_std"]) for point in record["points"]}
    assert points == {(rate, std) for rate in (0.01, 0.1, 0.5, 1.0, 2.0) for std in (0.05, 0.1, 1.0)}
    for arm in ("plain", "bn"):
        means = {(p["learning_rate"], p["init_std"]): p["arms"][arm]["mean"] for p in record["points"]}
        best = record["best"][arm]
        assert best["mean"] == max(means.values()) == means[best["learning_rate"], best["init_std"]]


def test_progress_lines_parse(sweep: Done):
    lines = progress_lines(sweep[0])
    assert lines
    assert all(LINE.fullmatch(line) for line in lines), lines


def test_a_terminal_shows_bars(tmp_path: Path):
    master, slave = pty.openpty()
    command = small_run("--steps", 100, "--seeds", 1, "--out", tmp_path / "run")
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "120", "NO_MATPLOTLIB": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=slave, env=environment) as process:
        os.close(slave)
        shown = b""
        # Linux ends the reading of a terminal that was closed with an error
        while chunk := read_or_end(master):
            shown += chunk
        assert process.stdout is not None
        assert b"of 3 claims reproduced" in process.stdout.read()
    os.close(master)
    text = shown.decode()
    assert "━" in text
    assert "100/100" in text
    assert "plain" in text
    assert "bn" in text
    assert process.returncode == 1


def read_or_end(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65536)
    except OSError:
        return b""
