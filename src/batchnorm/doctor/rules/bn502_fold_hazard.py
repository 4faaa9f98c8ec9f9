"""# BN502: fold-hazard

## What it finds
A layer whose folding into the neighbouring weights would give values that float16 cannot hold, or output channels of
so different a range that quantization with one scale for the whole weight loses most of them.

## Why it is bad
Folding multiplies each output channel by gamma / sqrt(var + eps). Where a variance is nearly 0 that factor is large:
above 65504 float16 has infinity. And with one scale for a weight in int8, the widest channel sets the step: channels
whose range is 254 times smaller are rounded to 0 as a whole.

## How it arises
Channels that are nearly constant (dead after an activation), gammas that grew, very different scales of input
channels.

## Evidence
The folded weight and bias of `batchnorm.fold`, in float64. Overflow: the largest absolute value above 65504. Range:
the widest output channel above 10,000 times the median one. The median stands for the channels that matter: dead ones,
of range almost 0, are common and harmless. Above 254 half of the channels vanish in int8 with one scale; 10,000 leaves
them too few steps in 16 bits as well (65,536 / 10,000 = 6.5).

## Remedy
Fold and deploy in float32 or bfloat16, quantize with one scale per channel, or look at the channels first: BN103 finds
collapsed variances.

## False positives
Deployment in float32, or quantization per channel: then nothing is lost.

## References
Nagel et al. 2019 (arXiv:1906.04721), section 3, on ranges of channels after folding.
"""

from collections.abc import Iterator

from batchnorm.doctor.finding import Finding, Severity
from batchnorm.doctor.rule import Needs, Rule, Subject
from batchnorm.doctor.rules.values import plain

LARGEST_FLOAT16 = 65504.0
WIDEST = 1e4


def check(subject: Subject) -> Iterator[Finding]:
    """One finding for each layer."""
    from batchnorm.doctor.live_flow import flow_of

    for one in flow_of(subject).folded:
        overflows, is_wide = one.largest > LARGEST_FLOAT16, one.widest > WIDEST
        if not (overflows or is_wide):
            continue
        parts = [f"values up to {one.largest:.3g}, where float16 ends at 65504"] * overflows
        parts += [f"a channel {one.widest:.3g} times as wide as the median, too wide for one scale in int8"] * is_wide
        yield Finding(
            RULE.code,
            RULE.name,
            Severity.WARNING,
            one.layer,
            f"Folded into {one.owner or 'the model'!r} it would give {' and '.join(parts)}.",
            measured={"module": one.owner, "largest": plain(one.largest), "widest": plain(one.widest)},
            threshold={"largest": LARGEST_FLOAT16, "widest": WIDEST},
            remedy="Deploy the folded model in float32 or bfloat16, or quantize with one scale per channel.",
            safe=None,
        )


RULE = Rule(
    "BN502",
    "fold-hazard",
    Severity.WARNING,
    frozenset({Needs.MODEL}),
    "folding would overflow float16 or spread the ranges of channels",
    check,
    preview=True,
)
