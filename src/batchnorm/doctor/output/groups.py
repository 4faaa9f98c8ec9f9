"""Findings by rule, and the sentences about an examination that formats share."""

from collections.abc import Iterable
from dataclasses import dataclass

from batchnorm.doctor.examine import Examination, NotRun
from batchnorm.doctor.finding import Finding, Severity
from batchnorm.doctor.output.names import compressed, layer_name, shown
from batchnorm.report.text import joined

# what each need is called where one can give it
GIVEN_BY = {
    "file": "a file",
    "model": "--model",
    "data": "--data",
    "optimizer": "an optimizer",
    "ranks": "several ranks",
}


@dataclass(frozen=True)
class Group:
    """Findings of one rule and one severity."""

    code: str
    name: str
    severity: Severity
    findings: list[Finding]

    @property
    def paths(self) -> list[str]:
        """Of the layers; the whole file or model is none."""
        return list(dict.fromkeys(finding.layer for finding in self.findings if finding.layer))

    def layers(self, examination: Examination) -> str:
        """In few words; empty if the whole file or model is meant."""
        return compressed(self.paths, [layer.path for layer in examination.layers])

    @property
    def message(self) -> str:
        """What follows, once if it is the same for all, else of the first."""
        messages = {finding.message for finding in self.findings}
        first = self.findings[0]
        where = f"{layer_name(first.layer)}: " if first.layer and len(messages) > 1 else ""
        others = f" ({len(self.findings) - 1:,} more like it)" if len(messages) > 1 else ""
        return f"{where}{shown(first.message)}{others}"

    @property
    def remedy(self) -> str:
        """What to do, and whether that changes what the model computes."""
        return described_remedy(self.findings[0])


def grouped(findings: Iterable[Finding]) -> list[Group]:
    """The gravest first, as findings come."""
    groups: dict[tuple[Severity, str], Group] = {}
    for finding in findings:
        group = Group(finding.code, finding.name, finding.severity, [])
        groups.setdefault((finding.severity, finding.code), group).findings.append(finding)
    return list(groups.values())


def described_remedy(finding: Finding) -> str:
    """Empty where there is none.

    Example:
        >>> finding = Finding("BN107", "half-statistics", Severity.WARNING, "bn1", "", remedy="Upcast.", safe=True)
        >>> described_remedy(finding)
        'Upcast. Safe: evaluation output stays as it is.'
    """
    notes = {True: " Safe: evaluation output stays as it is.", False: " This changes the evaluation output.", None: ""}
    return f"{shown(finding.remedy)}{notes[finding.safe]}" if finding.remedy else ""


def counts(findings: Iterable[Finding]) -> str:
    """How many of each severity.

    Example:
        >>> counts([])
        'nothing found'
    """
    severities = [finding.severity for finding in findings]
    parts = [counted(severities.count(severity), severity) for severity in Severity if severity in severities]
    return ", ".join(parts) or "nothing found"


def counted(count: int, noun: str) -> str:
    plural = noun if count == 1 or noun == Severity.INFO else f"{noun}s"
    return f"{count:,} {plural}"


def summary(examination: Examination) -> str:
    """One line: what was examined and what was found."""
    layers = counted(len(examination.layers), "BN layer") if examination.layers else "no BN layers"
    return f"{shown(examination.source)}: {layers}, {counts(examination.findings)}"


def not_run(rules: Iterable[NotRun]) -> str:
    """What rules need that could not run; empty if all could.

    Example:
        >>> not_run([NotRun("BN201", "bias-before-bn", ["model"]), NotRun("BN207", "gap", ["model", "data"])])
        'BN201 needs --model; BN207 needs --model and --data'
    """
    by_needs: dict[tuple[str, ...], list[str]] = {}
    for rule in rules:
        by_needs.setdefault(tuple(rule.needs), []).append(rule.code)
    fewest_first = sorted(by_needs.items(), key=lambda item: len(item[0]))
    return "; ".join(
        f"{ranges(codes)} {'needs' if len(codes) == 1 else 'need'} {asked(needs)}" for needs, codes in fewest_first
    )


def ranges(codes: Iterable[str]) -> str:
    """Codes in rising order, where three in a row and more are a range.

    Example:
        >>> ranges(["BN001", "BN002", "BN003", "BN101", "BN102"])
        'BN001 to BN003, BN101, BN102'
    """
    rows: list[list[str]] = []
    for code in codes:
        if rows and int(code[2:]) == int(rows[-1][-1][2:]) + 1:
            rows[-1].append(code)
        else:
            rows.append([code])
    return ", ".join(f"{row[0]} to {row[-1]}" if len(row) > 2 else ", ".join(row) for row in rows)


def asked(needs: Iterable[str]) -> str:
    return joined([GIVEN_BY[need] for need in GIVEN_BY if need in needs])
