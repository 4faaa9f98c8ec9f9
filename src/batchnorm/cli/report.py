"""``batchnorm report``."""

from pathlib import Path

import click

from batchnorm.cli.verdicts import print_verdicts
from batchnorm.report import load_run, write_report


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
def report(folder: Path) -> None:
    """Rebuild the figures and the page of the run in FOLDER from its data, and show its verdicts."""
    paths = write_report(folder)
    print_verdicts(load_run(folder).claims)
    for path in paths:
        click.echo(f"wrote {path}", err=True)
