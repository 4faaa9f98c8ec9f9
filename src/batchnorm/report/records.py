"""The records of a finished run, read and checked: what is drawn is drawn from these and from nothing else."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from batchnorm.errors import RunError
from batchnorm.report.fields import (
    OPTIONAL_NUMBER,
    OPTIONAL_TEXT,
    broken,
    count,
    field,
    finite,
    fraction,
    items,
    one_of,
    optional_real,
    read_object,
    read_record,
    real,
)
from batchnorm.report.metrics import ARMS, Evaluation, read_evaluations
from batchnorm.report.text import clean

PHASES = ("batch", "forward", "backward", "optimizer")
VERDICTS = ("reproduced", "not reproduced", "not comparable")


class Claim(TypedDict):
    """One claim of the paper and its verdict, exactly as in claims.json."""

    name: str
    statement: str
    source: str
    rule: str
    paper: str | None
    unit: str
    values: list[float]
    mean: float | None
    low: float | None
    high: float | None
    verdict: str
    detail: str


@dataclass(frozen=True)
class ArmTiming:
    """What one step of an arm's stack of networks costs, and what its evaluations and checkpoints took."""

    arm: str
    networks: int
    steps_per_second: float
    step_microseconds: dict[str, float]  # by phase, in the order of PHASES
    evaluation_seconds: float
    checkpoint_seconds: float
    step_in_turn_microseconds: dict[str, float] | None = None  # with torch's layers and with the fused ones


@dataclass(frozen=True)
class Point:
    """Final test accuracy of both arms at one point of a sweep."""

    learning_rate: float
    init_std: float
    arms: dict[str, dict[str, float]]  # by arm: mean, low, high


@dataclass(frozen=True)
class Run:
    """A finished run. ``points`` and ``best`` are empty unless it is a sweep; only Figure 1 needs ``unit_drawn``."""

    folder: Path
    experiment: str
    options: dict[str, Any]
    notes: list[str]
    environment: dict[str, Any]
    evaluations: list[Evaluation]
    verdict: str
    unit_drawn: int | None
    claims: list[Claim]
    training_seconds: float
    timing: list[ArmTiming]
    points: list[Point]
    best: dict[str, tuple[float, float]]  # by arm: learning rate, init std


def load_run(folder: str | Path) -> Run:
    """Read the records of a finished run.

    Args:
        folder: holds config.json, environment.json, metrics.jsonl, claims.json, timing.json; a sweep also sweep.json.

    Returns:
        :class:`Run`.

    Raises:
        RunError: a record is missing, is not JSON, or has unexpected contents. One line says which, and what to do.

    Example:
        >>> load_run("no-such-folder")
        Traceback (most recent call last):
        batchnorm.errors.RunError: no-such-folder: not a folder; expected the folder of a finished run
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise RunError(f"{clean(str(folder))}: not a folder; expected the folder of a finished run")
    config, claims = read_record(folder / "config.json"), read_record(folder / "claims.json")
    timing = read_object(folder / "timing.json")
    sweep = read_record(folder / "sweep.json") if (folder / "sweep.json").exists() else None
    unit = field(claims, "unit_drawn", (int, type(None)), folder / "claims.json") if "unit_drawn" in claims else None
    return Run(
        folder=folder,
        experiment=field(config, "experiment", str, folder / "config.json"),
        options=field(config, "options", dict, folder / "config.json"),
        notes=[clean(note, 2000) for note in items(config, "notes", folder / "config.json")],
        environment=read_object(folder / "environment.json"),
        evaluations=read_evaluations(folder / "metrics.jsonl", unit, sweep is not None),
        verdict=one_of(claims, "verdict", VERDICTS, folder / "claims.json"),
        unit_drawn=unit,
        claims=[read_claim(claim, folder / "claims.json") for claim in items(claims, "claims", folder / "claims.json")],
        training_seconds=finite(timing, "training_seconds", folder / "timing.json"),
        timing=read_timing(timing, folder / "timing.json"),
        points=read_points(sweep, folder / "sweep.json") if sweep else [],
        best=read_best(sweep, folder / "sweep.json") if sweep else {},
    )


def read_claim(record: object, path: Path) -> Claim:
    if not isinstance(record, dict):
        raise broken(path, "a claim is not an object", "objects in 'claims'")
    where = f"claim {clean(record.get('name'), 60)}: "
    return Claim(
        name=field(record, "name", str, path, where),
        statement=field(record, "statement", str, path, where),
        source=field(record, "source", str, path, where),
        rule=field(record, "rule", str, path, where),
        paper=field(record, "paper", OPTIONAL_TEXT, path, where),
        unit=field(record, "unit", str, path, where),
        values=[real(value) for value in items(record, "values", path, where)],
        mean=optional_real(field(record, "mean", OPTIONAL_NUMBER, path, where)),
        low=optional_real(field(record, "low", OPTIONAL_NUMBER, path, where)),
        high=optional_real(field(record, "high", OPTIONAL_NUMBER, path, where)),
        verdict=one_of(record, "verdict", VERDICTS, path, where),
        detail=field(record, "detail", str, path, where),
    )


def read_timing(record: dict[str, Any], path: Path) -> list[ArmTiming]:
    arms = field(record, "arms", dict, path)
    timing = []
    for arm in ARMS:
        if arm not in arms:
            continue
        where = f"arm {arm}: "
        entry = field(arms, arm, dict, path)
        phases = field(entry, "step_microseconds", dict, path, where)
        timing.append(
            ArmTiming(
                arm=arm,
                networks=count(entry, "networks", path, where),
                steps_per_second=finite(entry, "steps_per_second", path, where),
                step_microseconds={phase: finite(phases, phase, path, where) for phase in PHASES},
                evaluation_seconds=finite(entry, "evaluation_seconds", path, where),
                checkpoint_seconds=finite(entry, "checkpoint_seconds", path, where),
                step_in_turn_microseconds=read_in_turn(entry, path, where),
            )
        )
    return timing


def read_in_turn(entry: dict[str, Any], path: Path, where: str) -> dict[str, float] | None:
    """Records of earlier versions have no such comparison, nor has an arm without BN."""
    if "step_in_turn_microseconds" not in entry:
        return None
    times = field(entry, "step_in_turn_microseconds", dict, path, where)
    return {layers: finite(times, layers, path, where) for layers in ("torch", "fused")}


def read_points(record: dict[str, Any], path: Path) -> list[Point]:
    points = []
    for i, entry in enumerate(items(record, "points", path)):
        where = f"point {i}: "
        if not isinstance(entry, dict):
            raise broken(path, f"{where}not an object", "objects in 'points'")
        arms = field(entry, "arms", dict, path, where)
        found = {arm: field(arms, arm, dict, path, where) for arm in ARMS if arm in arms}
        rate = finite(entry, "learning_rate", path, where)
        if rate <= 0:
            raise broken(path, f"{where}learning_rate is {rate}", "a number above 0")
        accuracies = {
            arm: {key: fraction(value, key, path, where) for key in ("mean", "low", "high")}
            for arm, value in found.items()
        }
        points.append(Point(rate, finite(entry, "init_std", path, where), accuracies))
    if not points:
        raise broken(path, "no points", "at least one")
    return points


def read_best(record: dict[str, Any], path: Path) -> dict[str, tuple[float, float]]:
    best = field(record, "best", dict, path)
    found = {arm: field(best, arm, dict, path, "best: ") for arm in ARMS if arm in best}
    return {
        arm: (
            finite(point, "learning_rate", path, f"best {arm}: "),
            finite(point, "init_std", path, f"best {arm}: "),
        )
        for arm, point in found.items()
    }
