"""``batchnorm rule``."""

import json
import sys
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from batchnorm.doctor.rule import Rule

SCHEMA_VERSION = 1


@click.command()
@click.argument("code", metavar="CODE", required=False)
@click.option("--all", "everything", is_flag=True, help="All rules, each in a line.")
@click.option("--output-format", type=click.Choice(["text", "json"]), default="text", show_default=True)
def rule(code: str | None, everything: bool, output_format: str) -> None:
    """Explain a rule of the doctor, or list all of them.

    CODE is that of a finding, such as BN100. Its page says what the rule finds, why that is bad, how it arises, on
    what evidence it rests, what to do, and when it is wrong.
    """
    if (code is None) != everything:
        raise click.UsageError("Name one rule, as in batchnorm rule BN100, or list them with --all.")
    from batchnorm.cli.doctor import terminal
    from batchnorm.cli.outputs import print_text
    from batchnorm.doctor.catalogue import RULES
    from batchnorm.doctor.pages import page

    chosen = [one for one in RULES if code is None or one.code == code.upper()]
    if not chosen:
        raise click.UsageError(f"There is no rule {code!r}: batchnorm rule --all lists them.")
    if output_format == "json":
        records = [record(one) for one in chosen]
        print_text(json.dumps({"schema_version": SCHEMA_VERSION, "rules": records}, indent=1) + "\n")
    elif everything:
        print_text(listing(chosen))
    elif sys.stdout.isatty() and terminal()["color"]:
        show_page(page(chosen[0]), terminal()["width"])
    else:
        print_text(page(chosen[0]))


def record(rule: "Rule") -> dict[str, Any]:
    from batchnorm.doctor.pages import page

    return {
        "code": rule.code,
        "name": rule.name,
        "severity": rule.severity.value,
        "needs": needs(rule),
        "summary": rule.summary,
        "preview": rule.preview,
        "page": page(rule),
    }


def needs(rule: "Rule") -> list[str]:
    """What must be given; a rule about containers needs a file, every other one a file or a model."""
    from batchnorm.doctor.rule import Needs

    return [need.value for need in Needs if need in rule.needs and (need != Needs.FILE or rule.container)]


def listing(rules: "list[Rule]") -> str:
    """Two lines for each rule: what it is called, and what it finds."""
    from batchnorm.doctor.output.groups import asked

    lines = []
    for one in rules:
        given = f", needs {asked(needs(one))}" if needs(one) else ""
        lines.append(f"{one.code} {one.name} ({one.severity}{given}{', preview' if one.preview else ''})")
        lines.append(f"    {one.summary}")
    return "".join(f"{line}\n" for line in lines)


def show_page(text: str, width: int) -> None:
    """On a terminal."""
    from rich.console import Console
    from rich.markdown import Markdown

    Console(width=width).print(Markdown(text))
