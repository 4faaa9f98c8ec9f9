"""``text`` and ``concise``: a person reads them, on a terminal that names from a file must not reach."""

import unicodedata

import pytest
from rich.cells import cell_len

from batchnorm.doctor.examine import Examination
from batchnorm.doctor.output import concise, text
from batchnorm.doctor.output.names import compressed, shown
from examinations import BLOCKS, HOSTILE, finding, healthy, hostile, layer, numbers, usual, whole_file

USUAL = """\
models/net.pt: 13 BN layers, 12 errors, 1 warning, 1 info

error BN100 missing-statistics: layer*.*.bn* (12)
    Evaluation is wrong.
    To do: Measure them again. This changes the evaluation output.

warning BN107 narrow-statistics: bn1
    0.1 % off.
    To do: Upcast. Safe: evaluation output stays as it is.

info BN104 some-rule: bn1
    Constant.

Not run: BN201 needs --model; BN207 needs --model and --data.

batchnorm rule BN100 explains a rule; --output-format concise lists every
finding.
"""


def test_text_fits_a_screen_and_says_what_to_do():
    assert text.render(usual()) == USUAL


def test_text_of_a_healthy_file_is_one_line():
    assert text.render(healthy()) == "net.pt: 1 BN layer, nothing found\n"


def test_text_says_that_a_file_has_no_layers():
    assert text.render(Examination("net.pt", [], [], [])) == "net.pt: no BN layers, nothing found\n"


def test_numbers_of_the_first_layer_stand_for_those_of_the_others():
    lines = text.render(numbers()).splitlines()
    assert lines[2] == "error BN101 initial-statistics: bn* (30)"
    assert lines[3] == "    All of it. (30 more like it)"


def test_color_adds_nothing_but_color():
    colored = text.render(usual(), color=True)
    assert "\x1b[1;31merror" in colored
    assert "\x1b" not in text.render(usual())
    plain = "".join(part.partition("m")[2] if i else part for i, part in enumerate(colored.split("\x1b[")))
    assert plain == USUAL


@pytest.mark.parametrize("variable", ["FORCE_COLOR", "TTY_COMPATIBLE", "COLUMNS", "CLICOLOR_FORCE"])
def test_what_is_written_does_not_depend_on_the_environment(variable: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(variable, "200")
    assert text.render(usual()) == USUAL


@pytest.mark.parametrize("width", [1, 40, 60, 100, 200])
def test_lines_are_as_wide_as_asked(width: int):
    for examination in (usual(), hostile(), whole_file("\N{CJK UNIFIED IDEOGRAPH-5B57}" * 60)):
        rendered = text.render(examination, width=width)
        assert max(cell_len(line) for line in rendered.splitlines()) <= max(width, text.NARROWEST)


@pytest.mark.parametrize("color", [False, True])
def test_hostile_names_cannot_steer_a_terminal_or_a_build_server(color: bool):
    ours = text.render(usual(), color=color)
    allowed = {"\n", *(character for character in ours if character == "\x1b")}
    for examination in (hostile(), *map(whole_file, HOSTILE)):
        rendered = text.render(examination, color=color)
        assert harmless(rendered, allowed)
        assert len(rendered) < 100_000


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_finding_is_one_concise_line(name: str):
    examination = Examination(name, [layer(name)], [finding("BN100", name, message=name)], [])
    rendered = concise.render(examination)
    assert rendered.count("\n") == 1
    assert harmless(rendered, {"\n"})
    assert ": BN100 error " in rendered


def harmless(rendered: str, allowed: set[str]) -> bool:
    unprintable = {c for c in rendered if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")}
    return unprintable <= allowed and "::" not in rendered and "##" not in rendered


def test_concise_has_a_line_for_each_finding():
    lines = concise.render(usual()).splitlines()
    assert len(lines) == 14
    assert lines[0] == "models/net.pt: layer1.0.bn1: BN100 error Evaluation is wrong."
    assert concise.render(whole_file("os.system")) == "os.system: BN001 error The file needs os.system.\n"
    assert concise.render(healthy()) == ""


def test_layers_are_compressed_where_their_numbers_differ():
    assert compressed(BLOCKS, BLOCKS) == "layer*.*.bn* (12)"
    bn2 = [path for path in BLOCKS if path.endswith("bn2")]
    assert compressed(bn2, BLOCKS) == "layer*.*.bn2 (6)"
    assert compressed(["layer1.0.bn1", "layer1.1.bn1", "layer2.0.bn1", "layer2.1.bn2"], BLOCKS) == (
        "layer*.*.bn* (4 of 12)"
    )
    assert compressed(["stem", "a1", "a01"]) == "stem, a1, a01"
    assert compressed([]) == ""
    assert compressed("abcdefg", most=2) == "a, b and 5 more"


def test_compressing_tells_names_with_stars_from_patterns_of_numbers():
    assert compressed(["a*", "a1", "a2", "a3", "a4"], ["a*", "a1", "a2", "a3", "a4", "a5"]) == "a*, a* (4 of 5)"


def test_shown_text_is_one_line_with_every_letter_of_the_original():
    assert (
        shown("\N{LATIN SMALL LETTER E WITH ACUTE} \t\x7f\u200f")
        == "\N{LATIN SMALL LETTER E WITH ACUTE} \\t\\x7f\\u200f"
    )
    assert shown(":::a:b##c:") == "\\x3a\\x3a:a:b\\x23#c\\x3a"
