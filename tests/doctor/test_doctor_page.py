"""The example of docs/doctor.md runs and prints what stands there; its settings are understood."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from batchnorm.cli import main

PAGE = (Path(__file__).parents[2] / "docs/doctor.md").read_text()


def block(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)
    assert found is not None
    return found[1]


def without_other_rules(text: str) -> str:
    """The list of rules that did not run grows with the catalogue."""
    return re.sub(r"Not run:.*?\.\n\n", "", text, flags=re.DOTALL)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What the page's program writes, in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("network.py").write_text(block("python"))
    subprocess.run([sys.executable, "network.py"], check=True, timeout=60)


def test_the_example_prints_what_the_page_shows(files, capsys: pytest.CaptureFixture[str]):
    command, _, shown = block("console").partition("\n")
    assert main.run(command.removeprefix("$ batchnorm ").split()) == 1
    captured = capsys.readouterr()
    assert without_other_rules(captured.out) == without_other_rules(shown)
    assert captured.err == ""


def test_the_remedy_of_the_page_mends_the_example(files, capsys: pytest.CaptureFixture[str]):
    [command] = re.findall(r"`batchnorm (recalibrate [^`]*)`", PAGE)
    assert main.run(command.split()) == 0
    assert main.run(["doctor", "model.recalibrated.pt"]) == 0
    assert main.run(["doctor", "whole.pt"]) == 0


def test_the_settings_of_the_page_are_understood(files, capsys: pytest.CaptureFixture[str]):
    known = block("toml").replace('"BN501"', '"BN1"')
    Path("pyproject.toml").write_text(known)
    assert main.run(["doctor", "model.pt"]) == 0
    assert "Traceback" not in capsys.readouterr().err
