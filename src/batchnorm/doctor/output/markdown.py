"""The ``markdown`` format: for a pull request, an issue, or the summary of a workflow."""

import re

from batchnorm.doctor.examine import Examination
from batchnorm.doctor.finding import Finding
from batchnorm.doctor.output.groups import Group, grouped, not_run, summary
from batchnorm.doctor.output.names import layer_name, shown

# an underscore within a word is none, and only an address has "://" or "www."
SPECIAL = re.compile(r"[\\`*\[\]<>&|~#$]|(?<!\w)_|_(?!\w)|:(?=//)|(?<=www)\.", re.IGNORECASE)
# of one rule; the rest is counted
MOST_ROWS = 100


def render(examination: Examination) -> str:
    """A heading for each rule that found something, what follows and what to do; then the rules that did not run."""
    parts = [f"## {prose(summary(examination))}"]
    for group in grouped(examination.findings):
        parts += section(group, group.layers(examination))
    if examination.not_run:
        parts.append(f"Not run: {prose(not_run(examination.not_run))}.")
    return "\n\n".join(parts) + "\n"


def section(group: Group, layers: str) -> list[str]:
    parts = [f"### {group.severity} {group.code} {prose(group.name)}"]
    if layers:
        parts.append(f"In {code(layers)}")
    if len({finding.message for finding in group.findings}) > 1:
        parts.append(table(group.findings))
    else:
        parts.append(f"What follows: {prose(shown(group.findings[0].message))}")
    return [*parts, f"**To do**: {prose(group.remedy)}"] if group.remedy else parts


def table(findings: list[Finding]) -> str:
    """A row for each layer, as their numbers differ."""
    lines = ["| layer | what was found |", "|---|---|"]
    for finding in findings[:MOST_ROWS]:
        layer = code(layer_name(finding.layer)) if finding.layer else "the whole file or model"
        lines.append(f"| {layer} | {prose(shown(finding.message))} |")
    more = len(findings) - MOST_ROWS
    return "\n".join(lines) + (f"\n\nand {more:,} more" if more > 0 else "")


def prose(text: str) -> str:
    """Text in which nothing is markup, a link, or the name of somebody to notify."""
    return SPECIAL.sub(r"\\\g<0>", text.replace("@", r"\x40"))


def code(text: str) -> str:
    """A span that the text cannot end, in a cell of a table too."""
    return "`" + text.replace("`", r"\x60").replace("|", r"\x7c") + "`"
