"""One offline page per run: verdict, claims, figure, accuracies, costs, settings."""

import base64
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from batchnorm.report.drawing import Drawing
from batchnorm.report.records import Claim, Run
from batchnorm.report.sweep import heat_table
from batchnorm.report.tables import final_accuracies, selected_values, step_costs
from batchnorm.report.text import NOTHING, clean, number
from batchnorm.report.verdict import SYMBOLS, measured, paper_number, summary

HERE = Path(__file__).parent
TITLES = {"mnist": "MNIST with and without batch normalization"}
SOURCES = {"mnist": "Ioffe & Szegedy 2015, section 4.1"}
KINDS = {"reproduced": "good", "not reproduced": "bad", "not comparable": "open"}
SENTENCES = {"reproduced": "Reproduced.", "not reproduced": "Not reproduced.", "not comparable": "Not comparable."}
LONG_LIMIT = 1000
ROWS_LIMIT = 100


def render_page(run: Run, drawing: Drawing) -> bytes:
    """The page of a run. It depends on its arguments alone and asks the network for nothing.

    Args:
        run: records as :func:`~batchnorm.report.load_run` gives them.
        drawing: Figure 1 or the sweep, drawn from the same run.

    Returns:
        HTML in UTF-8.
    """
    script = (HERE / "page.js").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template("page.html").render(
        title=title(run),
        source=SOURCES.get(run.experiment, ""),
        verdict=overall(run),
        facts=facts(run),
        claims=[claim_row(claim) for claim in run.claims[:ROWS_LIMIT]],
        figure=figure(drawing, not run.points),
        heat=heat_table(run) if run.points else None,
        finals=None if run.points else final_accuracies(run),
        timing=step_costs(run),
        notes=[clean(note, LONG_LIMIT) for note in run.notes[:ROWS_LIMIT]],
        options=field_rows(run.options),
        environment=field_rows(flat(run.environment)),
        style=Markup((HERE / "page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        data=script_data(drawing),
    )
    return page.encode("utf-8", "backslashreplace")


def title(run: Run) -> str:
    name = TITLES.get(run.experiment, clean(run.experiment, 80))
    return f"{name}: the sweep" if run.points else name


def overall(run: Run) -> dict[str, str]:
    return {
        "kind": KINDS[run.verdict],
        "symbol": SYMBOLS[run.verdict],
        "word": run.verdict,
        "sentence": SENTENCES[run.verdict],
        "summary": summary(run.claims),
    }


def facts(run: Run) -> str:
    """Size of the run and its machine, in one line."""
    options, parts = run.options, []
    for name, template in (("steps", "{} steps"), ("batch_size", "{} examples per step")):
        if isinstance(options.get(name), int):
            parts.append(template.format(number(options[name])))
    if isinstance(options.get("seeds"), list):
        parts.append(f"{len(options['seeds'])} seeds" if len(options["seeds"]) != 1 else "one seed")
    parts.append(f"trained in {number(run.training_seconds)} s")
    if run.environment.get("cpu"):
        parts.append(f"on {clean(run.environment['cpu'], 80)}")
    return ", ".join(parts)


def claim_row(claim: Claim) -> dict[str, str]:
    mean, interval = measured(claim)
    return {
        "kind": KINDS[claim["verdict"]],
        "symbol": SYMBOLS[claim["verdict"]],
        "verdict": claim["verdict"],
        "statement": clean(claim["statement"], LONG_LIMIT),
        "source": clean(claim["source"]),
        "paper": paper_number(claim),
        "mean": mean,
        "interval": interval,
        "detail": clean(claim["detail"], LONG_LIMIT),
        "rule": clean(claim["rule"], LONG_LIMIT),
    }


def figure(drawing: Drawing, steps: bool) -> dict[str, Any]:
    """The panels as the template wants them, each with the values at its right end."""
    panels = []
    for drawn in drawing.panels:
        panel = drawn.panel
        readings = [{"name": curve.name, "color": curve.color, "text": curve.text[-1]} for curve in panel.curves]
        shown = {"id": f"panel-{panel.name}", "svg": Markup(drawn.svg), "description": panel.description}
        shown["inches"] = panel.width
        panels.append(shown | {"at": panel.labels[-1], "readings": readings})
    row = drawing.panels[: drawing.columns]
    return {
        "name": drawing.name,
        "heading": "Figure 1" if steps else "Accuracy over learning rate",
        "axis": "step" if steps else "learning rate",
        "columns": " ".join(f"minmax(0, {drawn.panel.width:g}fr)" for drawn in row),
        "panels": panels,
        "caption": drawing.caption,
        "table": selected_values(drawing) if steps else None,
    }


def field_rows(fields: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = [(clean(name, 80), NOTHING if value is None else shown(value)) for name, value in fields.items()]
    hidden = len(rows) - ROWS_LIMIT
    return rows if hidden <= 0 else [*rows[:ROWS_LIMIT], ("…", f"and {number(hidden)} more")]


def shown(value: Any) -> str:
    """A list of plain values as words, anything else as it would stand in JSON."""
    if isinstance(value, list) and all(isinstance(item, str | int | float) for item in value):
        return clean(", ".join(item if isinstance(item, str) else json.dumps(item) for item in value))
    return clean(value)


def flat(environment: Mapping[str, Any]) -> dict[str, Any]:
    """The environment with a row of its own for every package that is installed."""
    packages = environment.get("packages")
    rows = {name: value for name, value in environment.items() if name != "packages" or not isinstance(packages, dict)}
    installed = packages if isinstance(packages, dict) else {}
    return rows | {f"{name} (package)": version for name, version in installed.items() if version is not None}


def script_data(drawing: Drawing) -> Markup:
    """What the script needs of every panel, as JSON that cannot end its own element."""
    panels = [
        {
            "id": f"panel-{drawn.panel.name}",
            "box": drawn.box,
            "x": drawn.x,
            "labels": drawn.panel.labels,
            "curves": [
                {"color": curve.color, "y": y, "text": curve.text}
                for curve, y in zip(drawn.panel.curves, drawn.y, strict=True)
            ],
        }
        for drawn in drawing.panels
    ]
    text = json.dumps(panels, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)
