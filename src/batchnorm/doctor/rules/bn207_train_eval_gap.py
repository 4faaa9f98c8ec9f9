"""# BN207: train-eval-gap

## What it finds
A model whose outputs in evaluation differ from those with batch normalization as in training, on the same data, and
the layers that cause it, with the reason.

## Why it is bad
What was trained is not what is evaluated. The usual symptom: a loss that is fine in training mode and poor after
`model.eval()`.

## How it arises
- initial values left over: (1 - momentum)^batches of mean 0 and variance 1 are still in the running statistics.
- stale average: the weights moved after the average was taken, or the data are others; from one loader the two cannot
  be told apart, except by a layer that no weights precede ("other data").
- not finite: a batch with inf or NaN is in the average for ever.
- few values, sampling noise: the running statistics fit, and the batches are too small for theirs to be near them.
- inherited: the layer itself fits, and layers before it hand it something else in evaluation.

## Evidence
`batchnorm.insight.explain_gap` on the first four batches of the loader, without dropout. The gap is the root of the
mean square difference of the outputs over their standard deviation; reported from 0.1 on. Then one layer at a time
normalizes by its batches while all others evaluate: how much of the gap is left says what the layer contributes. A
cause other than sampling needs a difference of three times what the scatter of the batches explains. A warning if a
layer has such a cause, otherwise info.

## Remedy
By cause. For all but noise: `batchnorm.recalibrate(model, loader)` with training data, which changes outputs. For few
values: larger batches or SyncBatchNorm in training.

## False positives
A loader whose data differ from training on purpose. A model in the middle of training, whose weights move faster than
the average follows.

## References
pytorch/pytorch#5406, keras-team/keras#7265; Wu and Johnson 2021 (arXiv:2105.07576), section 3.
"""

from collections.abc import Iterator

from batchnorm.doctor.finding import Finding, Severity
from batchnorm.doctor.rule import Needs, Rule, Subject
from batchnorm.doctor.rules.values import plain

LIMIT = 0.1
NAMED = 3


def check(subject: Subject) -> Iterator[Finding]:
    """One finding for the model."""
    from batchnorm.doctor.live_data import gap_of
    from batchnorm.insight.gap_causes import AT_FAULT

    gap = gap_of(subject, LIMIT)
    if gap is None or not gap.gap >= LIMIT:
        return
    faulty = [one for one in gap.layers if one.cause in AT_FAULT]
    first = (faulty or list(gap.layers))[:NAMED]
    named = "; ".join(f"{one.name or '(the model)'}: {one.cause}, {one.gap_left:.2g} left without it" for one in first)
    more = f"; and {len(faulty) - NAMED} more" if len(faulty) > NAMED else ""
    scores = "" if gap.disagreement is None else f", another largest score in {gap.disagreement:.0%} of the samples"
    yield Finding(
        RULE.code,
        RULE.name,
        Severity.WARNING if faulty else Severity.INFO,
        "",
        f"Evaluation is {gap.gap:.2g} standard deviations of the output from batch normalization as in training"
        f"{scores}. Layers that cause it: {named}{more}.",
        measured={
            "gap": plain(gap.gap),
            "disagreement": None if gap.disagreement is None else plain(gap.disagreement),
            "samples": gap.samples,
            "layers": [
                {"layer": one.name, "cause": one.cause, "change": plain(one.change), "gap_left": plain(one.gap_left)}
                for one in gap.layers
            ],
        },
        threshold={"gap": LIMIT},
        remedy=f"{first[0].remedy[0].upper()}{first[0].remedy[1:]}." if first else "",
        safe=False if faulty else None,
        confidence="likely",
    )


RULE = Rule(
    "BN207",
    "train-eval-gap",
    Severity.WARNING,
    frozenset({Needs.MODEL, Needs.DATA}),
    "evaluation and training give different outputs",
    check,
    preview=True,
)
