"""What every rule finds in every subject of the corpora: a record, and the page that is made from it.

    python tests/doctor/evidence.py    examines all subjects again and writes both; takes about a minute

``results/doctor/findings.jsonl`` has a line for each subject; ``docs/evidence/doctor.md`` is :func:`page` of these.
"""

import json
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT / "tests")]

import torch  # noqa: E402

from batchnorm.doctor.catalogue import RULES  # noqa: E402
from batchnorm.doctor.examine import Examination, examine  # noqa: E402
from batchnorm.doctor.finding import Severity  # noqa: E402
from batchnorm.doctor.rule import Needs, Rule  # noqa: E402
from doctor import container_corpus, corpus, live_corpus  # noqa: E402
from doctor.cases import Case  # noqa: E402
from examined import snapshot  # noqa: E402

RECORD = ROOT / "results/doctor/findings.jsonl"
PAGE = ROOT / "docs/evidence/doctor.md"
CORPORA = {"torch checkpoint": corpus, "file": container_corpus, "live model": live_corpus}
KINDS = {"fault": "FAULTS", "healthy": "HEALTHY", "false positive": "FALSE_POSITIVES"}
Row = dict[str, Any]


class Trial(NamedTuple):
    """A subject of a corpus."""

    corpus: str
    kind: str
    name: str
    case: Case


def trials() -> list[Trial]:
    return [
        Trial(name, kind, subject, case)
        for name, module in CORPORA.items()
        for kind, cases in KINDS.items()
        for subject, case in getattr(module, cases).items()
    ]


def run(trial: Trial, folder: Path) -> Row:
    """Examine a subject, and note the gravest severity of each rule's findings."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        result, given = examination(trial, folder)
    found: dict[str, str] = {}
    for finding in result.findings:
        # the gravest come first
        found.setdefault(finding.code, str(finding.severity))
    assert [one.code for one in result.not_run] == [rule.code for rule in RULES if not runs(rule, given)]
    return {
        "corpus": trial.corpus,
        "kind": trial.kind,
        "name": trial.name,
        "given": given,
        "wanted": sorted(trial.case.codes),
        "missed": sorted(trial.case.missed),
        "found": dict(sorted(found.items())),
    }


def examination(trial: Trial, folder: Path) -> tuple[Examination, list[str]]:
    """The result, and what it was given; a model is as before afterwards."""
    if trial.corpus == "torch checkpoint":
        return examine(corpus.write(trial.case, folder)), ["file"]
    if trial.corpus == "file":
        return examine(trial.case.make(folder)), ["file"]
    model, loader, optimizer = trial.case.make()
    parts = {"data": loader, "optimizer": optimizer}
    given = ["model", *(name for name, part in parts.items() if part is not None)]
    before = snapshot(model) if isinstance(model, torch.nn.Module) else None
    result = examine(model, loader, optimizer)
    assert before is None or snapshot(model) == before
    return result, given


def runs(rule: Rule, given: list[str]) -> bool:
    """Whether a rule can run on a subject; layers can be read of files and models."""
    return rule.needs <= {Needs.FILE, *given} and not (rule.container and "file" not in given)


def read_record() -> list[Row]:
    return [json.loads(line) for line in RECORD.read_text().splitlines()]


OPENING = """\
# What the doctor finds, and what it finds wrongly

Generated from `results/doctor/findings.jsonl` by `python tests/doctor/evidence.py`, which examines every subject again;
tests hold the record to the corpora, and this page to the record.

- **Subjects.** {faults} with faults and {healthy} healthy ones: checkpoints of torch, files that are damaged or hostile
  or of TensorFlow and Keras, and live models with data and optimizers. Faults are made the way they arise, where that
  takes a few lines: by training under activation checkpointing, by `half()`, by a saver of trainable variables. The
  healthy ones are small networks of torch, transformers, MONAI and efficientnet_pytorch, and layers of this package.
  Three networks of transformers stand among the faults though nobody put one in: they have a momentum of TensorFlow,
  0.99 and more.
