"""# BN205: not-reached-once

## What it finds
A layer that no forward of these data reaches, or that one forward reaches several times.

## Why it is bad
A layer that is not reached keeps its running statistics whatever happens to the weights before it, and its parameters
get no gradient. A layer that is used for several values in one forward moves its running statistics once for each of
them; if these differ, the average fits none, and evaluation normalizes each by the statistics of another mixture than
training did. Its counter grows by as much per step, and with momentum m the average forgets as after `1 - (1 - m)^n`.

## How it arises
Heads that only training uses, branches on a flag, layers left from an older version of the model. One module in a
loop, the same block for two views or two scales, recurrent networks.

## Evidence
Calls are counted in evaluation, forward by forward. Several calls are a warning if their inputs differ by more than
0.5 standard deviations in the mean (over the channels the root of the mean square), or their variances by more than a
factor of 2 (in the geometric mean); otherwise info.

Few samples raise both limits.

## Remedy
One layer for each value: the weights of the block can stay shared, the normalization not. For a layer that is not
reached: give data that reach it, or take it out.

## False positives
Auxiliary heads that are there for training only. Siamese networks whose two inputs have the same distribution.

## References
Cooijmans et al. 2016 (arXiv:1603.09025): recurrent batch normalization keeps separate statistics for each time step.
"""

from collections.abc import Iterator
from typing import Any

from batchnorm.doctor.finding import Finding, Severity
from batchnorm.doctor.rule import Needs, Rule, Subject
from batchnorm.doctor.rules.values import plain

MEAN_OFF = 0.5
VAR_FACTOR = 2.0


def check(subject: Subject) -> Iterator[Finding]:
    """One finding for each layer."""
    from batchnorm.doctor.live_data import norms, sample_of

    assert subject.model is not None
    layers, sample = norms(subject.model), sample_of(subject)
    for name, use in sample.uses.items():
        if not any(use.calls):
            yield Finding(
                RULE.code,
                RULE.name,
                Severity.INFO,
                name,
                f"None of {len(use.calls)} batches reached it in evaluation: its running statistics stay what they "
                "are, whatever becomes of the weights before it.",
                measured={"calls": 0, "forwards": len(use.calls)},
                threshold={"calls": 1},
                remedy="Give data that reach it, or take it out if nothing does.",
                confidence="possible",
            )
        elif max(use.calls) > 1:
            yield shared(name, layers[name], use, sample.samples)


def shared(name: str, layer: Any, use: Any, samples: int) -> Finding:
    mean_off, var_factor = differences(layer, [one for one in use.by_call if one.count])
    # what a few samples differ by anyway
    chance = (2 / max(samples, 1)) ** 0.5
    mean_limit, var_limit = max(MEAN_OFF, 4 * chance), max(VAR_FACTOR, 1 + 8 * chance)
    differ = mean_off > mean_limit or var_factor > var_limit
    calls = max(use.calls)
    return Finding(
        RULE.code,
        RULE.name,
        Severity.WARNING if differ else Severity.INFO,
        name,
        f"One forward calls it {calls} times, and each call moves its running statistics. The inputs differ by "
        f"{mean_off:.2g} standard deviations in the mean and a factor of {var_factor:.2g} in the variance"
        + (": one average cannot fit them, and evaluation is off by as much." if differ else "."),
        measured={"calls": calls, "mean_off": plain(mean_off), "var_factor": plain(var_factor)},
        threshold={"calls": 1, "mean_off": plain(mean_limit), "var_factor": plain(var_limit)},
        remedy="Give each use a layer of its own; the weights of the block can stay shared.",
        safe=False if differ else None,
        confidence="certain" if differ else "possible",
    )


def differences(layer: Any, by_call: list[Any]) -> tuple[float, float]:
    """The largest of any call from the first: of the means in standard deviations, and the factor of the variances."""
    first, *others = [(one.mean, one.squares / one.count + layer.eps) for one in by_call]
    largest_off, largest_factor = 0.0, 1.0
    for mean, var in others:
        wide = (first[1] + var) / 2
        off = ((mean - first[0]).square() / wide).mean().sqrt().item()
        factor = (var / first[1]).log().abs().mean().exp().item()
        largest_off, largest_factor = max(largest_off, off), max(largest_factor, factor)
    return largest_off, largest_factor


RULE = Rule(
    "BN205",
    "not-reached-once",
    Severity.WARNING,
    frozenset({Needs.MODEL, Needs.DATA}),
    "a forward reaches the layer never, or several times",
    check,
    preview=True,
)
