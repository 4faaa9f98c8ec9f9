"""Where a command may write, and text for whatever standard output is."""

import sys
from pathlib import Path

import click

from batchnorm.errors import DataError


def check_output(out: Path, source: Path, force: bool) -> None:
    """Refuse to write where nothing new would come to lie, before anything else is done.

    Raises:
        DataError: the file exists, is the source itself, or has no folder.
    """
    if out.exists() and source.exists() and out.samefile(source):
        raise DataError(f"{out} is the checkpoint itself, which stays as it is: choose another name")
    if out.is_dir() or not out.parent.is_dir():
        raise DataError(f"{out} is a folder" if out.is_dir() else f"there is no folder {out.parent} for {out.name}")
    if out.exists() and not force:
        raise DataError(f"{out} exists already: choose another --out, or overwrite it with --force")


def print_text(text: str) -> None:
    """On standard output; characters that its encoding does not have are written as escapes."""
    encoding = sys.stdout.encoding or "utf-8"
    click.echo(text.encode(encoding, "backslashreplace").decode(encoding), nl=False)
