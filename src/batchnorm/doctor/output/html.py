"""The ``html`` format: one offline page without a script."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

import batchnorm.report
from batchnorm.doctor.catalogue import RULES
from batchnorm.doctor.checkpoint import STATISTICS, Layer
from batchnorm.doctor.examine import Examination
from batchnorm.doctor.finding import Finding, Severity
from batchnorm.doctor.output.groups import Group, asked, counted, counts, grouped
from batchnorm.doctor.output.names import layer_name, shown
from batchnorm.report.text import NOTHING, number

HERE = Path(__file__).parent
STYLES = (Path(batchnorm.report.__file__).with_name("page.css"), HERE / "page.css")
KINDS = {Severity.ERROR: "bad", Severity.WARNING: "warn", Severity.INFO: "open"}
SYMBOLS = {
    Severity.ERROR: "\N{BALLOT X}",
    Severity.WARNING: "!",
    Severity.INFO: "i",
    None: "\N{CHECK MARK}",
}
# of one table; the rest is counted
MOST_ROWS = 1000
# of a list that a rule measured
MOST_VALUES = 20


def render(examination: Examination) -> str:
    """The page: what was found, every layer, the rules that did not run. It asks the network for nothing."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined
    )
    found = codes_by_layer(examination.findings)
    worst = examination.findings[0].severity if examination.findings else None
    return environment.get_template("page.html").render(
        source=shown(examination.source),
        kind="good" if worst is None else KINDS[worst],
        symbol=SYMBOLS[worst],
        counts=counts(examination.findings),
        examined=counted(len(examination.layers), "BN layer"),
        groups=[group_row(group, examination) for group in grouped(examination.findings)],
        layers=cut([layer_row(layer, found.get(layer.path, {})) for layer in examination.layers]),
        not_run=[(rule.code, rule.name, asked(rule.needs)) for rule in examination.not_run],
        style=Markup("".join(path.read_text(encoding="utf-8") for path in STYLES)),
    )


def group_row(group: Group, examination: Examination) -> dict[str, Any]:
    same = len({finding.message for finding in group.findings}) == 1
    return {
        "kind": KINDS[group.severity],
        "symbol": SYMBOLS[group.severity],
        "severity": group.severity.value,
        "code": group.code,
        "name": group.name,
        "summary": next((rule.summary for rule in RULES if rule.code == group.code), ""),
        "layers": group.layers(examination),
        "message": group.message,
        "remedy": group.remedy,
        "rows": cut([finding_row(finding, same) for finding in group.findings]),
        "count": counted(len(group.findings), "finding"),
    }


def finding_row(finding: Finding, same: bool) -> dict[str, Any]:
    return {
        "layer": layer_name(finding.layer) or "the whole file or model",
        "message": "" if same else shown(finding.message),
        "measured": "; ".join(measured_number(finding, name) for name in finding.measured),
        "confidence": "" if finding.confidence == "certain" else finding.confidence,
    }


def measured_number(finding: Finding, name: str) -> str:
    """A number, and what it is held against."""
    limit = f" (threshold {value(finding.threshold[name])})" if name in finding.threshold else ""
    return f"{shown(name.replace('_', ' '))} {value(finding.measured[name])}{limit}"


def value(measured: Any) -> str:
    """A number with few digits, anything else as text."""
    if isinstance(measured, list | tuple):
        more = len(measured) - MOST_VALUES
        return ", ".join(map(value, measured[:MOST_VALUES])) + (f" and {more:,} more" if more > 0 else "")
    if isinstance(measured, bool):
        return "yes" if measured else "no"
    if isinstance(measured, int | float):
        return number(measured)
    return NOTHING if measured is None else shown(str(measured))


def codes_by_layer(findings: Iterable[Finding]) -> dict[str, dict[str, None]]:
    """In the order of the findings, each once."""
    found: dict[str, dict[str, None]] = {}
    for finding in findings:
        found.setdefault(finding.layer, {})[finding.code] = None
    return found


def layer_row(layer: Layer, found: Iterable[str]) -> dict[str, str]:
    dtypes = dict.fromkeys(layer.tensors[role].dtype for role in STATISTICS if role in layer.tensors)
    return {
        "path": layer_name(layer.path) or "(the only one)",
        "features": number(layer.num_features),
        "statistics": ", ".join(map(shown, dtypes)) or "none",
        "counter": "yes" if layer.has("num_batches_tracked") else "no",
        "eps": number(layer.eps),
        "found": ", ".join(found),
        "sure": "" if layer.sure else "perhaps another kind of normalization",
    }


def cut(rows: list[Any]) -> dict[str, Any]:
    """The first rows, and how many more there are."""
    return {"rows": rows[:MOST_ROWS], "more": max(0, len(rows) - MOST_ROWS)}
