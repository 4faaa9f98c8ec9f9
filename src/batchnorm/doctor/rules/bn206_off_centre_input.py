"""# BN206: off-centre-input

## What it finds
A layer with a channel whose mean is more than 1000 times its standard deviation, so that normalizing it loses digits.

## Why it is bad
float32 has 7 digits. A mean of 1000 standard deviations takes 3 of them, and what the layer makes larger is what is
left, rounding errors of the input and of the kernel. torch's CPU kernel computes `x * scale + shift` with a shift as
large as the mean over the standard deviation, which loses more: at 10^4 it is wrong by 8e-4 standard deviations, at
10^6 by 0.03.

## How it arises
Raw inputs with an offset (timestamps, temperatures in kelvin, counts, addresses), a bias that grew, a channel that is
nearly constant.

## Evidence
|mean| / sqrt(var + eps) in evaluation, above 1000. Then this channel of this batch goes through the layer's own kernel
and through the formula in float64, and the largest difference is what is reported, from 1e-5 standard deviations on; a
warning from 1e-3 on. Measured with torch 2.13 on a CPU, 64 x 14 x 14 values: 4e-7 at mean / std 1, 4e-5 at 10^3, 8e-4
at 10^4, 3.5e-3 at 10^5. Our layers stay below 6e-7 at all of them: they keep sums and mean in float64, and are not
reported.

## Remedy
Subtract the offset before the layer, before it is rounded to float32. `batchnorm.convert(model)` keeps the digits that
the input has, and is safe: it changes outputs by the rounding errors that it takes away.

## False positives
None known: the loss is measured. It may be too small to matter.

## References
Chan, Golub and LeVeque 1983, "Algorithms for computing the sample variance", for the condition number.
"""

from collections.abc import Iterator

from batchnorm.doctor.finding import Finding, Severity
from batchnorm.doctor.rule import Needs, Rule, Subject
from batchnorm.doctor.rules.values import plain

LOSS = 1e-5
GRAVE_LOSS = 1e-3


def check(subject: Subject) -> Iterator[Finding]:
    """One finding for each layer."""
    from batchnorm.doctor.live_data import OFF_CENTRE, sample_of

    for name, use in sample_of(subject).uses.items():
        if use.loss is None or not use.loss > LOSS:
            continue
        yield Finding(
            RULE.code,
            RULE.name,
            Severity.WARNING if use.loss >= GRAVE_LOSS else Severity.INFO,
            name,
            f"A channel of its input has a mean of {use.off_centre:.2g} standard deviations. Normalizing it loses "
            f"digits: the output is wrong by up to {use.loss:.2g} standard deviations.",
            measured={"mean_by_std": plain(use.off_centre), "loss": plain(use.loss)},
            threshold={"mean_by_std": OFF_CENTRE, "loss": LOSS},
            remedy="Subtract the offset before the layer; batchnorm.convert(model) keeps the digits that are there.",
            safe=True,
        )


RULE = Rule(
    "BN206",
    "off-centre-input",
    Severity.WARNING,
    frozenset({Needs.MODEL, Needs.DATA}),
    "a mean of more than 1000 standard deviations costs digits",
    check,
    preview=True,
)
