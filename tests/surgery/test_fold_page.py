"""The page on folding: its blocks run, and print what it shows, up to the digits."""

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parents[2] / "docs/how-to/fold.md"


def without_digits(text: str) -> list[str]:
    """Words only: digits, and with them the widths of columns, differ between machines."""
    return re.sub(r"\d[\d.e+-]*", "#", text).split()


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_blocks_of_the_page_print_what_it_shows():
    scope: dict[str, Any] = {}
    for block, shown in re.findall(r"```python\n(.*?)```\n\n((?:    [^\n]*\n)*)", PAGE.read_text(), flags=re.DOTALL):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(block, scope)
        assert shown, f"the page does not show what this prints:\n{printed.getvalue()}"
        assert without_digits(printed.getvalue()) == without_digits(shown)
