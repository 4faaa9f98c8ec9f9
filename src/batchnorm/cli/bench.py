"""``batchnorm bench``."""

import contextlib
import functools
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import click
import torch

from batchnorm.benchmarks.cases import Case, choose_cases, name_matches
from batchnorm.benchmarks.peers import MATRIX, OURS, PEERS, TORCH, why_unavailable
from batchnorm.benchmarks.records import append, is_done, make_header, read_records, start_file
from batchnorm.benchmarks.run import measure_case, measure_threads
from batchnorm.benchmarks.statistics import CASES as STATISTICS_CASES
from batchnorm.benchmarks.statistics import SUITE as STATISTICS
from batchnorm.benchmarks.statistics import measure_statistics
from batchnorm.benchmarks.steps import MODELS, measure_steps
from batchnorm.benchmarks.suites import SIZE_CASES, SUITES, THREAD_CASES
from batchnorm.benchmarks.summary import Target, cases_of, targets
from batchnorm.benchmarks.tables import busy_line, page, verdict
from batchnorm.benchmarks.whitening import CASES as WHITENING_CASES
from batchnorm.benchmarks.whitening import SUITE as WHITENING
from batchnorm.benchmarks.whitening import measure_whitening
from batchnorm.environment import usable_cpus

SECONDS = 2.0
# A training step takes about a second, and its median needs some of each
STEP_SECONDS = 30.0
STEP_FORMATS = ("contiguous", "channels_last")

Record = dict[str, Any]
Job = tuple[str, str, Callable[[], list[Record]]]


class Peers(click.ParamType):
    """Names of peers, separated by commas."""

    name = "names"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        names = tuple(name.strip() for name in value.split(",")) if isinstance(value, str) else tuple(value)
        for name in names:
            if name not in PEERS:
                self.fail(f"'{name}' is not one of {', '.join(PEERS)}.", param, ctx)
        return names


@click.command()
@click.option(
    "--suite", type=click.Choice([*SUITES, WHITENING, STATISTICS, "none"]), default="quick", show_default=True
)
@click.option("--case", "patterns", multiple=True, help="Only cases whose name contains this; * stands for anything.")
@click.option("--peers", type=Peers(), default=",".join(PEERS), show_default=True, help="Whom to compare with.")
@click.option("--steps", is_flag=True, help="Training steps of whole networks, with and without convert, too.")
@click.option("--scaling", is_flag=True, help="Growing sizes, and one thread against several, too.")
@click.option("--threads", type=click.IntRange(1), help="[default: one per core]")
@click.option(
    "--seconds", type=click.FloatRange(0, min_open=True), default=SECONDS, show_default=True, help="Per case."
)
@click.option("--out", type=click.Path(path_type=Path), help="The record.  [default: runs/bench-TIME.jsonl]")
@click.option("--resume", is_flag=True, help="Leave out what the record in --out has already.")
@click.option("--list", "listing", is_flag=True, help="Name the chosen cases and measure nothing.")
@click.option("--table", is_flag=True, help="Print the page of the records given as FILES and measure nothing.")
@click.argument("files", nargs=-1, type=click.Path(path_type=Path, exists=True, dir_okay=False))
def bench(
    suite: str,
    patterns: tuple[str, ...],
    peers: tuple[str, ...],
    steps: bool,
    scaling: bool,
    threads: int | None,
    seconds: float,
    out: Path | None,
    resume: bool,
    listing: bool,
    table: bool,
    files: tuple[Path, ...],
) -> int:
    """Measure the layers against torch, torch.compile and JAX.

    Every case is checked against float64 before it is timed. Exit status: 0 measured, 1 a check failed, 2 an error,
    130 interrupted.
    """
    if table != bool(files):
        raise click.UsageError("--table and FILES belong together.")
    if table:
        click.echo(page(files), nl=False)
        return 0
    if resume and out is None:
        raise click.UsageError("--resume needs --out.")
    chosen = choose_jobs(suite, patterns, peers, steps, scaling, seconds)
    if not chosen:
        raise click.UsageError("no case is chosen.")
    if listing:
        click.echo("\n".join(name for _, name, _ in chosen))
        return 0
    torch.set_num_threads(threads or usable_cpus())
    path = out or Path("runs") / f"bench-{time.strftime('%Y%m%d-%H%M%S')}.jsonl"
    earlier = start_file(path, make_header(seconds), resume)
    present = available_peers(peers, path) if suite in SUITES else ()
    measure(choose_jobs(suite, patterns, present, steps, scaling, seconds), path, earlier)
    records = read_records(path)
    click.echo(busy_line(records), nl=False, err=True)
    print_targets(targets(records))
    click.echo(f"the record is in {path}", err=True)
    return 1 if any(record["kind"] == "failed" for record in records) else 0


