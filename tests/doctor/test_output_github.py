"""``github``: what GitHub's runner makes of the lines."""

import re

import pytest

from batchnorm.doctor.examine import Examination
from batchnorm.doctor.output import github
from examinations import HOSTILE, finding, healthy, hostile, layer, usual

Command = tuple[str, dict[str, str], str]


def commands(rendered: str) -> list[Command]:
    """As the runner reads them: a line that begins with two colons; properties up to the next two."""
    found = []
    for line in re.split(r"[\r\n]+", rendered):
        head, colons, data = line.strip()[2:].partition("::")
        if line.strip().startswith("::") and colons:
            name, _, properties = head.partition(" ")
            pairs = (pair.split("=", 1) for pair in properties.split(",") if pair)
            found.append((name, {key: decoded(value) for key, value in pairs}, decoded(data)))
    return found


def decoded(text: str) -> str:
    for code, character in (("%3A", ":"), ("%2C", ","), ("%0D", "\r"), ("%0A", "\n"), ("%25", "%")):
        text = text.replace(code, character)
    return text


def test_each_rule_is_an_annotation():
    rendered = github.render(usual())
    assert [name for name, _, _ in commands(rendered)] == ["error", "warning", "notice"]
    assert commands(rendered)[0] == (
        "error",
        {"file": "models/net.pt", "title": "BN100 missing-statistics"},
        "layer*.*.bn* (12)\nEvaluation is wrong.\nMeasure them again. This changes the evaluation output.",
    )
    assert rendered.splitlines()[3:] == [
        "models/net.pt: 13 BN layers, 12 errors, 1 warning, 1 info",
        "not run: BN201 needs --model; BN207 needs --model and --data",
    ]


def test_a_healthy_file_has_no_annotation():
    assert commands(github.render(healthy())) == []


def test_percent_signs_colons_and_commas_arrive():
    examination = Examination("a,b:c%.pt", [], [finding("BN001", "", message="100 % of a:b,c", remedy="")], [])
    assert commands(github.render(examination)) == [
        ("error", {"file": "a,b:c%.pt", "title": "BN001 some-rule"}, "100 % of a:b,c")
    ]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_give_no_commands_of_their_own(name: str):
    rendered = github.render(Examination(name, [layer(name)], [finding("BN100", name, message=name, remedy=name)], []))
    [(command, properties, _)] = commands(rendered)
    assert command == "error"
    assert list(properties) == ["file", "title"]
    assert "##" not in rendered


def test_all_hostile_names_are_one_annotation():
    assert len(commands(github.render(hostile()))) == 1
