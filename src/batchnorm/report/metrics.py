"""The rows of metrics.jsonl: one per network and evaluation."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchnorm.report.fields import broken, count, fraction, one_of, read_bytes

ARMS = {"plain": "without BN", "bn": "with BN"}


@dataclass(frozen=True)
class Evaluation:
    """One row of metrics.jsonl. A number that was not recorded, or was not finite, is NaN."""

    arm: str
    seed: int
    step: int
    test_accuracy: float
    test_accuracy_population: float
    percentiles: list[list[float]] | None  # three lists, 15th, 50th and 85th, of one number per unit


def read_evaluations(path: Path, unit: int | None, sweep: bool) -> list[Evaluation]:
    """All rows of metrics.jsonl; unless it belongs to a sweep, every network of an arm must have the same steps."""
    rows = []
    for i, line in enumerate(read_bytes(path).splitlines(), start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise broken(path, f"line {i} is not JSON", "one JSON object a line") from error
        if not isinstance(row, dict):
            raise broken(path, f"line {i} is not an object", "one JSON object a line")
        rows.append(read_evaluation(row, path, i, None if sweep else unit))
    if not rows:
        raise broken(path, "empty", "one row per evaluation")
    if not sweep:
        check_complete(rows, path)
    return rows


def read_evaluation(row: dict[str, Any], path: Path, line: int, unit: int | None) -> Evaluation:
    where = f"line {line}: "
    percentiles = row.get("percentiles")
    if unit is not None:
        lists = percentiles if isinstance(percentiles, list) else []
        if len(lists) != 3 or not all(isinstance(units, list) and len(units) > unit >= 0 for units in lists):
            raise broken(path, f"{where}no percentiles of unit {unit}", "three lists of a number per unit")
    return Evaluation(
        arm=one_of(row, "arm", tuple(ARMS), path, where),
        seed=count(row, "seed", path, where),
        step=count(row, "step", path, where),
        test_accuracy=fraction(row, "test_accuracy", path, where),
        test_accuracy_population=fraction(
            {"test_accuracy_population": None} | row, "test_accuracy_population", path, where
        ),
        percentiles=percentiles,
    )


def check_complete(rows: list[Evaluation], path: Path) -> None:
    """Every network of an arm was evaluated at the same steps, each once."""
    steps: dict[tuple[str, int], list[int]] = {}
    for row in rows:
        steps.setdefault((row.arm, row.seed), []).append(row.step)
    longest: dict[str, list[int]] = {}
    for (arm, _), found in steps.items():
        longest[arm] = max(longest.get(arm, []), found, key=len)
    for (arm, seed), found in steps.items():
        expected = longest[arm]
        if len(set(found)) < len(found):
            raise broken(path, f"seed {seed} of arm {arm} has a step twice", "each step once")
        if sorted(found) != sorted(expected):
            problem = f"seed {seed} of arm {arm} has {len(found)} evaluations up to step {max(found)}"
            raise broken(path, problem, f"{len(expected)} up to step {max(expected)}")
