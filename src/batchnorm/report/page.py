"""One offline page per run: verdict, claims, what the experiment shows, settings."""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from batchnorm.report.contents import Contents
from batchnorm.report.drawing import Drawing
from batchnorm.report.records import Claim, Run
from batchnorm.report.text import NOTHING, clean, joined, number
from batchnorm.report.verdict import SYMBOLS, measured, paper_number, summary

HERE = Path(__file__).parent
KINDS = {"reproduced": "good", "not reproduced": "bad", "not comparable": "open"}
SENTENCES = {"reproduced": "Reproduced.", "not reproduced": "Not reproduced.", "not comparable": "Not comparable."}
LONG_LIMIT = 1000
ROWS_LIMIT = 100


def render_page(run: Run, contents: Contents) -> bytes:
    """The page of a run. It depends on its arguments alone and asks the network for nothing.

    Args:
        run: records as :func:`~batchnorm.report.load_run` gives them.
        contents: what the experiment shows of them.

    Returns:
        HTML in UTF-8.
    """
    script = (HERE / "page.js").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template("page.html").render(
        title=contents.title,
        source=contents.source,
        verdict=overall(run),
        banner=contents.banner,
        facts=facts(run),
        claims=[claim_row(claim) for claim in run.claims[:ROWS_LIMIT]],
        sections=contents.sections,
        notes=[clean(note, LONG_LIMIT) for note in run.notes[:ROWS_LIMIT]],
        options=field_rows(run.options),
        environment=field_rows(flat(run.environment)),
        records=contents.records,
        files=files(contents.drawings),
        style=Markup("".join((HERE / name).read_text(encoding="utf-8") for name in contents.styles)),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        data=script_data(contents.drawings),
    )
    return page.encode("utf-8", "backslashreplace")


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
    if isinstance(options.get("networks"), int):
        parts.append(f"{number(options['networks'])} networks")
    elif isinstance(options.get("seeds"), list):
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


def files(drawings: Sequence[Drawing]) -> str:
    names = joined([f"{drawing.name}.{kind}" for drawing in drawings for kind in ("svg", "png")])
    return f"The figure is also in {names}." if len(drawings) == 1 else f"The figures are also in {names}."


def field_rows(fields: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = [(clean(name, 80), NOTHING if value is None else shown(value)) for name, value in fields.items()]
    hidden = len(rows) - ROWS_LIMIT
    return rows if hidden <= 0 else [*rows[:ROWS_LIMIT], ("…", f"and {number(hidden)} more")]


def shown(value: Any) -> str:
    """A list of plain values as words, anything else as it would stand in JSON."""
    if isinstance(value, list) and all(isinstance(item, str | int | float) for item in value):
        return clean(", ".join(item if isinstance(item, str) else json.dumps(item) for item in value)) or NOTHING
    return clean(value)


def flat(environment: Mapping[str, Any]) -> dict[str, Any]:
    """The environment with a row of its own for every package that is installed."""
    packages = environment.get("packages")
    rows = {name: value for name, value in environment.items() if name != "packages" or not isinstance(packages, dict)}
    installed = packages if isinstance(packages, dict) else {}
    return rows | {f"{name} (package)": version for name, version in installed.items() if version is not None}


def script_data(drawings: Sequence[Drawing]) -> Markup:
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
        for drawing in drawings
        for drawn in drawing.panels
    ]
    text = json.dumps(panels, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)
