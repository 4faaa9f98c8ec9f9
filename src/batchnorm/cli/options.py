"""What the experiments' commands share: kinds of options, how a run is continued, and what it ends with."""

import importlib.util
import math
import shlex
from pathlib import Path
from typing import Any

import click

from batchnorm.cli.verdicts import print_verdicts
from batchnorm.experiments.run_folder import TIMING, read_record
from batchnorm.report import write_report

# Arms whose speed is printed; those of a sweep are in its timing.json
MOST_RATES = 8


class FiniteRange(click.FloatRange):
    """A range without infinity, and without NaN, which compares as if it were in every range."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


def resume_command(experiment: str, folder: Path, data: Path | None = None) -> str:
    """What to type after a stop."""
    where = f" --data {shlex.quote(str(data))}" if data else ""
    return (
        f"stopped; nothing is lost: batchnorm reproduce {experiment} --resume --out {shlex.quote(str(folder))}{where}"
    )


def show(record: dict[str, Any], folder: Path) -> int:
    """Figures, page and verdicts; the exit status."""
    paths = write_report(folder) if importlib.util.find_spec("matplotlib") else []
    timing = read_record(folder / TIMING)
    rates = [f"{arm} {cost['steps_per_second']:,.0f} steps/s" for arm, cost in timing["arms"].items()]
    if 0 < len(rates) <= MOST_RATES:
        stacked = next(iter(timing["arms"].values()))["networks"]
        together = f", each step for {stacked} networks at once" if stacked > 1 else ""
        click.echo("; ".join(rates) + together, err=True)
    click.echo(f"training took {timing['training_seconds']:.0f} s", err=True)
    print_verdicts(record["claims"])
    page = next((path for path in paths if path.suffix == ".html"), folder)
    click.echo(f"the evidence is in {page}", err=True)
    return 0 if record["verdict"] == "reproduced" else 1
