"""The parts of a page that more than one experiment has: a figure with its values, and what a step costs."""

import math
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from batchnorm.report.contents import Section
from batchnorm.report.drawing import Drawing
from batchnorm.report.records import PHASES, ArmTiming, Run
from batchnorm.report.text import number

ROWS = 14
MILLISECONDS_FROM = 10_000  # microseconds


def figure_section(
    drawing: Drawing, heading: str, *, name: str = "", axis: str = "step", table: bool = True
) -> Section:
    """The panels, each with the values at its right end; beside a single panel there is room for them.

    Args:
        drawing: the figure.
        heading: of the section.
        name: unique in the page, for links; the drawing's by default.
        axis: what the positions are.
        table: whether the values at selected positions are listed too.
    """
    panels = []
    for drawn in drawing.panels:
        panel = drawn.panel
        readings = [
            {"name": curve.name, "color": curve.color, "text": curve.text[-1], "dashes": sample(curve.dashes)}
            for curve in panel.curves
        ]
        shown = {"id": f"panel-{panel.name}", "svg": Markup(drawn.svg), "description": panel.description}
        shown |= {"inches": panel.width, "unlabelled": round(1 - panel.right / panel.width, 3)}
        panels.append(shown | {"axis": panel.axis or axis, "at": panel.labels[-1], "readings": readings})
    row = drawing.panels[: drawing.columns]
    content = {
        "id": name or drawing.name,
        "heading": heading,
        "columns": " ".join(f"minmax(0, {drawn.panel.width:g}fr)" for drawn in row),
        "panels": panels,
        "beside": len(panels) == 1,
        "caption": drawing.caption,
        "table": selected_values(drawing) if table else None,
    }
    return Section("figure.html", content)


def sample(dashes: Sequence[float] | None) -> str | None:
    """The dashes of a sample of the line, two units wide, as SVG has them; None where color says it all."""
    return None if dashes is None else " ".join(f"{2 * length:g}" for length in dashes)


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


def timing_section(
    run: Run, sentence: str, *, head: str = "One step", phases: Sequence[str] = PHASES, shares: bool = True
) -> Section:
    """What a step costs by phase, with bars on one scale; left out if there are no timings.

    Args:
        run: whose timings.
        sentence: what they say.
        head: whose step it is.
        phases: what the reader calls the phases.
        shares: whether the share of waiting for data is given too.
    """
    if not run.timing:
        return Section("timing.html", None)
    longest = max(step_total(timing) for timing in run.timing) or 1.0
    scale, unit = (1e-3, "ms") if longest >= MILLISECONDS_FROM else (1.0, "µs")
    arms = [arm_costs(timing, run.names[timing.arm], longest, scale, shares) for timing in run.timing]
    content = {"phases": phases, "arms": arms, "sentence": sentence, "head": head, "unit": unit}
    return Section("timing.html", content)


def step_total(timing: ArmTiming) -> float:
    """Microseconds."""
    return sum(timing.step_microseconds.values())


def data_share(timing: ArmTiming) -> float:
    """The part of a step that waits for data."""
    return timing.step_microseconds["batch"] / (step_total(timing) or 1.0)


def arm_costs(timing: ArmTiming, name: str, longest: float, scale: float, shares: bool) -> dict[str, Any]:
    total = step_total(timing) * scale
    decimals = 0 if total >= 100 else 1
    parts = [
        {
            "text": number(value * scale, decimals),
            "width": f"{100 * value / longest:.2f}",
            "share": f"{100 * data_share(timing):.1f} %" if shares and phase == "batch" else "",
        }
        for phase, value in timing.step_microseconds.items()
    ]
    return {
        "name": name,
        "parts": parts,
        "total": number(total, decimals),
        "rate": number(timing.steps_per_second),
        "networks": number(timing.networks),
        "evaluation": number(timing.evaluation_seconds, 1),
        "checkpoint": number(timing.checkpoint_seconds, 1),
    }
