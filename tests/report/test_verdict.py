"""The table of verdicts: words and symbols on a terminal, plain ASCII elsewhere, nothing from a file in command."""

import io

import pytest
from rich.console import Console
from synthetic import CLAIMS, claim

from batchnorm.report import verdict_table


def printed(claims: list, **options) -> str:
    stream = io.StringIO()
    Console(file=stream, **options).print(verdict_table(claims))
    return stream.getvalue()


def test_terminal_gets_word_and_symbol() -> None:
    text = printed(CLAIMS, force_terminal=True, width=100, color_system=None)
    for mark in ("✓ reproduced", "✗ not reproduced", "\N{EN DASH} not comparable"):
        assert mark in text
    assert "2 of 4 claims reproduced, 1 not reproduced and 1 not comparable" in text
    assert "0.20 to 0.50" in text


@pytest.mark.parametrize("width", [60, 80, 120])
def test_terminal_table_fits(width: int) -> None:
    lines = printed(CLAIMS, force_terminal=True, width=width, color_system=None).splitlines()
    assert max(map(len, lines)) <= width
    assert width < 80 or len(lines) <= 32


def test_pipe_gets_plain_ascii() -> None:
    text = printed(CLAIMS, width=200)
    assert text == f"{verdict_table(CLAIMS)}\n"
    assert text.isascii()
    assert "[x] not reproduced: The input distribution" in text
    assert "here:  5.6 times fewer steps (95 % interval 4.1 to 7.0)" in text
    assert max(map(len, text.splitlines())) < 80


def test_nothing_measured_is_said() -> None:
    assert "here:  not measured" in str(verdict_table([CLAIMS[3]]))
    assert "no claims" in str(verdict_table([]))
    assert "no claims" in printed([], force_terminal=True, width=80, color_system=None)


@pytest.mark.parametrize(
    "text", ["\x1b[31mred\x1b]8;;http://x\x07", "[bold red]markup[/]", "[/]", "\r\x08\x08", "\u202egnp"]
)
@pytest.mark.parametrize("terminal", [True, False])
def test_names_cannot_steer_the_terminal(text: str, terminal: bool) -> None:
    record = claim(name=text, statement=text, rule=text, paper=text, unit=text, detail=text, source=text)
    shown = printed([record], force_terminal=terminal, width=100, color_system=None)
    assert not [character for character in shown if character < " " and character != "\n"]
    assert "\u202e" not in shown
    if text.startswith("["):
        assert text in shown.replace("\n", "")


def test_huge_names_stay_on_one_screen() -> None:
    record = claim(statement="s" * 100_000, rule="r " * 100_000, paper="p" * 100_000, unit="u" * 100_000)
    assert len(printed([record], force_terminal=True, width=80, color_system=None).splitlines()) < 40
    assert len(str(verdict_table([record])).splitlines()) < 20
