"""The tables of numbers of the page, as rows of text."""

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from batchnorm.report.drawing import Drawing
from batchnorm.report.metrics import ARMS
from batchnorm.report.records import PHASES, ArmTiming, Run
from batchnorm.report.text import number, percent

ROWS = 14


def final_accuracies(run: Run) -> dict[str, Any]:
    """Accuracy of every network at the last step: seed, plain, BN with running average, BN with Algorithm 2, gain."""
    last: dict[tuple[str, int], Any] = {}
    for row in run.evaluations:
        if (row.arm, row.seed) not in last or row.step > last[row.arm, row.seed].step:
            last[row.arm, row.seed] = row
    seeds = sorted({seed for _, seed in last})

    def value(arm: str, seed: int, name: str) -> float:
        row = last.get((arm, seed))
        return math.nan if row is None else getattr(row, name)

    columns = [
        [value("plain", seed, "test_accuracy") for seed in seeds],
        [value("bn", seed, "test_accuracy") for seed in seeds],
        [value("bn", seed, "test_accuracy_population") for seed in seeds],
    ]
    rows = [accuracy_row(number(seed), values) for seed, values in zip(seeds, zip(*columns, strict=True), strict=True)]
    mean = accuracy_row("Mean", [fmean(column) for column in columns]) if len(seeds) > 1 else None
    return {"rows": rows, "mean": mean}


def accuracy_row(name: str, values: Sequence[float]) -> list[str]:
    gain = 100 * (values[1] - values[0])
    return [name, *map(percent, values), f"{gain:+.2f}" if math.isfinite(gain) else percent(None)]


def selected_values(drawing: Drawing) -> dict[str, Any]:
    """The values of all curves at steps that are spread evenly on a logarithmic scale, for readers without script."""
    labels = drawing.panels[0].panel.labels
    groups = []
    for drawn in drawing.panels:
        names = [curve.name.replace(" percentile", "") for curve in drawn.panel.curves]
        groups.append({"title": drawn.panel.title, "names": names})
    curves = [curve for drawn in drawing.panels for curve in drawn.panel.curves]
    rows = [[labels[i], *(curve.text[i] for curve in curves)] for i in spread_out(drawing.panels[0].panel.positions)]
    return {"groups": groups, "rows": rows}


def spread_out(steps: Sequence[float], count: int = ROWS) -> list[int]:
    """Indices of the first, the last, and steps about evenly spaced in their logarithm between them.

    Example:
        >>> spread_out([0, 100, 200, 300, 400, 500, 1000, 5000, 10000], count=5)
        [0, 1, 5, 6, 8]
    """
    if len(steps) <= count:
        return list(range(len(steps)))
    low, high = math.log1p(max(steps[1], 0)), math.log1p(steps[-1])
    wanted = [math.expm1(low + (high - low) * i / (count - 2)) for i in range(count - 1)]
    nearest = {min(range(len(steps)), key=lambda i: abs(steps[i] - target)) for target in wanted}
    return sorted({0, len(steps) - 1} | nearest)


def step_costs(run: Run) -> dict[str, Any] | None:
    """Microseconds of a step by phase, and bars on one scale."""
    if not run.timing:
        return None
    totals = {timing.arm: sum(timing.step_microseconds.values()) for timing in run.timing}
    longest = max(totals.values()) or 1.0
    arms = [arm_costs(timing, longest) for timing in run.timing]
    return {"phases": PHASES, "arms": arms, "sentence": cost_sentence(run.timing, totals)}


def arm_costs(timing: ArmTiming, longest: float) -> dict[str, Any]:
    total = sum(timing.step_microseconds.values())
    decimals = 0 if total >= 100 else 1
    parts = [
        {"text": number(value, decimals), "width": f"{100 * value / longest:.2f}"}
        for value in timing.step_microseconds.values()
    ]
    return {
        "name": ARMS[timing.arm],
        "parts": parts,
        "total": number(total, decimals),
        "rate": number(timing.steps_per_second),
        "networks": number(timing.networks),
        "evaluation": number(timing.evaluation_seconds, 1),
        "checkpoint": number(timing.checkpoint_seconds, 1),
    }


def cost_sentence(timing: Sequence[ArmTiming], totals: dict[str, float]) -> str:
    """Which ratio BN costs and how many networks a step trains."""
    networks = {arm.networks for arm in timing}
    stack = (
        f" A step trains a stack of {number(max(networks))} networks, one per seed, at once."
        if max(networks) > 1
        else ""
    )
    if totals.get("plain", 0) > 0 and "bn" in totals:
        return (
            f"A step with BN takes {totals['bn'] / totals['plain']:.2f} times as long as one without.{stack}"
            f"{layers_sentence(timing)}"
        )
    return f"Time of one step by phase.{stack}{layers_sentence(timing)}"


def layers_sentence(timing: Sequence[ArmTiming]) -> str:
    """What the fused layers save, measured by turns in the same process."""
    for arm in timing:
        if arm.step_in_turn_microseconds is not None:
            before, after = (arm.step_in_turn_microseconds[layers] for layers in ("torch", "fused"))
            return (
                f" With torch's BN layers and a sigmoid after each it takes {number(before)} µs, with BN and sigmoid "
                f"in one kernel {number(after)} µs, measured by turns after the training."
            )
    return ""
