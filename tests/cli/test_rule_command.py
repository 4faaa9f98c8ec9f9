"""``batchnorm rule``: every rule has a page, and all rules are in one list."""

import json

import pytest
from click import unstyle
from rich.cells import cell_len

from batchnorm.cli import main
from batchnorm.doctor.catalogue import RULES
from batchnorm.doctor.pages import page


def rule(*arguments: str) -> int:
    return main.run(["rule", *arguments])


@pytest.mark.parametrize("code", ["BN100", "bn100"])
def test_a_rule_is_explained(code: str, capsys: pytest.CaptureFixture[str]):
    assert rule(code) == 0
    out = capsys.readouterr().out
    assert out.startswith("# BN100")
    assert "TensorFlow" in out


@pytest.mark.parametrize("one", RULES, ids=lambda one: one.code)
def test_every_page_begins_with_code_and_name(one):
    assert page(one).splitlines()[0] == f"# {one.code}: {one.name}"
    for part in ("What it finds", "Why it is bad", "Evidence", "Remedy", "False positives", "References"):
        assert f"\n## {part}\n" in page(one)


def test_a_page_is_rendered_for_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert rule("BN100") == 0
    out = capsys.readouterr().out
    assert "BN100" in out
    assert "# BN100" not in out
    assert max(map(cell_len, map(unstyle, out.splitlines()))) <= 60
    monkeypatch.setenv("NO_COLOR", "1")
    assert rule("BN100") == 0
    assert capsys.readouterr().out == page(next(one for one in RULES if one.code == "BN100"))


def test_all_rules_are_listed(capsys: pytest.CaptureFixture[str]):
    assert rule("--all") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * len(RULES)
    assert [line.split()[0] for line in lines[::2]] == [one.code for one in RULES]
    assert lines[0] == "BN001 unsafe-globals (error, needs a file)"
    assert "BN100 missing-statistics (error)" in lines


@pytest.mark.parametrize("arguments", [["--all"], ["BN101"]])
def test_rules_as_json(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    assert rule(*arguments, "--output-format", "json") == 0
    record = json.loads(capsys.readouterr().out)
    assert record["schema_version"] == 1
    wanted = [one.code for one in RULES] if "--all" in arguments else ["BN101"]
    assert [one["code"] for one in record["rules"]] == wanted
    last = record["rules"][-1]
    assert list(last) == ["code", "name", "severity", "needs", "summary", "preview", "page"]
    assert last["page"].startswith("# BN")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Name one rule, as in batchnorm rule BN100, or list them with --all."),
        (["BN100", "--all"], "Name one rule, as in batchnorm rule BN100, or list them with --all."),
        (["BN999"], "There is no rule 'BN999': batchnorm rule --all lists them."),
        (["BN1"], "There is no rule 'BN1': batchnorm rule --all lists them."),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert rule(*arguments) == 2
    assert capsys.readouterr().err == f"batchnorm rule: {message} See batchnorm rule --help.\n"
