"""Studies: small experiments with arms and seeds, all run in one way.

A study is one file with a ``STUDY``: its settings, its arms, ``run`` for one network, and ``conclude``, which makes
claims, panels and tables of everybody's rows. What a run folder holds and how it is resumed is the same for all.
"""

import dataclasses
import functools
import importlib
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from batchnorm.environment import describe_environment
from batchnorm.experiments.catalogue import BY_NAME
from batchnorm.experiments.claims import Claim, claims_record, judge
from batchnorm.experiments.run_folder import TIMING, WORK, finish_run, open_run
from batchnorm.experiments.training import Timing, describe_timing
from batchnorm.experiments.workers import report_progress, run_jobs, should_stop
from batchnorm.files import finite, write_json

Row = dict[str, Any]


class Outcome(NamedTuple):
    """What one arm and seed gave: rows of the metrics, and where the time of its steps went, if it was trained.

    ``steps``: how many these were, if not those of the options.
    """

    rows: list[Row]
    timing: Timing | None = None
    steps: int | None = None


class Place(NamedTuple):
    """Where a job works: its name, the folder of its checkpoints, and how it talks to whoever waits for it."""

    name: str
    folder: Path
    on_progress: Callable[[int], None] = lambda step: None
    should_stop: Callable[[], bool] = lambda: False


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of a panel: y against x, with a band from low to high where there are several seeds."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


@dataclasses.dataclass(frozen=True)
class Panel:
    """A pair of axes: what it shows, what its axes are, and whether they are logarithmic."""

    name: str
    title: str
    x: str
    y: str
    lines: Sequence[Line]
    x_log: bool = False
    y_log: bool = False


@dataclasses.dataclass(frozen=True)
class Table:
    """Texts under heads; the first cell of a row names it."""

    name: str
    heading: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""


@dataclasses.dataclass(frozen=True)
class Conclusion:
    """What a study ends with. ``caption`` says what the reader must know beside the panels."""

    claims: Sequence[Claim]
    panels: Sequence[Panel]
    tables: Sequence[Table] = ()
    caption: str = ""


@dataclasses.dataclass(frozen=True)
class Study:
    """An experiment of arms and seeds.

    Attributes:
        title: of its page.
        options: the settings, a frozen dataclass with ``steps`` and ``seeds``: all that determines the numbers.
        quick: the fields that a trial changes.
        notes: what the source leaves open, and how that was settled.
        arms: of these settings, in the order of the report.
        run: one arm and seed, in a process of one thread.
        conclude: from the rows of all.
    """

    title: str
    options: Any
    quick: dict[str, Any]
    notes: Sequence[str]
    arms: Callable[[Any], Sequence[str]]
    run: Callable[[str, int, Any, Place], Outcome]
    conclude: Callable[[list[Row], Any], Conclusion]


def study_named(name: str) -> Study:
    """The study of an entry of the catalogue."""
    module = BY_NAME[name].module
    assert module is not None
    return importlib.import_module(module).STUDY


def reproduce_study(
    name: str,
    options: Any,
    folder: Path,
    *,
    workers: int = 1,
    resume: bool = False,
    force: bool = False,
    on_progress: Callable[[str, int], None] = lambda job, step: None,
) -> dict[str, Any]:
    """Run every arm for every seed, write the run folder, and return its claims.

    Args:
        name: of the study, in the catalogue.
        options: its settings.
        folder: of the run: config, environment, metrics, timing, claims with panels and tables.
        workers: processes of one thread each.
        resume: continue a stopped run; networks go on bit for bit.
        force: delete an earlier run in the folder.
        on_progress: called with a job's name and its finished steps.

    Returns:
        The record that ``claims.json`` holds.

    Raises:
        RunError: the folder cannot be used as asked, or a worker died.
    """
    study = study_named(name)
    config = {
        "schema_version": 1,
        "experiment": name,
        "options": dataclasses.asdict(options),
        "notes": list(study.notes),
    }
    with open_run(folder, config, resume=resume, force=force) as record:
        if record is None:
            rows, arms = run_all(name, study, options, folder, workers, on_progress), list(study.arms(options))
            conclusion = study.conclude(rows, options)
            extra = {
                "title": study.title,
                "source": BY_NAME[name].source,
                "arms": arms,
                "panels": [dataclasses.asdict(panel) for panel in conclusion.panels],
                "tables": [dataclasses.asdict(table) for table in conclusion.tables],
                "caption": conclusion.caption,
            }
            record = finish_run(folder, rows, claims_record(name, list(conclusion.claims), **finite(extra)))
    return record


