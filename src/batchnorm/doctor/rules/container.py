"""What the rules about containers have in common: readers note the faults, and one finding reports each."""

from collections.abc import Iterator
from typing import Any

from batchnorm.doctor.finding import Finding, Severity
from batchnorm.doctor.read.source import shown
from batchnorm.doctor.rule import Subject

NOT_MEASURED = ("where", "problem", "grave")


def faults_of(subject: Subject, code: str) -> list[dict[str, Any]]:
    return subject.checkpoint.faults.get(code, []) if subject.checkpoint is not None else []


def severity_of(fault: dict[str, Any]) -> Severity:
    return Severity.ERROR if fault.get("grave", True) else Severity.WARNING


def report(subject: Subject, code: str, name: str, *, follows: str, remedy: str) -> Iterator[Finding]:
    """A finding for each fault: what is wrong, and what ``follows`` from it."""
    for fault in faults_of(subject, code):
        where = f"{shown(fault['where'])}: " if fault.get("where") else "The file "
        yield Finding(
            code,
            name,
            severity_of(fault),
            "",
            f"{where}{fault['problem']}. {follows}",
            measured={key: value for key, value in fault.items() if key not in NOT_MEASURED},
            remedy=remedy,
        )
