"""Worker processes give their results, pass on their failures, and never outlive their parent."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from worker_jobs import die_after, double, fail, fail_after, report, threads, work_until_asked_to_stop

from batchnorm.errors import RunError
from batchnorm.experiments.workers import run_jobs
from commands import kill_group, session_of, start, wait_for


def ignore(job: str, step: int) -> None:
    pass


def test_results_come_by_name_whatever_the_number_of_workers():
    jobs = [(f"job {i}", (i,)) for i in range(3)]
    for workers in (1, 2, 7):
        assert run_jobs(double, jobs, workers=workers, on_progress=ignore) == {"job 0": 0, "job 1": 2, "job 2": 4}


def test_a_worker_computes_with_one_thread():
    assert run_jobs(threads, [("job", ())], workers=1, on_progress=ignore) == {"job": 1}


def test_progress_arrives_complete_and_in_order():
    seen: dict[str, list[int]] = {"a": [], "b": []}
    jobs = [(name, (name, 500)) for name in seen]
    run_jobs(report, jobs, workers=2, on_progress=lambda job, step: seen[job].append(step))
    assert seen == {"a": list(range(500)), "b": list(range(500))}


def test_an_exception_of_a_job_is_raised_here():
    with pytest.raises(ArithmeticError, match="divided by 7"):
        run_jobs(fail, [("job", ("divided by 7",))], workers=1, on_progress=ignore)


def call(function, *arguments):
    return function(*arguments)


def test_an_exception_stops_the_other_jobs(tmp_path: Path):
    # begun if its worker is quicker than the failure is noticed
    waiting = tmp_path / "hardly ever begun"
    waiting.mkdir()
    jobs = [
        ("fails", (fail_after, tmp_path / "started", "divided by 7")),
        ("works", (work_until_asked_to_stop, tmp_path)),
        ("waits", (work_until_asked_to_stop, waiting)),
    ]
    with pytest.raises(ArithmeticError, match="divided by 7"):
        run_jobs(call, jobs, workers=2, on_progress=ignore)
    assert (tmp_path / "stopped").exists()


@pytest.mark.parametrize("order", [1, -1], ids=["the first", "the second"])
def test_a_killed_worker_is_noticed_at_once_and_says_how_to_go_on(tmp_path: Path, order: int):
    jobs = [("dies", (die_after, tmp_path / "started")), ("works", (work_until_asked_to_stop, tmp_path))][::order]
    started = time.monotonic()
    with pytest.raises(RunError, match=r"worker process ended unexpectedly \(killed, or out of memory\).*--resume"):
        run_jobs(call, jobs, workers=2, on_progress=ignore)
    # Not only when the other job ends, after a minute
    assert time.monotonic() - started < 50


def test_an_interrupt_stops_the_jobs_and_is_raised_here(tmp_path: Path):
    def interrupt(job: str, step: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_jobs(work_until_asked_to_stop, [("works", (tmp_path,))], workers=1, on_progress=interrupt)
    assert (tmp_path / "stopped").exists()


def test_ctrl_c_between_the_steps_is_raised_when_the_jobs_have_stopped(tmp_path: Path):
    def press(job: str, step: int) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run_jobs(work_until_asked_to_stop, [("works", (tmp_path,))], workers=1, on_progress=press)
    assert (tmp_path / "stopped").exists()
    assert signal.getsignal(signal.SIGINT) is before


def test_jobs_run_from_any_thread():
    with ThreadPoolExecutor(1) as threads:
        future = threads.submit(run_jobs, double, [("job", (1,))], workers=1, on_progress=ignore)
        assert future.result(60) == {"job": 2}


def test_ctrl_c_is_not_held_back_after_the_workers_have_started():
    run_jobs(double, [("job", (1,))], workers=1, on_progress=ignore)
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


PARENT = """
    import sys
    from pathlib import Path
    sys.path.insert(0, {here!r})
    from worker_jobs import double, work_without_looking
    from test_workers import call, ignore
    from batchnorm.experiments.workers import run_jobs

    jobs = [("idle", (double, 1)), ("busy", (work_without_looking, Path(sys.argv[1])))]
    run_jobs(call, jobs, workers=2, on_progress=ignore)
"""


@pytest.fixture
def parent(tmp_path: Path):
    """A process with two workers: one has nothing to do, one never looks whether it should stop."""
    here = str(Path(__file__).parent)
    paths = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    script = textwrap.dedent(PARENT.format(here=here))
    process = start(["env", f"PYTHONPATH={paths}", sys.executable, "-c", script, str(tmp_path)], tmp_path / "log")
    assert wait_for((tmp_path / "started").exists), (tmp_path / "log").read_text()
    yield process
    kill_group(process)


def test_no_worker_outlives_a_killed_parent(parent: subprocess.Popen[bytes]):
    assert len(session_of(parent)) >= 3
    parent.kill()
    parent.wait()
    assert wait_for(lambda: not session_of(parent), 15), session_of(parent)
