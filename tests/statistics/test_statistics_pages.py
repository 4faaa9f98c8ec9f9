"""The examples of the how-to pages about statistics run."""

import doctest
from pathlib import Path

import pytest

PAGES = Path(__file__).parents[2] / "docs/how-to"


@pytest.mark.parametrize("page", ["recalibrate", "deferred-statistics"])
def test_examples_of_the_page_run(page: str):
    failed, tried = doctest.testfile(str(PAGES / f"{page}.md"), module_relative=False, encoding="utf-8")
    assert tried > 0
    assert failed == 0
