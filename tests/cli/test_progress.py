"""Progress: lines that parse, at most one every few seconds."""

import re

import pytest

from batchnorm.cli import progress
from batchnorm.cli.progress import Progress

JOB = r"([\w.-]+) ([\d,]+)/([\d,]+)(?:, ([\d,]+) steps/s, (\d+) s left)?"
LINE = re.compile(rf"{JOB}(; {JOB})*")


class Clock:
    """A clock that is set by hand."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_a_line_states_steps_rate_and_time_left_of_every_running_job(clock: Clock, capsys):
    with Progress(50_000) as shown:
        shown.update("plain", 50)
        shown.update("bn", 50)
        clock.now = 10.0
        shown.update("plain", 10_050)
        clock.now = 20.0
        shown.update("bn", 5_050)
    first, second = capsys.readouterr().err.splitlines()
    assert first == "plain 10,050/50,000, 1,000 steps/s, 40 s left; bn 50/50,000"
    assert second == "plain 10,050/50,000, 500 steps/s, 80 s left; bn 5,050/50,000, 250 steps/s, 180 s left"
    assert LINE.fullmatch(first)
    assert LINE.fullmatch(second)


def test_lines_come_at_most_every_ten_seconds(clock: Clock, capsys):
    with Progress(10_000) as shown:
        for second in range(100):
            clock.now = float(second)
            shown.update("bn", 50 * second)
    assert len(capsys.readouterr().err.splitlines()) == 9


def test_finished_jobs_are_not_shown_while_others_run(clock: Clock, capsys):
    with Progress(100) as shown:
        shown.update("plain", 100)
        clock.now = 10.0
        shown.update("bn", 50)
        clock.now = 20.0
        shown.update("bn", 100)
    assert capsys.readouterr().err.splitlines() == ["bn 50/100", "bn 100/100, 5.0 steps/s, 0 s left"]


def test_a_resumed_job_is_timed_from_where_it_resumed(clock: Clock, capsys):
    with Progress(1000) as shown:
        shown.update("bn", 900)
        clock.now = 10.0
        shown.update("bn", 950)
    assert capsys.readouterr().err == "bn 950/1,000, 5.0 steps/s, 10 s left\n"


def test_a_job_of_unknown_length_shows_what_is_done(clock: Clock, capsys):
    with Progress(None) as shown:
        shown.update("measuring", 50)
        clock.now = 10.0
        shown.update("measuring", 100)
        clock.now = 20.0
        shown.update("loading", 1, 3)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["measuring 100, 5.0 steps/s", "measuring 100, 2.5 steps/s; loading 1/3"]


def test_many_jobs_are_counted_together(clock: Clock, capsys):
    with Progress(100, jobs=20) as shown:
        shown.update("a", 100)
        clock.now = 10.0
        shown.update("b", 50)
        clock.now = 20.0
        shown.update("b", 100)
        shown.update("c", 50)
    assert capsys.readouterr().err.splitlines() == [
        "everything 8 %, 370 s left; b 50/100",
        "everything 10 %, 360 s left; b 100/100, 5.0 steps/s, 0 s left",
    ]


def test_bars_of_finished_jobs_make_room(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True)
    with Progress(100, jobs=30) as shown:
        for job in range(20):
            shown.update(f"job {job}", 100 if job < 18 else 50)
        visible = [task.description for task in shown.bars.tasks if task.visible]
        everything = shown.bars.tasks[0]
    assert (everything.description, everything.completed, everything.total) == ("everything", 1900, 3000)
    assert visible[-2:] == ["job 18", "job 19"]
    assert len(visible) <= progress.MOST_FINISHED + 3


def test_nothing_goes_to_standard_output(clock: Clock, capsys):
    with Progress(1000) as shown:
        clock.now = 10.0
        shown.update("bn", 950)
    assert capsys.readouterr().out == ""
