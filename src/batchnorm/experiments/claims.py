"""Claims: a sentence of the paper, a rule fixed beforehand, what was measured, and the verdict."""

import dataclasses
import math
from typing import Any

from batchnorm.files import finite

REPRODUCED = "reproduced"
NOT_REPRODUCED = "not reproduced"
NOT_COMPARABLE = "not comparable"

# Student's t, 97.5 % quantile for 1, 2, ... degrees of freedom; beyond 30 the normal quantile is within 4 %.
T_QUANTILE = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
NORMAL_QUANTILE = 1.960


@dataclasses.dataclass(frozen=True)
class Claim:
    """One claim with its evidence: plain data, as written to ``claims.json``.

    ``values`` holds one number per seed (null in the file where a network diverged); ``low`` and ``high`` bound the
    95 % interval of their mean, None where one seed gives no interval. ``rule`` says which interval reproduces it.
    """

    name: str
    statement: str
    source: str
    rule: str
    paper: str | None
    unit: str
    values: list[float]
    mean: float | None
    low: float | None
    high: float | None
    verdict: str
    detail: str


def interval(values: list[float]) -> tuple[float, float | None, float | None]:
    """Mean and 95 % interval by Student's t, for independent values such as paired differences over seeds.

    Example:
        >>> mean, low, high = interval([1.0, 2.0, 3.0])
        >>> round(mean, 2), round(low, 2), round(high, 2)
        (2.0, -0.48, 4.48)
        >>> interval([1.0])
        (1.0, None, None)
    """
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return mean, None, None
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    quantile = T_QUANTILE[count - 2] if count - 2 < len(T_QUANTILE) else NORMAL_QUANTILE
    half = quantile * deviation / math.sqrt(count)
    return mean, mean - half, mean + half


def judge(
    values: list[float],
    *,
    above: float | None = None,
    below: float | None = None,
    alone: tuple[float, float] | None = None,
) -> tuple[float | None, float | None, float | None, str]:
    """Mean, interval and verdict: reproduced if the whole interval lies above, or below, the bound.

    ``alone`` is the interval of a single value, where something else than seeds gives one. Otherwise one value, or a
    value that is not finite because a network diverged, cannot be compared.

    Example:
        >>> judge([0.3, 0.4, 0.35], above=0.0)[3], judge([0.3], above=0.0)[3]
        ('reproduced', 'not comparable')
    """
    if not all(map(math.isfinite, values)):
        return None, None, None, NOT_COMPARABLE
    mean, low, high = interval(values)
    if len(values) == 1 and alone is not None:
        low, high = alone
    if low is None or high is None:
        return mean, low, high, NOT_COMPARABLE
    holds = low > above if above is not None else below is not None and high < below
    return mean, low, high, REPRODUCED if holds else NOT_REPRODUCED


def overall(claims: list[Claim]) -> str:
    """The verdict of a run: reproduced only if every claim is."""
    verdicts = {claim.verdict for claim in claims}
    if verdicts == {REPRODUCED}:
        return REPRODUCED
    return NOT_REPRODUCED if NOT_REPRODUCED in verdicts else NOT_COMPARABLE


def claims_record(experiment: str, claims: list[Claim], **extra: Any) -> dict[str, Any]:
    """What goes into ``claims.json``."""
    return {
        "schema_version": 1,
        "experiment": experiment,
        "verdict": overall(claims),
        "claims": [finite(dataclasses.asdict(claim)) for claim in claims],
        **extra,
    }
