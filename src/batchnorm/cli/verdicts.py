"""Verdicts on standard output: a table on a terminal, plain whole lines elsewhere."""

import sys
from collections.abc import Sequence

import click
from rich.console import Console

from batchnorm.report import Claim, verdict_table


def print_verdicts(claims: Sequence[Claim]) -> None:
    table = verdict_table(claims)
    if sys.stdout.isatty():
        Console().print(table)
    else:
        click.echo(str(table))
