"""Every rule on every subject of the corpora: what is found is what is committed, and what should be found."""

from pathlib import Path

import pytest
import torch

from batchnorm.doctor.catalogue import RULES
from batchnorm.doctor.rule import Needs
from doctor.evidence import PAGE, Row, Trial, examination, page, read_record, run, trials

TRIALS = trials()
ROWS = read_record()
AGAIN = "make it again: python tests/doctor/evidence.py"


@pytest.fixture(autouse=True)
def deterministic_where_possible():
    # adaptive pooling of other libraries' networks has no deterministic gradient
    torch.use_deterministic_algorithms(False)


def title(trial: Trial | Row) -> str:
    corpus, kind, name = trial[:3] if isinstance(trial, Trial) else (trial[key] for key in ("corpus", "kind", "name"))
    return f"{corpus}: {kind}: {name}"


def of_kind(kind: str) -> list[Row]:
    return [row for row in ROWS if row["kind"] == kind]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("trial", TRIALS, ids=title)
def test_what_is_found_is_what_the_record_says(trial: Trial, tmp_path: Path):
    assert run(trial, tmp_path) == {title(row): row for row in ROWS}[title(trial)], AGAIN


def test_the_record_has_every_subject_once():
    assert [title(row) for row in ROWS] == [title(trial) for trial in TRIALS], AGAIN


def test_the_page_says_what_the_record_says():
    assert PAGE.read_text() == page(ROWS), AGAIN


@pytest.mark.parametrize("row", of_kind("fault"), ids=title)
def test_a_fault_leads_to_its_findings_and_no_others(row: Row):
    assert {*row["wanted"]} - {*row["missed"]} <= row["found"].keys()
    assert not {*row["missed"]} & row["found"].keys()
    # of a file, information too: rules about models are many, and what they tell besides is true
    others = {code for code, severity in row["found"].items() if row["given"] == ["file"] or severity != "info"}
    assert others <= {*row["wanted"]}


@pytest.mark.parametrize("row", of_kind("healthy"), ids=title)
def test_a_healthy_subject_leads_to_information_at_most(row: Row):
    assert {*row["found"].values()} <= {"info"}
    if row["given"] == ["file"]:
        assert [*row["found"]] == row["wanted"]


def test_no_rule_that_ships_as_an_error_has_a_false_positive_among_healthy_subjects():
    for rule in RULES:
        if rule.severity == "error":
            assert {row["found"].get(rule.code) for row in of_kind("healthy")} <= {None, "info"}, rule.code
            assert "error" in {row["found"].get(rule.code) for row in of_kind("fault")}, rule.code


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("trial", [trial for trial in TRIALS if trial.kind == "false positive"], ids=title)
def test_a_known_false_positive_is_never_certain_and_an_error(trial: Trial, tmp_path: Path):
    findings = examination(trial, tmp_path)[0].findings
    assert trial.case.codes <= {finding.code for finding in findings}
    assert all((finding.severity, finding.confidence) != ("error", "certain") for finding in findings)


def test_every_rule_about_one_process_has_three_faults():
    for rule in RULES:
        if Needs.RANKS not in rule.needs and rule.code != "BN501":
            assert sum(rule.code in row["wanted"] for row in of_kind("fault")) >= 3, rule.code
