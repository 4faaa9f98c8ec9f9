"""Live progress with the time left on a terminal; a plain line now and then elsewhere. On standard error."""

import contextlib
import math
import sys
import time
from types import TracebackType
from typing import Self

import click

LINE_SECONDS = 10.0
EVERYTHING = "everything"
# Bars that stay when their jobs are done; a study has hundreds of jobs
MOST_FINISHED = 8


class Progress:
    """Progress of jobs that are known once they report.

    Args:
        steps: of each job that does not say otherwise; None where nobody knows.
        jobs: how many there will be, where that is known and they are too many to look at one by one.
    """

    def __init__(self, steps: int | None, jobs: int | None = None) -> None:
        self.steps = math.inf if steps is None else steps
        self.jobs = jobs
        self.steps_of: dict[str, float] = {}
        self.done: dict[str, int] = {}
        self.first: dict[str, tuple[int, float]] = {}
        self.printed = time.monotonic()
        self.bars = None

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bars

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
            )
            self.bars = Bars(*columns, TimeRemainingColumn(), console=Console(stderr=True))
            self.bars.start()
            self.tasks = {}
            if self.jobs is not None:
                self.tasks[EVERYTHING] = self.bars.add_task(EVERYTHING, total=self.jobs * self.steps, rate="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bars is not None:
            self.bars.stop()

    def update(self, job: str, step: int, steps: int | None = None) -> None:
        """A job has finished so many of its steps."""
        now = time.monotonic()
        total = self.steps_of.setdefault(job, steps or self.steps)
        self.first.setdefault(job, (step, now))
        self.done[job] = step
        finished = sum(self.done.values())
        if self.jobs is not None:
            self.first.setdefault(EVERYTHING, (finished, now))
        if self.bars is not None:
            if job not in self.tasks:
                known = total if total < math.inf else None
                self.tasks[job] = self.bars.add_task(job, total=known, completed=step, rate="")
            if EVERYTHING in self.tasks:
                self.bars.update(self.tasks[EVERYTHING], completed=finished)
            visible = step < total or len(self.tasks) <= MOST_FINISHED
            self.bars.update(self.tasks[job], completed=step, rate=per_second(self.rate(job, now)), visible=visible)
        elif now - self.printed >= LINE_SECONDS:
            self.printed = now
            running = [name for name, done in self.done.items() if done < self.steps_of[name]]
            # nobody may be reading any more, which is no reason to stop training
            with contextlib.suppress(OSError):
                lines = [self.line(name, now) for name in running or [job]]
                click.echo("; ".join([*self.overall(finished, now), *lines]), err=True)

    def overall(self, finished: int, now: float) -> list[str]:
        """How far all jobs together are, where their number is known."""
        if self.jobs is None:
            return []
        total = self.jobs * self.steps
        done_before, since = self.first[EVERYTHING]
        rate = (finished - done_before) / (now - since) if now > since else 0.0
        left = f", {(total - finished) / rate:.0f} s left" if rate else ""
        return [f"{EVERYTHING} {100 * finished / total:.0f} %{left}"]

    def line(self, job: str, now: float) -> str:
        rate = self.rate(job, now)
        total = self.steps_of[job]
        speed = f", {per_second(rate)}" if rate else ""
        if total == math.inf:
            return f"{job} {self.done[job]:,}{speed}"
        left = f", {(total - self.done[job]) / rate:.0f} s left" if rate else ""
        return f"{job} {self.done[job]:,}/{total:,}{speed}{left}"

    def rate(self, job: str, now: float) -> float:
        step, since = self.first[job]
        return (self.done[job] - step) / (now - since) if now > since else 0.0


def per_second(rate: float) -> str:
    return f"{rate:,.0f} steps/s" if rate >= 20 else f"{rate:.1f} steps/s"