def run_all(
    name: str, study: Study, options: Any, folder: Path, workers: int, on_progress: Callable[[str, int], None]
) -> list[Row]:
    """The rows of all arms and seeds; what the steps took goes into ``timing.json``."""
    pairs = [(arm, seed) for arm in study.arms(options) for seed in options.seeds]
    workers = min(workers, len(pairs))
    write_json(folder / "environment.json", {**describe_environment(), "threads": workers})
    (folder / WORK).mkdir(exist_ok=True)
    started = time.perf_counter()
    jobs = [(job_name(arm, seed), (name, arm, seed, options, folder / WORK)) for arm, seed in pairs]
    outcomes = run_jobs(run_job, jobs, workers=workers, on_progress=on_progress)
    arms = {}
    for (arm, _), outcome in zip(pairs, outcomes.values(), strict=True):
        if outcome.timing is not None and arm not in arms:
            arms[arm] = describe_timing(outcome.timing, outcome.steps or options.steps, 1)
    spent = [sum(outcome.timing) for outcome in outcomes.values() if outcome.timing is not None]
    # a resumed run took longer than this session
    seconds = max(time.perf_counter() - started, sum(spent) / workers)
    write_json(folder / TIMING, {"training_seconds": round(seconds, 2), "arms": arms})
    return [finite(row) for outcome in outcomes.values() for row in outcome.rows]


def job_name(arm: str, seed: int) -> str:
    """Also a file name.

    Example:
        >>> job_name("BN, batch 2", 0)
        'BN-batch-2-seed0'
    """
    words = "".join(letter if letter.isalnum() or letter in ".+" else " " for letter in arm).split()
    return f"{'-'.join(words)}-seed{seed}"


def run_job(name: str, arm: str, seed: int, options: Any, folder: Path) -> Outcome:
    """One arm and seed, in a worker."""
    job = job_name(arm, seed)
    place = Place(job, folder, functools.partial(report_progress, job), should_stop)
    outcome = study_named(name).run(arm, seed, options, place)
    # also where there was nothing to train, or nothing left
    place.on_progress(options.steps)
    rows = [{"arm": arm, "seed": seed, **row} for row in outcome.rows]
    return Outcome(rows, outcome.timing)


def claim(
    name: str,
    statement: str,
    values: list[float],
    *,
    source: str,
    rule: str,
    unit: str,
    detail: str,
    paper: str | None = None,
    above: float | None = None,
    below: float | None = None,
) -> Claim:
    """A claim with a value per seed: reproduced if the 95 % interval of their mean lies above, or below, a bound.

    ``rule`` says what the values are; the sentence about the interval is added to it.
    """
    mean, low, high, verdict = judge(values, above=above, below=below)
    side = f"above {above:g}" if above is not None else f"below {below:g}"
    return Claim(
        name=name,
        statement=statement,
        source=source,
        rule=f"{rule}; the 95 % interval over seeds lies {side}",
        paper=paper,
        unit=unit,
        values=values,
        mean=mean,
        low=low,
        high=high,
        verdict=verdict,
        detail=detail,
    )


def of_arm(rows: Iterable[Row], arm: str, seed: int | None = None) -> list[Row]:
    """The rows of an arm, of one seed or of all."""
    return [row for row in rows if row["arm"] == arm and seed in (None, row["seed"])]


def values_at_end(rows: Iterable[Row], arm: str, field: str) -> list[float]:
    """The last value of every seed of an arm; NaN where it is not a finite number."""
    last: dict[int, Row] = {}
    for row in of_arm(rows, arm):
        last[row["seed"]] = row
    return [float("nan") if row[field] is None else row[field] for row in last.values()]


def line(rows: Iterable[Row], arm: str, field: str, *, x: str = "step", name: str | None = None) -> Line:
    """A field of an arm over steps: the mean over the seeds, and a band from the lowest to the highest.

    Example:
        >>> rows = [{"arm": "BN", "seed": seed, "step": 0, "loss": 1.0 + seed} for seed in (0, 1)]
        >>> line(rows, "BN", "loss")
        Line(name='BN', x=[0], y=[1.5], low=[1.0], high=[2.0])
    """
    at: dict[float, list[float]] = {}
    for row in of_arm(rows, arm):
        at.setdefault(row[x], []).append(float("nan") if row[field] is None else row[field])
    places = sorted(at)
    columns = [at[place] for place in places]
    bands = len(columns[0]) > 1 if columns else False
    return Line(
        name or arm,
        places,
        [sum(column) / len(column) for column in columns],
        [min(column) for column in columns] if bands else None,
        [max(column) for column in columns] if bands else None,
    )
