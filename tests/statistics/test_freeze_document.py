"""The examples of docs/how-to/freeze.md run, with the output that stands there."""

import doctest
from pathlib import Path


def test_examples_of_the_page_run():
    page = Path(__file__).parents[2] / "docs/how-to/freeze.md"
    failed, tried = doctest.testfile(str(page), module_relative=False, encoding="utf-8")
    assert tried > 0
    assert failed == 0
