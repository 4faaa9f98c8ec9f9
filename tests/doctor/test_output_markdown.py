"""``markdown``: what a renderer makes of it."""

import re

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

from batchnorm.doctor.examine import Examination
from batchnorm.doctor.output import markdown
from examinations import HOSTILE, finding, healthy, hostile, layer, numbers, usual, whole_file

# what GitHub makes links of, and notifies people by, outside of code
LINKED = re.compile(r"(?<!\\)://|www\.|@")
CODE = re.compile(r"`[^`]*`")
OURS = {"heading", "paragraph", "table", "thead", "tbody", "tr", "th", "td", "strong", "text", "code_inline", "inline"}


def tokens(text: str) -> list[Token]:
    """With HTML, tables and strikethrough, as GitHub has them."""
    parser = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    flat = []
    for token in parser.parse(text):
        flat += [token, *(token.children or [])]
    return flat


def kinds(text: str) -> set[str]:
    return {token.type.removesuffix("_open").removesuffix("_close") for token in tokens(text)}


def shown_text(text: str) -> str:
    return "".join(token.content for token in tokens(text) if token.type in ("text", "code_inline"))


def test_a_section_for_each_rule():
    assert markdown.render(usual()) == (
        "## models/net.pt: 13 BN layers, 12 errors, 1 warning, 1 info\n\n"
        "### error BN100 missing-statistics\n\n"
        "In `layer*.*.bn* (12)`\n\n"
        "What follows: Evaluation is wrong.\n\n"
        "**To do**: Measure them again. This changes the evaluation output.\n\n"
        "### warning BN107 narrow-statistics\n\n"
        "In `bn1`\n\n"
        "What follows: 0.1 % off.\n\n"
        "**To do**: Upcast. Safe: evaluation output stays as it is.\n\n"
        "### info BN104 some-rule\n\n"
        "In `bn1`\n\n"
        "What follows: Constant.\n\n"
        "Not run: BN201 needs --model; BN207 needs --model and --data.\n"
    )
    assert markdown.render(healthy()) == "## net.pt: 1 BN layer, nothing found\n"


def test_a_table_where_numbers_differ_from_layer_to_layer():
    rendered = markdown.render(numbers())
    assert "| the whole file or model | All of it. |\n| `bn0` | 0 sd off. |\n" in rendered
    assert sum(token.type == "tr_open" for token in tokens(rendered)) == 32


def test_a_long_table_is_cut_and_the_rest_counted():
    findings = [finding("BN101", f"bn{i}", message=f"{i}") for i in range(150)]
    assert markdown.render(Examination("net.pt", [], findings, [])).count("\n| `bn") == 100
    assert "\n\nand 50 more\n" in markdown.render(Examination("net.pt", [], findings, []))


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_text(name: str):
    several = [finding("BN100", path, message=f"{path} is wrong.", remedy=path) for path in (name, "bn1")]
    for examination in (whole_file(name), Examination(name, [layer(name)], several, [])):
        rendered = markdown.render(examination)
        assert kinds(rendered) <= OURS
        assert not LINKED.search(CODE.sub("", rendered))
        assert "\x1b" not in rendered


def test_markup_arrives_as_it_was_written():
    text = "_a_ *b* [c](d) <e> f_g `h` | ~~i~~ \\ & # $"
    assert shown_text(markdown.prose(text)) == text
    assert shown_text(markdown.code("a * b_c <d>")) == "a * b_c <d>"


def test_all_hostile_names_together_make_one_table():
    rendered = markdown.render(hostile())
    assert sum(token.type == "table_open" for token in tokens(rendered)) == 1
    assert sum(token.type == "tr_open" for token in tokens(rendered)) == 1 + len(HOSTILE)
    assert kinds(rendered) <= OURS
