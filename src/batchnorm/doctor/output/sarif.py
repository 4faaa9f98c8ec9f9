"""The ``sarif`` format: SARIF 2.1.0, which code scanning services read."""

import hashlib
import json
from collections import Counter
from pathlib import PurePath
from typing import Any
from urllib.parse import quote

from batchnorm import __version__
from batchnorm.doctor.catalogue import RULES
from batchnorm.doctor.examine import Examination
from batchnorm.doctor.finding import Finding, Severity
from batchnorm.doctor.output.groups import asked, described_remedy
from batchnorm.doctor.output.names import layer_name, shown
from batchnorm.doctor.pages import page
from batchnorm.files import finite

SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
LEVELS = {Severity.ERROR: "error", Severity.WARNING: "warning", Severity.INFO: "note"}
# GitHub asks for a line, which a checkpoint does not have
REGION = {"startLine": 1}


def render(examination: Examination) -> str:
    """A log with one run: a result for each finding, a notification for each rule that did not run."""
    found = dict.fromkeys((finding.code, finding.name) for finding in examination.findings)
    driver = {
        "name": "batchnorm doctor",
        "semanticVersion": __version__,
        "rules": [descriptor(code, name) for code, name in found],
    }
    notifications = [
        {"level": "note", "message": {"text": f"{rule.code} {rule.name} did not run: it needs {asked(rule.needs)}."}}
        for rule in examination.not_run
    ]
    run = {
        "tool": {"driver": driver},
        "invocations": [{"executionSuccessful": True, "toolConfigurationNotifications": notifications}],
        "artifacts": [{"location": {"uri": uri(examination.source)}}],
        "results": results(examination, list(found)),
    }
    log = {"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}
    return json.dumps(finite(log), indent=1, allow_nan=False) + "\n"


def descriptor(code: str, name: str) -> dict[str, Any]:
    """What a service shows about a rule."""
    rule = next((rule for rule in RULES if rule.code == code), None)
    if rule is None:
        return {"id": code, "name": name}
    text = page(rule)
    return {
        "id": code,
        "name": name,
        "shortDescription": {"text": rule.summary},
        "fullDescription": {"text": rule.summary},
        "help": {"text": text, "markdown": text},
        "defaultConfiguration": {"level": LEVELS[rule.severity]},
    }


def results(examination: Examination, rules: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """A rule may find several faults in one layer: their fingerprints end in the number of each."""
    location = {"artifactLocation": {"uri": uri(examination.source), "index": 0}, "region": REGION}
    seen: Counter[tuple[str, str]] = Counter()
    records = []
    for finding in examination.findings:
        place = finding.code, finding.layer
        seen[place] += 1
        records.append(
            {
                "ruleId": finding.code,
                "ruleIndex": rules.index((finding.code, finding.name)),
                "level": LEVELS[finding.severity],
                "message": {"text": message(finding)},
                "locations": [{"physicalLocation": location, **logical(finding)}],
                "partialFingerprints": {"primaryLocationLineHash": f"{digest(place)}:{seen[place]}"},
                "properties": {
                    "layer": shown(finding.layer),
                    "measured": harmless(finding.measured),
                    "threshold": harmless(finding.threshold),
                    "safe": finding.safe,
                    "confidence": finding.confidence,
                },
            }
        )
    return records


def message(finding: Finding) -> str:
    """What was found and what to do; a link cannot begin in it."""
    where = f"{layer_name(finding.layer)}: " if finding.layer else ""
    text = " ".join(part for part in (f"{where}{shown(finding.message)}", described_remedy(finding)) if part)
    return text.replace("\\", "\\\\").replace("[", r"\[").replace("]", r"\]") if "](" in text else text


def logical(finding: Finding) -> dict[str, Any]:
    return (
        {"logicalLocations": [{"fullyQualifiedName": shown(finding.layer), "kind": "module"}]} if finding.layer else {}
    )


def harmless(value: Any) -> Any:
    """A record whose names can be shown: services keep them in databases that refuse some characters."""
    if isinstance(value, str):
        return shown(value)
    if isinstance(value, dict):
        return {shown(str(name)): harmless(item) for name, item in value.items()}
    return [harmless(item) for item in value] if isinstance(value, list | tuple) else value


def uri(source: str) -> str:
    """A relative reference, or a file: URI of an absolute path."""
    path = PurePath(source).as_posix()
    # names of files that are not UTF-8 have surrogates in them
    return ("file://" if path.startswith("/") else "") + quote(path, errors="surrogatepass")


def digest(place: tuple[str, str]) -> str:
    return hashlib.sha256(json.dumps(place).encode()).hexdigest()[:16]
