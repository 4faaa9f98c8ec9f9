"""The how-to pages: every Python block runs and prints what the page shows, and every command too.

A page is written as a session (``>>>``), or as blocks with their output in a ``text`` block behind them. Digits, and
with them the widths of columns, may differ between machines. A block that begins with a file's name is that file.
"""

import contextlib
import doctest
import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from batchnorm.cli.main import batchnorm

PAGES = sorted((Path(__file__).parents[1] / "docs/how-to").glob("*.md"))
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"# (\w+\.py)\n")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for file in tmp_path.glob("*.py"):
        sys.modules.pop(file.stem, None)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_blocks_of_the_page_print_what_it_shows(page: Path, folder: Path):
    scope: dict[str, Any] = {}
    blocks = BLOCK.findall(page.read_text())
    assert blocks
    for (kind, block), (kind_behind, behind) in zip(blocks, [*blocks[1:], ("", "")], strict=True):
        if kind == "python" and (file := FILE.match(block)):
            (folder / file.group(1)).write_text(block)
        elif kind == "python" and block.startswith(">>>"):
            run_session(block, scope, page)
        elif kind == "python":
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(block, scope)
            assert words(printed.getvalue()) == words(behind if kind_behind == "text" else "")
        elif kind == "console":
            run_command(block)


def run_session(block: str, scope: dict[str, Any], page: Path) -> None:
    test = doctest.DocTestParser().get_doctest(block, {}, page.stem, str(page), 0)
    test.globs = scope
    said: list[str] = []
    result = doctest.DocTestRunner().run(test, out=said.append, clear_globs=False)
    assert result.attempted
    assert not result.failed, "".join(said)


def run_command(block: str) -> None:
    command, shown = block.split("\n", 1)
    arguments = command.removeprefix("$ batchnorm ").split()
    result = CliRunner().invoke(batchnorm, arguments, standalone_mode=False)
    said = result.output
    if result.exception is not None:
        said += f"batchnorm: {result.exception}"
    assert words(said) == words(shown)


def words(text: str) -> list[str]:
    """Without digits and digests."""
    return re.sub(r"\b[0-9a-f]{12}\b|\d[\d.,e+-]*", "#", text).split()
