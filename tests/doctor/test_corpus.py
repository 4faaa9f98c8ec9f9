"""Every rule on every file of the corpus."""

from pathlib import Path

import pytest
import torch

from batchnorm.doctor.catalogue import RULES
from batchnorm.doctor.examine import Examination, examine
from batchnorm.doctor.finding import Severity
from batchnorm.doctor.rule import Needs
from doctor.corpus import FALSE_POSITIVES, FAULTS, HEALTHY, Case, write


@pytest.fixture(autouse=True)
def deterministic_where_possible():
    # adaptive pooling of other libraries' networks has no deterministic gradient
    torch.use_deterministic_algorithms(False)


def codes(result: Examination) -> set[str]:
    return {finding.code for finding in result.findings}


@pytest.mark.parametrize("case", FAULTS.values(), ids=FAULTS)
def test_a_fault_leads_to_its_findings_and_no_others(case: Case, tmp_path: Path):
    assert codes(examine(write(case, tmp_path))) == case.codes


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("case", HEALTHY.values(), ids=HEALTHY)
def test_a_healthy_file_has_no_faults(case: Case, tmp_path: Path):
    result = examine(write(case, tmp_path))
    assert codes(result) == case.codes
    assert all(finding.severity == Severity.INFO for finding in result.findings if finding.code >= "BN1")


@pytest.mark.parametrize("case", FALSE_POSITIVES.values(), ids=FALSE_POSITIVES)
def test_a_known_false_positive_is_never_certain_and_an_error(case: Case, tmp_path: Path):
    result = examine(write(case, tmp_path))
    assert codes(result) == case.codes
    assert all((finding.severity, finding.confidence) != (Severity.ERROR, "certain") for finding in result.findings)


def test_every_rule_about_values_has_three_faults():
    for rule in RULES:
        if "BN100" <= rule.code <= "BN109" and rule.needs <= {Needs.FILE}:
            assert sum(rule.code in case.codes for case in FAULTS.values()) >= 3, rule.code
