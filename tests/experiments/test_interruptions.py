"""A run that is killed, interrupted or out of disk continues, and ends with the bytes of an uninterrupted one."""

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from commands import evidence, kill_group, run_command, session_of, small_run, start, wait_for

OPTIONS = ("--steps", 600, "--seeds", 2)
NO_FIGURES = {"NO_MATPLOTLIB": "1"}

Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture(autouse=True)
def no_figures(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NO_MATPLOTLIB", "1")


@pytest.fixture(scope="session")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The evidence of an uninterrupted run, made by one worker; the others here use two."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    done = run_command(small_run(*OPTIONS, "--threads", 1, "--out", folder), environment=NO_FIGURES)
    assert done.returncode in (0, 1), done.stderr
    return evidence(folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def begin(folder: Path) -> Iterator[Start]:
    """Starts or resumes the run; whatever is left of it at the end of the test is killed."""
    begun = []

    def begin() -> subprocess.Popen[bytes]:
        resume = ("--resume",) if folder.exists() else ()
        begun.append(start(small_run(*OPTIONS, "--threads", 2, "--out", folder, *resume), folder.with_suffix(".log")))
        return begun[-1]

    yield begin
    for process in begun:
        kill_group(process)


def is_training(folder: Path) -> bool:
    return any(folder.glob("work/*.checkpoint"))


def assert_resumes_to(expected: dict[str, bytes], folder: Path) -> None:
    done = run_command(small_run(*OPTIONS, "--threads", 2, "--out", folder, "--resume"), environment=NO_FIGURES)
    assert done.returncode in (0, 1), done.stderr
    assert evidence(folder) == expected
    assert not (folder / "work").exists()
    assert not list(folder.rglob(".*.tmp"))


def only_line(folder: Path) -> str:
    """The error, which is the only line besides progress, and the warning that there is no matplotlib."""
    text = folder.with_suffix(".log").read_text()
    assert "Traceback" not in text
    lines = [line for line in text.splitlines() if line and " steps/s" not in line and not line.endswith("/600")]
    assert lines.pop(0).startswith("matplotlib is not installed, so there will be no figures")
    assert len(lines) == 1, text
    return lines[0]


def test_a_run_killed_at_random_moments_of_its_training_ends_with_the_same_bytes(
    expected: dict[str, bytes], folder: Path, begin: Start
):
    for _ in range(4):
        process = begin()
        wait_for(lambda process=process: is_training(folder) or process.poll() is not None)
        time.sleep(random.uniform(0, 0.8))
        kill_group(process)
    assert_resumes_to(expected, folder)


def test_a_run_killed_at_any_random_moment_ends_with_the_same_bytes(
    expected: dict[str, bytes], folder: Path, begin: Start
):
    for _ in range(3):
        process = begin()
        wait_for(lambda process=process: process.poll() is not None, random.uniform(0.5, 6))
        kill_group(process)
    if not folder.exists():
        begin().wait()
    assert_resumes_to(expected, folder)


@pytest.mark.parametrize(
    ("kill", "times"), [(os.kill, 1), (os.killpg, 1), (os.killpg, 5)], ids=["the parent", "the group", "five times"]
)
def test_ctrl_c_says_how_to_resume_and_loses_nothing(
    expected: dict[str, bytes], folder: Path, begin: Start, kill: Callable[[int, int], None], times: int
):
    process = begin()
    assert wait_for(lambda: is_training(folder))
    for _ in range(times):
        kill(process.pid, signal.SIGINT)
    assert process.wait(60) == 130
    assert only_line(folder) == f"stopped; nothing is lost: batchnorm reproduce mnist --resume --out {folder}"
    assert wait_for(lambda: not session_of(process), 5)
    assert_resumes_to(expected, folder)


def test_ctrl_c_while_the_workers_start_shows_no_traceback(folder: Path, begin: Start):
    process = begin()
    assert wait_for((folder / "environment.json").exists)
    time.sleep(random.uniform(0, 0.5))
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == 130
    assert only_line(folder).startswith("stopped; nothing is lost: ")
    assert wait_for(lambda: not session_of(process), 5)


def test_a_killed_parent_leaves_no_process_and_a_run_to_resume(expected: dict[str, bytes], folder: Path, begin: Start):
    process = begin()
    assert wait_for(lambda: is_training(folder))
    process.kill()
    process.wait()
    assert wait_for(lambda: not session_of(process), 15), session_of(process)
    assert_resumes_to(expected, folder)


def test_a_killed_worker_ends_the_run_with_one_line(expected: dict[str, bytes], folder: Path, begin: Start):
    process = begin()
    assert wait_for(lambda: is_training(folder))
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    assert process.wait(60) == 2
    assert "a worker process ended unexpectedly (killed, or out of memory); continue with --resume" in only_line(folder)
    assert_resumes_to(expected, folder)


def test_a_full_disk_ends_the_run_with_one_line(expected: dict[str, bytes], folder: Path, begin: Start):
    """A limit on the size of files stands for the disk: a checkpoint of two networks has 800 KB."""
    command = small_run(*OPTIONS, "--threads", 2, "--out", folder)
    done = run_command(["bash", "-c", 'ulimit -f 300; exec "$@"', "bash", *command])
    assert done.returncode == 2, done.stderr
    folder.with_suffix(".log").write_text(done.stderr)
    assert only_line(folder).endswith(
        ".checkpoint: File too large; choose another --out, or free space and use --resume"
    )
    assert_resumes_to(expected, folder)
