"""Whitening is timed beside the research code's formulation and BN, once everybody's results are right."""

import pytest
import torch

from batchnorm.benchmarks import whitening
from batchnorm.benchmarks.peers import BATCH_NORM, MATRIX, OURS
from batchnorm.benchmarks.summary import cases_of, targets
from batchnorm.benchmarks.tables import whitening_table
from batchnorm.benchmarks.whitening import CASES, WhiteningCase, measure_whitening
from batchnorm.relatives.whitening import METHODS


def test_names_are_unique_and_every_case_has_whole_groups():
    assert len({case.name for case in CASES}) == len(CASES)
    assert all(case.shape[1] % case.group_size == 0 for case in CASES)
    assert {case.method for case in CASES} < set(METHODS)


@pytest.mark.parametrize("method", ["zca", "newton_schulz", "cholesky"])
@pytest.mark.parametrize("shape", [(64, 8), (4, 8, 5, 5)])
def test_everybody_is_measured_and_the_tables_tell(method: str, shape: tuple[int, ...]):
    records = measure_whitening(WhiteningCase("here", shape, method=method, group_size=4), 0.001)
    assert {(r["kind"], r["peer"], r["suite"]) for r in records} == {
        ("time", peer, "whitening") for peer in (MATRIX, BATCH_NORM, OURS)
    }
    assert records[-1]["peer"] == OURS
    (case,) = cases_of(records, ["whitening"])
    (row,) = whitening_table([case]).splitlines()[2:]
    assert row.startswith(f"| {case.record['case']} | ")
    target = targets(records)[-1]
    assert target.value == pytest.approx(case.ratio(MATRIX))


def test_a_record_without_whitening_has_no_target_for_it():
    assert not any("whitening" in target.name for target in targets([]))


def test_a_wrong_formulation_is_left_out_and_a_wrong_layer_is_not_timed(monkeypatch: pytest.MonkeyPatch):
    case = WhiteningCase("here", (64, 8), group_size=4)
    monkeypatch.setattr(whitening.Matrix, "matrix", lambda self, cov: torch.full_like(cov, 2.0))
    records = measure_whitening(case, 0.001)
    assert [(r["kind"], r["peer"]) for r in records if r["peer"] == MATRIX] == [("skipped", MATRIX)]
    monkeypatch.setattr(whitening, "ours", lambda *_: 1 / 0)
    records = measure_whitening(case, 0.001)
    assert [(r["kind"], r["peer"]) for r in records] == [("failed", OURS), ("skipped", MATRIX)]
    assert records[0]["reason"] == "ZeroDivisionError: division by zero"
