"""What a repair did, in front of what it leaves, in the formats of the doctor."""

import importlib
import json
from collections.abc import Iterable
from typing import Any

from batchnorm.doctor.changes import Change
from batchnorm.doctor.fixes.outcome import Action, Outcome
from batchnorm.doctor.fixes.result import Repair
from batchnorm.doctor.output.groups import counted
from batchnorm.doctor.output.markdown import code, prose
from batchnorm.doctor.output.names import compressed, layer_name, shown
from batchnorm.files import finite

# of tensors in text and Markdown; json has all
MOST_ROWS = 20
SHORT_DIGEST = 12
HEADINGS = ("tensor", "type", "largest change", "sha256 before", "after")
SAFETY = {True: " (safe)", False: " (changes the output)", None: ""}


def render(repaired: Repair, output_format: str, **how: Any) -> str:
    """The repair and the examination of what is repaired.

    Args:
        repaired: what was done.
        output_format: of the doctor. In "github", "sarif" and "html" there is only what is left to do.
        how: what the format takes, such as the width of "text".
    """
    rest: str = importlib.import_module(f"batchnorm.doctor.output.{output_format}").render(repaired.left, **how)
    if output_format == "json":
        return json.dumps(finite({**json.loads(rest), "repair": record(repaired)}), indent=1, allow_nan=False) + "\n"
    if output_format == "concise":
        lines = [f"{shown(repaired.source)}: {line(outcome)}\n" for outcome in repaired.outcomes]
        return "".join(lines) + rest
    if output_format == "text":
        return text(repaired) + "\nAfter the repair:\n" + rest
    if output_format == "markdown":
        return markdown(repaired) + rest
    return rest


def summary(repaired: Repair) -> str:
    """One line: how many findings became what, and how many tensors changed."""
    actions = [outcome.action for outcome in repaired.outcomes]
    parts = [f"{actions.count(action)} {action}" for action in Action if action in actions]
    changed = counted(len(repaired.comparison.changed), "tensor")
    return f"{shown(repaired.source)}: {', '.join(parts) or 'nothing to repair'}; {changed} changed"


def text(repaired: Repair) -> str:
    lines = [summary(repaired), *sentences(repaired)]
    if rows := rows_of(repaired.comparison.changed):
        widths = [max(map(len, column)) for column in zip(HEADINGS, *rows, strict=True)]
        table = [HEADINGS, *rows]
        lines += [
            "",
            *("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in table),
        ]
    return "\n".join([*lines, *tail(repaired)]) + "\n"


def markdown(repaired: Repair) -> str:
    lines = [f"## {prose(summary(repaired))}", "", *(f"- {prose(sentence)}" for sentence in sentences(repaired))]
    if rows := rows_of(repaired.comparison.changed):
        head = ["", f"| {' | '.join(HEADINGS)} |", "|---|---|---|---|---|"]
        lines += [*head, *(f"| {code(row[0])} | {' | '.join(map(prose, row[1:]))} |" for row in rows)]
    return "\n".join([*lines, *(prose(part) for part in tail(repaired))]) + "\n\n"


def sentences(repaired: Repair) -> list[str]:
    """What became of the findings, those with the same end together; and what shows that safe repairs are."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for each in repaired.outcomes:
        groups.setdefault((each.action, each.code, each.name, each.what, each.safe), []).append(each.layer)
    every = [layer.path for layer in repaired.left.layers]
    found = []
    for (action, rule, name, what, safe), layers in groups.items():
        where = compressed([layer for layer in layers if layer], every)
        found.append(f"{action} {rule} {name}{': ' * bool(where)}{where}: {shown(what)}{SAFETY[safe]}")
    return found + ([f"safe, shown {repaired.proof}"] if repaired.proof else [])


def rows_of(changes: Iterable[Change]) -> list[tuple[str, ...]]:
    """Of the first changed tensors."""
    rows = []
    for change in list(changes)[:MOST_ROWS]:
        dtypes = [dtype for dtype in dict.fromkeys(change.dtype) if dtype]
        size = "new" if change.dtype[0] is None else "gone" if change.dtype[1] is None else number(change.largest)
        digests = [(each or "-")[:SHORT_DIGEST] for each in change.sha256]
        rows.append((layer_name(change.name), " -> ".join(dtypes), size, *digests))
    return rows


def number(largest: float | None) -> str:
    return "not finite" if largest is None else f"{largest:.3g}"


def tail(repaired: Repair) -> list[str]:
    """How many tensors there are besides."""
    more = len(repaired.comparison.changed) - MOST_ROWS
    others = counted(len(repaired.comparison.unchanged), "tensor")
    return ([f"and {more:,} more"] if more > 0 else []) + ["", f"{others} as before."]


def line(outcome: Outcome) -> str:
    layer = f"{layer_name(outcome.layer)}: " if outcome.layer else ""
    return f"{layer}{outcome.code} {outcome.action} {shown(outcome.what)}"


def record(repaired: Repair) -> dict[str, Any]:
    """For JSON, with the whole digests of all tensors."""
    return {
        "outcomes": [
            {
                "code": each.code,
                "name": each.name,
                "layer": each.layer,
                "action": each.action.value,
                "what": each.what,
                "safe": each.safe,
            }
            for each in repaired.outcomes
        ],
        "proof": repaired.proof,
        "changed": [
            {
                "name": change.name,
                "dtype": change.dtype,
                "shape": change.shape,
                "sha256": change.sha256,
                "largest_change": change.largest,
            }
            for change in repaired.comparison.changed
        ],
        "unchanged": [{"name": name, "sha256": each} for name, each in repaired.comparison.unchanged.items()],
    }
