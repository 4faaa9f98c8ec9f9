"""The rows of metrics.jsonl: one per network and evaluation."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchnorm.report.fields import broken, read_bytes
from batchnorm.report.text import clean


@dataclass(frozen=True)
class Evaluation:
    """What one network had reached at one step. ``accuracy`` is NaN where it was not finite or not recorded."""

    arm: str
    seed: int
    step: int
    accuracy: float


def read_rows(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """The rows of metrics.jsonl, each with the words that say where it is."""
    i = 0
    for i, line in enumerate(read_bytes(path).splitlines(), start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise broken(path, f"line {i} is not JSON", "one JSON object a line") from error
        if not isinstance(row, dict):
            raise broken(path, f"line {i} is not an object", "one JSON object a line")
        yield row, f"line {i}: "
    if not i:
        raise broken(path, "empty", "one row per evaluation")


def check_complete(rows: Sequence[Evaluation], path: Path) -> None:
    """Every network of an arm was evaluated at the same steps, each once."""
    steps: dict[tuple[str, int], list[int]] = {}
    for row in rows:
        steps.setdefault((row.arm, row.seed), []).append(row.step)
    longest: dict[str, list[int]] = {}
    for (arm, _), found in steps.items():
        longest[arm] = max(longest.get(arm, []), found, key=len)
    for (arm, seed), found in steps.items():
        expected, name = longest[arm], f"seed {seed} of arm {clean(arm, 60)}"
        if len(set(found)) < len(found):
            raise broken(path, f"{name} has a step twice", "each step once")
        if sorted(found) != sorted(expected):
            problem = f"{name} has {len(found)} evaluations up to step {max(found)}"
            raise broken(path, problem, f"{len(expected)} up to step {max(expected)}")
