"""The records of an MNIST run, and of its sweep."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchnorm.report.fields import broken, count, field, finite, fraction, objects, one_of, read_record
from batchnorm.report.metrics import Evaluation, check_complete, read_rows
from batchnorm.report.records import Records, Run, read_run

ARMS = {"plain": "without BN", "bn": "with BN"}


@dataclass(frozen=True)
class MnistEvaluation(Evaluation):
    """Test accuracy, with running averages and with Algorithm 2, and the inputs of the last hidden layer's sigmoids."""

    accuracy_population: float
    percentiles: list[list[float]] | None  # three lists, 15th, 50th and 85th, of one number per unit


@dataclass(frozen=True)
class Point:
    """Final test accuracy of both arms at one point of a sweep."""

    learning_rate: float
    init_std: float
    arms: dict[str, dict[str, float]]  # by arm: mean, low, high


@dataclass(frozen=True)
class MnistRun(Run):
    """A run of both arms. ``points`` and ``best`` are empty unless it is a sweep; only Figure 1 needs a unit."""

    evaluations: list[MnistEvaluation]
    unit_drawn: int | None
    points: list[Point]
    best: dict[str, tuple[float, float]]  # by arm: learning rate, init std


def read_mnist(records: Records) -> MnistRun:
    claims, path = records.folder / "claims.json", records.folder / "sweep.json"
    sweep = read_record(path) if path.exists() else None
    unit = field(records.claims, "unit_drawn", (int, type(None)), claims) if "unit_drawn" in records.claims else None
    return MnistRun(
        **vars(read_run(records, ARMS)),
        evaluations=read_evaluations(records.folder / "metrics.jsonl", unit, sweep is not None),
        unit_drawn=unit,
        points=read_points(sweep, path) if sweep else [],
        best=read_best(sweep, path) if sweep else {},
    )


def read_evaluations(path: Path, unit: int | None, sweep: bool) -> list[MnistEvaluation]:
    """All rows; unless they belong to a sweep, every network of an arm must have the same steps."""
    rows = [read_evaluation(row, path, where, None if sweep else unit) for row, where in read_rows(path)]
    if not sweep:
        check_complete(rows, path)
    return rows


def read_evaluation(row: dict[str, Any], path: Path, where: str, unit: int | None) -> MnistEvaluation:
    percentiles = row.get("percentiles")
    if unit is not None:
        lists = percentiles if isinstance(percentiles, list) else []
        if len(lists) != 3 or not all(isinstance(units, list) and len(units) > unit >= 0 for units in lists):
            raise broken(path, f"{where}no percentiles of unit {unit}", "three lists of a number per unit")
    return MnistEvaluation(
        arm=one_of(row, "arm", tuple(ARMS), path, where),
        seed=count(row, "seed", path, where),
        step=count(row, "step", path, where),
        accuracy=fraction(row, "test_accuracy", path, where),
        accuracy_population=fraction({"test_accuracy_population": None} | row, "test_accuracy_population", path, where),
        percentiles=percentiles,
    )


def read_points(record: dict[str, Any], path: Path) -> list[Point]:
    points = []
    for i, entry in enumerate(objects(record, "points", path)):
        where = f"point {i}: "
        rate = finite(entry, "learning_rate", path, where)
        if rate <= 0:
            raise broken(path, f"{where}learning_rate is {rate}", "a number above 0")
        accuracies = {
            arm: {key: fraction(value, key, path, where) for key in ("mean", "low", "high")}
            for arm, value in of_arms(field(entry, "arms", dict, path, where), path, where).items()
        }
        points.append(Point(rate, finite(entry, "init_std", path, where), accuracies))
    if not points:
        raise broken(path, "no points", "at least one")
    return points


def read_best(record: dict[str, Any], path: Path) -> dict[str, tuple[float, float]]:
    best = of_arms(field(record, "best", dict, path), path, "best: ")
    return {
        arm: (
            finite(point, "learning_rate", path, f"best {arm}: "),
            finite(point, "init_std", path, f"best {arm}: "),
        )
        for arm, point in best.items()
    }


def of_arms(record: dict[str, Any], path: Path, where: str) -> dict[str, dict[str, Any]]:
    """The object of each arm that is there."""
    return {arm: field(record, arm, dict, path, where) for arm in ARMS if arm in record}
