"""# BN501: foldable

## What it finds
How many batch normalization layers can be folded into the linear or convolution layers next to them.

## Why it is bad
It is not. In evaluation a layer is a scale and a shift per channel, which the weights and bias next to it can take up:
the model computes the same with one pass over memory less per layer.

## How it arises
Every network that was trained with batch normalization.

## Evidence
What `batchnorm.fold` proves by the data flow: nobody else sees the value between the two, the axes agree, statistics
are finite and were updated. Linear layers before `torch.nn.BatchNorm1d` need a loader, whose input tells the axis.

## Remedy
`folded, changes = batchnorm.fold(model.eval(), example)` for deployment. It is safe: each fold comes with its measured
error. A folded model cannot be trained as the model could.

## False positives
None: it is a count.

## References
Jacob et al. 2018 (arXiv:1712.05877), section 3.2.
"""

from collections.abc import Iterator

from batchnorm.doctor.finding import Finding, Severity
from batchnorm.doctor.rule import Needs, Rule, Subject


def check(subject: Subject) -> Iterator[Finding]:
    """One finding for the model."""
    from batchnorm.doctor.live_data import norms
    from batchnorm.doctor.live_flow import flow_of

    assert subject.model is not None
    folded = [one.layer for one in flow_of(subject).folded]
    total = len(norms(subject.model))
    if folded:
        yield Finding(
            RULE.code,
            RULE.name,
            Severity.INFO,
            "",
            f"{len(folded)} of {total} batch normalization layers can be folded into the layer next to them for "
            "deployment: the same outputs without their passes over memory.",
            measured={"foldable": len(folded), "layers": folded},
            threshold={"foldable": 0},
            remedy="batchnorm.fold(model.eval(), example).",
            safe=True,
        )


RULE = Rule(
    "BN501",
    "foldable",
    Severity.INFO,
    frozenset({Needs.MODEL}),
    "layers that can be folded for deployment",
    check,
    preview=True,
)