def choose_jobs(
    suite: str, patterns: Sequence[str], peers: Sequence[str], steps: bool, scaling: bool, seconds: float
) -> list[Job]:
    """What to measure, in this order: suite, name, and how."""

    def of_case(case: Case, suite: str, peers: Sequence[str] = peers) -> Job:
        return suite, case.name, lambda: measure_case(case, peers, seconds, suite)

    def of_threads(case: Case) -> Job:
        counts = sorted({1, *(2**i for i in range(usable_cpus().bit_length())), usable_cpus()})
        counts = [count for count in counts if count <= usable_cpus()]
        return "threads", case.name, lambda: measure_threads(case, counts, seconds, "threads")

    def of_model(name: str, memory_format: str) -> Job:
        longer = STEP_SECONDS * seconds / SECONDS
        return "steps", f"{name} {memory_format}", lambda: measure_steps(name, memory_format, longer)

    jobs = [of_case(case, suite) for case in choose_cases(SUITES.get(suite, []), patterns)]
    if suite == WHITENING:
        cases = [case for case in WHITENING_CASES if name_matches(case.name, patterns)]
        jobs += [(suite, case.name, functools.partial(measure_whitening, case, seconds)) for case in cases]
    if suite == STATISTICS:
        cases = [case for case in STATISTICS_CASES if name_matches(case, patterns)]
        longer = STEP_SECONDS * seconds / SECONDS
        jobs += [(suite, case, functools.partial(measure_statistics, case, longer)) for case in cases]
    if scaling:
        jobs += [of_case(case, "size", [TORCH]) for case in choose_cases(SIZE_CASES, patterns)]
        jobs += [of_threads(case) for case in choose_cases(THREAD_CASES, patterns)]
    if steps:
        jobs += [
            of_model(*job)
            for job in ((m, f) for m in MODELS for f in STEP_FORMATS)
            if name_matches(" ".join(job), patterns)
        ]
    return jobs


def available_peers(peers: Sequence[str], path: Path) -> list[str]:
    """The peers that run here; one line, and one record, about each that does not."""
    reasons = {peer: why_unavailable(peer) for peer in peers}
    for peer, reason in reasons.items():
        if reason is not None:
            click.echo(f"without {peer}: {reason}", err=True)
            append(path, [{"kind": "skipped", "peer": peer, "reason": reason}])
    return [peer for peer in peers if reasons[peer] is None]


def measure(jobs: Sequence[Job], path: Path, earlier: Sequence[Record]) -> None:
    """Run the jobs that the record does not have yet, and append what each yields at once."""
    try:
        with Counter(len(jobs)) as counter:
            for suite, name, run in jobs:
                counter.begin(name)
                found = [] if is_done(earlier, suite, name) else run()
                append(path, found)
                counter.end(name, outcome(found))
    except KeyboardInterrupt:
        click.echo(f"stopped; what was measured is in {path}: add --resume --out {path} to go on", err=True)
        raise


def outcome(records: Sequence[Record]) -> list[str]:
    """What is said of a case: how fast, or why not."""
    lines = [
        f"{record['peer']} {record['kind']}: {record['reason']}"
        for record in records
        if record["kind"] in ("failed", "skipped")
    ]
    for case in cases_of(records, ("quick", "full", "size", "threads", WHITENING)):
        ratios = {other: case.ratio(other) for other in (TORCH, MATRIX)}
        against = "".join(f", {times:.2f} times as fast as {other}" for other, times in ratios.items() if times)
        threads = case.record["threads"]
        lines.append(f"{case.record['pass']} {case.peers[OURS]['microseconds']:,.1f} us, {threads} threads{against}")
    costs = {record["peer"]: record["microseconds"] for record in records if record["kind"] == "cost"}
    if costs:
        others = (
            f"{peer} takes {time / costs[OURS]:.3f} times as long" for peer, time in costs.items() if peer != OURS
        )
        lines.append(f"{costs[OURS] / 1000:,.0f} ms; {', '.join(others)}")
    both = {record["peer"]: record["microseconds"] for record in records if record["kind"] == "step"}
    if both:
        lines.append(f"step {both[OURS] / 1000:,.0f} ms, {both[TORCH] / both[OURS]:.2f} times as fast as unconverted")
    return lines or ["measured before"]


class Counter:
    """Which case of how many runs, and what came out; on standard error, with a bar on a terminal."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.done = 0
        self.bars = None

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}")
            # drawn only between cases: a thread that redraws would take its time from what is measured
            self.bars = Progress(*columns, console=Console(stderr=True), auto_refresh=False)
            self.bars.start()
            self.task = self.bars.add_task("", total=self.total)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bars is not None:
            self.bars.stop()

    def begin(self, name: str) -> None:
        if self.bars is not None:
            self.bars.update(self.task, description=name, refresh=True)

    def end(self, name: str, lines: Sequence[str]) -> None:
        self.done += 1
        text = "\n".join([f"{self.done}/{self.total} {name}", *(f"    {line}" for line in lines)])
        if self.bars is None:
            # nobody may be reading any more, which is no reason to stop measuring
            with contextlib.suppress(OSError):
                click.echo(text, err=True)
        else:
            self.bars.console.print(text, markup=False, highlight=False)
            self.bars.advance(self.task)


def print_targets(found: Sequence[Target]) -> None:
    """One line per target."""
    for target in found:
        detail = f" ({target.detail})" if target.detail else ""
        click.echo(f"{verdict(target):7}  {target.name}: {target.value:.2f} of {target.wanted:.3g}{detail}")
