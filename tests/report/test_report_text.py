"""Names from files are shown, never obeyed."""

import json
import math
import unicodedata

import pytest

from batchnorm.report.text import NOTHING, UNPRINTABLE, ascii_only, clean, estimate, number, percent

HOSTILE = [
    "\x1b[2J\x1b]0;title\x07",
    "\u202egnp.exe",
    "a\u0000b",
    "\ud800",
    "line\u2028break",
    "\x9b31m",
    "tab\there\r\n",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_clean_leaves_only_printable_characters(text: str) -> None:
    shown = clean(text)
    assert not [character for character in shown if unicodedata.category(character) in UNPRINTABLE]
    shown.encode("utf-8")


@pytest.mark.parametrize("text", HOSTILE)
def test_clean_reaches_into_structures(text: str) -> None:
    assert not [character for character in clean({text: [text]}) if unicodedata.category(character) in UNPRINTABLE]


def test_clean_cuts_and_counts() -> None:
    assert clean("y" * 1_000_000, limit=10) == "yyyyyyyyyy… (1,000,000 characters)"
    assert len(clean("\x00" * 1_000_000)) < 2000


def test_clean_survives_depth() -> None:
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    assert clean(deep) == "(nested too deeply to show)"
    while deep:
        deep = deep.pop()


def test_ascii_only_is_ascii() -> None:
    assert ascii_only("BN \N{EN DASH} 5 \N{MULTIPLICATION SIGN} faster ✓ é").isascii()


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_missing_numbers_are_a_dash(value: float | None) -> None:
    assert (number(value), percent(value)) == (NOTHING, NOTHING)
    assert estimate(value, 0.0, 1.0) == (NOTHING, "")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((97.621, 97.58, 97.66), ("97.621", "97.580 to 97.660")),
        ((5.0, 5.0, 5.0), ("5.000", "5.000 to 5.000")),
        ((0.0, 0.0, 0.0), ("0.0", "0.0 to 0.0")),
        ((1e-12, 0.0, 2e-12), ("1e-12", "0 to 2e-12")),
        ((-0.35, -0.5, -0.2), ("-0.35", "-0.50 to -0.20")),
        ((31e6, 30e6, 32e6), ("31,000,000", "30,000,000 to 32,000,000")),
    ],
)
def test_interval_decides_the_decimals(values: tuple[float, float, float], expected: tuple[str, str]) -> None:
    assert estimate(*values) == expected


def test_clean_writes_other_values_as_json() -> None:
    assert clean({"a": None, "b": [1, True]}) == json.dumps({"a": None, "b": [1, True]})