- **Found** counts subjects with this fault in which the rule says so, at any severity. Whether it names the right
  layers and numbers is what the tests of each rule are for.
- **Healthy** counts, of the healthy subjects on which the rule can run, those where it says anything. Info is not wrong
  there: that all statistics are those of a new model is true of a new model.
- **Known false positives** are subjects that are healthy because of what somebody means by them, which the rule cannot
  see: they were sought for this page, are no part of the healthy ones, and their number says nothing about how frequent
  they are. No rule ships as an error that finds an error or a warning in a healthy subject; a test says so.

What this does not show: weights are random or trained for a few steps, networks are small, and no checkpoint that
somebody published is among them. Who made the faults knew the rules, and the limits of some rules were chosen with
subjects like these in view. So the share of all faults in the world that would be found cannot be read from the table;
that a rule works as its page says can.
"""
RANKS = "in tests only"


def page(rows: list[Row]) -> str:
    faults, healthy = ([row for row in rows if row["kind"] == kind] for kind in ("fault", "healthy"))
    wrong = [row for row in rows if row["kind"] == "false positive"]
    parts = [
        OPENING.format(faults=len(faults), healthy=len(healthy)),
        "## By rule\n",
        table(
            ["rule", "gravest", "faults found", "healthy: error", "warning", "info", "known false positives"],
            [by_rule(rule, rows) for rule in RULES],
        ),
        "Rules about ranks need several processes: `tests/doctor/test_rules_ranks.py` has their faults and healthy "
        "models.\nBN501 counts what can be folded, and is no fault.\n",
        "## Faults that are not found\n",
        table(
            ["subject", "of", "rule"], [[row["name"], row["corpus"], ", ".join(row["missed"])] for row in lost(rows)]
        ),
        "## Known false positives\n",
        f"Who means them knows them, and ignores the rule for them. Errors among them: {errors_among(wrong)}.\n",
        table(["subject", "of", "what is found"], [line(row) for row in wrong]),
        "## Healthy subjects\n",
        table(["subject", "of", "what is found"], [line(row) for row in healthy]),
        "## Faults\n",
        table(["subject", "of", "what is found"], [line(row) for row in faults]),
    ]
    return "\n".join(parts)


def by_rule(rule: Rule, rows: list[Row]) -> list[str]:
    """A row of the first table."""
    start = [f"`{rule.code}` {rule.name}", str(rule.severity)]
    if Needs.RANKS in rule.needs:
        return [*start, RANKS, *[""] * 4]
    faulty = [row for row in rows if row["kind"] == "fault" and rule.code in row["wanted"]]
    found = sum(rule.code in row["found"] for row in faulty)
    healthy = [row for row in rows if row["kind"] == "healthy" and runs(rule, row["given"])]
    fired = Counter(row["found"].get(rule.code) for row in healthy)
    wrong = Counter(row["found"][rule.code] for row in rows if is_wrong(rule, row))
    return [
        *start,
        f"{found} of {len(faulty)}" if faulty else "",
        *(f"{fired[severity]} of {len(healthy)}" for severity in Severity),
        ", ".join(f"{wrong[severity]} {severity}" for severity in Severity if wrong[severity]),
    ]


def is_wrong(rule: Rule, row: Row) -> bool:
    return row["kind"] == "false positive" and rule.code in row["wanted"]


def errors_among(rows: Iterable[Row]) -> str:
    return ", ".join(row["name"] for row in rows if "error" in row["found"].values()) or "none"


def lost(rows: Iterable[Row]) -> Iterator[Row]:
    return (row for row in rows if row["missed"])


def line(row: Row) -> list[str]:
    return [row["name"], row["corpus"], ", ".join(f"{code} {severity}" for code, severity in row["found"].items())]


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    cells = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells) + "\n"


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows = []
    for trial in trials():
        with tempfile.TemporaryDirectory() as folder:
            rows.append(run(trial, Path(folder)))
    RECORD.parent.mkdir(parents=True, exist_ok=True)
    RECORD.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(page(rows))


if __name__ == "__main__":
    main()
