"""# BN208: dropout-before

## What it finds
Dropout whose output a batch normalization layer takes directly.

## Why it is bad
Dropout keeps the mean, but not the variance: what is kept is scaled by 1 / (1 - p), so in training the variance is
(var + p mean^2) / (1 - p), and that goes into the running variance. In evaluation nothing is dropped, the variance is
var, and the layer divides by a standard deviation that is too large: the output shrinks by up to sqrt(1 - p).

## How it arises
Dropout put behind a convolution or an activation out of habit, in an architecture that normalizes next.

## Evidence
No threshold: torch.fx follows the data flow, through modules that do nothing; modules and functions of dropout with p
above 0 count, alpha dropout does not, since it keeps mean and variance. The number in the message is exact for a mean
of 0; it is smaller for others.

## Remedy
Dropout behind the last batch normalization, or behind the activation that follows it, just before a linear layer at the
end. A gap that is there already closes by measuring the statistics without dropout: `batchnorm.recalibrate(model,
loader)`, which changes outputs.

## False positives
None known; the shift may be small where the mean is large or p is small. Dropout with weights between it and the layer
shifts the variance as well, by less, and is not reported.

## References
Li, Chen, Hu and Yang 2019, "Understanding the disharmony between dropout and batch normalization by variance shift"
(CVPR).
"""

from collections.abc import Iterator

from batchnorm.doctor.finding import Finding, Severity
from batchnorm.doctor.rule import Needs, Rule, Subject
from batchnorm.doctor.rules.values import plain


def check(subject: Subject) -> Iterator[Finding]:
    """One finding for each call of a layer."""
    from batchnorm.doctor.live_data import follows_its_mode
    from batchnorm.doctor.live_flow import flow_of

    assert subject.model is not None
    for dropped in flow_of(subject).dropped:
        layer = subject.model.get_submodule(dropped.layer)
        if not follows_its_mode(layer):
            continue
        shrinks = max(1 - dropped.p, 0.0) ** 0.5
        yield Finding(
            RULE.code,
            RULE.name,
            Severity.WARNING,
            dropped.layer,
            f"Dropout ({dropped.dropout}, p={dropped.p:g}) stands directly before it: evaluation sees down to "
            f"{max(1 - dropped.p, 0.0):.2g} of the variance of training, and its output has {shrinks:.2g} of the size.",
            measured={"dropout": dropped.dropout, "p": plain(dropped.p), "output_scale": plain(shrinks)},
            threshold={"p": 0.0},
            remedy="Move the dropout behind the layer; or measure the statistics without it: "
            "batchnorm.recalibrate(model, loader).",
            safe=False,
        )


RULE = Rule(
    "BN208",
    "dropout-before",
    Severity.WARNING,
    frozenset({Needs.MODEL}),
    "dropout directly before a layer shifts the variance between training and evaluation",
    check,
    preview=True,
)
