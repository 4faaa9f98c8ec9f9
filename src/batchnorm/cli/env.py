"""``batchnorm env``."""

import json

import click

from batchnorm.environment import describe_environment


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of lines.")
def env(as_json: bool) -> None:
    """Show the machine, the versions and the kernels that results depend on."""
    record = describe_environment()
    if as_json:
        click.echo(json.dumps(record, indent=1, sort_keys=True))
        return
    packages = record.pop("packages")
    for name, value in {**record, **packages}.items():
        shown = ", ".join(value) if isinstance(value, list) else "none" if value is None else value
        click.echo(f"{name:16} {shown}")
