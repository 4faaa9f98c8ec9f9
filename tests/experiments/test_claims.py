"""Intervals and verdicts against numbers worked out elsewhere."""

import json
import math

import pytest

from batchnorm.experiments.claims import (
    NORMAL_QUANTILE,
    NOT_COMPARABLE,
    NOT_REPRODUCED,
    REPRODUCED,
    T_QUANTILE,
    Claim,
    claims_record,
    interval,
    judge,
    overall,
)

NAN, INF = math.nan, math.inf


def make_claim(verdict: str = REPRODUCED, values: tuple[float, ...] = (1.0, 2.0)) -> Claim:
    return Claim("name", "statement", "source", "rule", None, "unit", list(values), 1.5, 1.0, 2.0, verdict, "detail")


# mean +- t(0.975, n - 1) * s / sqrt(n), with t from a printed table
@pytest.mark.parametrize(
    ("values", "mean", "half"),
    [
        ([0.0, 2.0], 1.0, 12.706 * math.sqrt(2) / math.sqrt(2)),
        ([1.0, 2.0, 3.0], 2.0, 4.303 / math.sqrt(3)),
        ([2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0], 5.0, 2.365 * math.sqrt(32 / 7) / math.sqrt(8)),
        ([5.0, 5.0, 5.0], 5.0, 0.0),
        ([1e9 + 1, 1e9 + 2, 1e9 + 3], 1e9 + 2, 4.303 / math.sqrt(3)),
    ],
)
def test_interval_is_students(values: list[float], mean: float, half: float):
    actual = interval(values)
    assert actual == pytest.approx((mean, mean - half, mean + half), rel=1e-12)


def test_quantiles_are_those_of_student():
    table = {1: 12.706, 2: 4.303, 4: 2.776, 9: 2.262, 19: 2.093, 29: 2.045, 30: 2.042}
    assert {degrees: T_QUANTILE[degrees - 1] for degrees in table} == table
    assert len(T_QUANTILE) == 30
    assert list(T_QUANTILE) == sorted(T_QUANTILE, reverse=True)
    assert T_QUANTILE[-1] > NORMAL_QUANTILE


def test_interval_of_many_values_uses_the_normal_quantile():
    values = [0.0, 2.0] * 50
    _, low, high = interval(values)
    assert high is not None
    assert low is not None
    assert (high - low) / 2 == pytest.approx(NORMAL_QUANTILE * math.sqrt(100 / 99) / 10)


def test_one_value_has_no_interval():
    assert interval([0.25]) == (0.25, None, None)


@pytest.mark.parametrize(
    ("values", "bound", "verdict"),
    [
        ([0.3, 0.4, 0.35], {"above": 0.0}, REPRODUCED),
        ([-0.3, -0.4, -0.35], {"above": 0.0}, NOT_REPRODUCED),
        ([0.3, -0.3, 0.1], {"above": 0.0}, NOT_REPRODUCED),
        ([0.0, 0.0], {"above": 0.0}, NOT_REPRODUCED),
        ([0.3, 0.4, 0.35], {"below": 1.0}, REPRODUCED),
        ([1.3, 1.4, 1.35], {"below": 1.0}, NOT_REPRODUCED),
        ([1.0, 1.0], {"below": 1.0}, NOT_REPRODUCED),
        ([0.3], {"above": 0.0}, NOT_COMPARABLE),
    ],
)
def test_only_a_whole_interval_beyond_the_bound_reproduces(values: list[float], bound: dict[str, float], verdict: str):
    assert judge(values, **bound) == (*interval(values), verdict)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("bound", [{"above": 0.0}, {"below": 1.0}])
def test_a_diverged_seed_cannot_be_compared(value: float, bound: dict[str, float]):
    assert judge([0.3, value, 0.4], **bound) == (None, None, None, NOT_COMPARABLE)


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        ([REPRODUCED, REPRODUCED], REPRODUCED),
        ([REPRODUCED, NOT_REPRODUCED], NOT_REPRODUCED),
        ([REPRODUCED, NOT_COMPARABLE], NOT_COMPARABLE),
        ([NOT_COMPARABLE, NOT_REPRODUCED], NOT_REPRODUCED),
    ],
)
def test_a_run_is_reproduced_only_if_every_claim_is(verdicts: list[str], expected: str):
    assert overall([make_claim(verdict) for verdict in verdicts]) == expected


def test_the_record_of_a_diverged_run_is_json():
    record = claims_record("mnist", [make_claim(NOT_COMPARABLE, (1.0, NAN))], unit_drawn=3)
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record["claims"][0]["values"] == [1.0, None]
    assert (record["verdict"], record["unit_drawn"], record["experiment"]) == (NOT_COMPARABLE, 3, "mnist")
