"""What the records of every finished run have in common, read and checked: nothing else is drawn."""

from collections.abc import Mapping
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
    items,
    one_of,
    optional_real,
    read_object,
    read_record,
    real,
)
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
class Run:
    """What every finished run has. ``names`` are the arms as a reader sees them, in the order of the report."""

    folder: Path
    experiment: str
    options: dict[str, Any]
    notes: list[str]
    environment: dict[str, Any]
    verdict: str
    claims: list[Claim]
    training_seconds: float
    timing: list[ArmTiming]
    names: dict[str, str]


@dataclass(frozen=True)
class Records:
    """The JSON objects in the folder of a run. Each file is there and is an object; its fields are still unchecked."""

    folder: Path
    config: dict[str, Any]
    claims: dict[str, Any]
    environment: dict[str, Any]
    timing: dict[str, Any]


def read_records(folder: str | Path) -> Records:
    """The files that every run leaves.

    Raises:
        RunError: one is missing, is not JSON, or has another schema version.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise RunError(f"{clean(str(folder))}: not a folder; expected the folder of a finished run")
    return Records(
        folder=folder,
        config=read_record(folder / "config.json"),
        claims=read_record(folder / "claims.json"),
        environment=read_object(folder / "environment.json"),
        timing=read_object(folder / "timing.json"),
    )


def read_run(records: Records, names: Mapping[str, str]) -> Run:
    """The fields that every run has, for arms with these names."""
    config, claims, timing = (records.folder / name for name in ("config.json", "claims.json", "timing.json"))
    return Run(
        folder=records.folder,
        experiment=field(records.config, "experiment", str, config),
        options=field(records.config, "options", dict, config),
        notes=[clean(note, 2000) for note in items(records.config, "notes", config)],
        environment=records.environment,
        verdict=one_of(records.claims, "verdict", VERDICTS, claims),
        claims=[read_claim(claim, claims) for claim in items(records.claims, "claims", claims)],
        training_seconds=finite(records.timing, "training_seconds", timing),
        timing=read_timing(records.timing, names, timing),
        names=dict(names),
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


def read_timing(record: dict[str, Any], names: Mapping[str, str], path: Path) -> list[ArmTiming]:
    arms = field(record, "arms", dict, path)
    timing = []
    for arm in names:
        if arm not in arms:
            continue
        where = f"arm {clean(arm, 60)}: "
        entry = arms[arm]
        if not isinstance(entry, dict):
            raise broken(path, f"{where}{clean(entry, 40)}", "an object")
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
    """Only the arms with BN of some experiments have such a comparison."""
    if "step_in_turn_microseconds" not in entry:
        return None
    times = field(entry, "step_in_turn_microseconds", dict, path, where)
    return {layers: finite(times, layers, path, where) for layers in ("torch", "fused")}
