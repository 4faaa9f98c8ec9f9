"""# BN202: other-momentum

## What it finds
A layer whose `momentum` is 0.5 or more.

## Why it is bad
In PyTorch `momentum` is the weight of the new batch. With 0.9 the running statistics are nearly those of the last
batch: they are as noisy as one batch, and evaluation depends on which batch came last. With 0.99 and 0.999 even more
so.

## How it arises
TensorFlow, Keras and JAX's flax call the weight of the *old* average momentum, with defaults of 0.99 and 0.999. A
value copied from there belongs into PyTorch as 1 - momentum: 0.9 as 0.1, 0.99 as 0.01.

## Evidence
The threshold is 0.5: from there on the new batch counts more than all others together. 0.9 and above is what other
frameworks use, and is called certain for 0.9, 0.95, 0.97, 0.98, 0.99, 0.997, 0.999, 0.9997; otherwise likely.

## Remedy
`momentum = 1 - momentum`, then train on or measure the statistics: `batchnorm.recalibrate(model, loader)`. That
changes outputs.

Real models of transformers 5 have this fault: MobileNetV2 with 0.997 and EfficientNet with 0.99, both as the TensorFlow
originals write them.

## False positives
Momentum 1, to read the statistics of one batch out of the layer, as tools do that measure them. Frozen layers and
layers without running statistics are not looked at.

## References
`torch.nn.BatchNorm1d`: its note on momentum. Keras `BatchNormalization`: `moving_mean * momentum + mean * (1 -
momentum)`.
"""

from collections.abc import Iterator

from batchnorm.doctor.finding import Finding, Severity
from batchnorm.doctor.rule import Needs, Rule, Subject
from batchnorm.doctor.rules.values import plain

LIMIT = 0.5
# defaults and usual choices of frameworks that weigh the old average
OTHER_CONVENTION = (0.9, 0.95, 0.97, 0.98, 0.99, 0.995, 0.997, 0.999, 0.9997, 0.9999)


def check(subject: Subject) -> Iterator[Finding]:
    """One finding for each layer."""
    from batchnorm.doctor.live_data import follows_its_mode, norms

    assert subject.model is not None
    for name, layer in norms(subject.model).items():
        momentum = layer.momentum
        if momentum is None or not momentum >= LIMIT or not follows_its_mode(layer):
            continue
        pasted = any(abs(momentum - other) < 1e-9 for other in OTHER_CONVENTION)
        meant = f": {1 - momentum:.3g} was meant" if pasted else ""
        yield Finding(
            RULE.code,
            RULE.name,
            Severity.WARNING,
            name,
            f"momentum is {momentum:g}, and in PyTorch that is the weight of the new batch{meant}. The last batch is "
            f"{min(momentum, 1):.3g} of the running statistics, which are as noisy as {effective_batches(momentum)}.",
            measured={"momentum": plain(momentum)},
            threshold={"momentum": LIMIT},
            remedy=f"Set momentum={1 - momentum:.3g} and measure the statistics: batchnorm.recalibrate(model, loader).",
            safe=False,
            confidence="certain" if pasted else "likely",
        )


def effective_batches(momentum: float) -> str:
    """How many batches an average of them would need for the same variance, m / (2 - m)."""
    if momentum >= 1:
        return "one batch"
    return f"an average of {(2 - momentum) / momentum:.3g} batches"


RULE = Rule(
    "BN202",
    "other-momentum",
    Severity.WARNING,
    frozenset({Needs.MODEL}),
    "momentum in the sense of other frameworks: the running statistics follow the last batch",
    check,
    preview=True,
)
