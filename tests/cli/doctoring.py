"""Run ``batchnorm doctor``, and give it a rule that tells what it was given."""

from typing import Any

import pytest

from batchnorm.cli import main
from batchnorm.doctor import examine as examining
from batchnorm.doctor.finding import Finding, Severity
from batchnorm.doctor.rule import Needs, Rule, Subject

MODEL = ["--model", "small_network:make"]
LOADER = ["--data", "small_network:loader"]


def doctor(*arguments: object) -> int:
    return main.run(["doctor", *map(str, arguments)])


def lines(capsys: pytest.CaptureFixture[str]) -> tuple[list[str], list[str]]:
    captured = capsys.readouterr()
    return captured.out.splitlines(), captured.err.splitlines()


def install(monkeypatch: pytest.MonkeyPatch, check: Any, *needs: Needs) -> None:
    """A rule BN999 besides the others that need no more than a file."""
    rule = Rule("BN999", "test", Severity.ERROR, frozenset(needs), "", check)
    others = [rule for rule in examining.RULES if rule.needs <= {Needs.FILE}]
    monkeypatch.setattr(examining, "RULES", (*others, rule))


def seen(subject: Subject) -> list[Finding]:
    """A finding that tells what the rule was given."""
    assert subject.model is not None
    batches = [
        tuple(getattr(item[0] if isinstance(item, tuple) else item, "shape", ())) for item in subject.loader or []
    ]
    mean = subject.model.get_submodule("bn1").get_buffer("running_mean")
    measured = {"mean": mean.tolist(), "batches": batches}
    return [Finding("BN999", "test", Severity.ERROR, "bn1", "seen", measured=measured)]
