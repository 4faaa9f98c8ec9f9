"""# BN302: half-frozen

## What it finds
A layer in training mode whose weight and bias require no gradient, while its running statistics go on moving.

## Why it is bad
`requires_grad_(False)` freezes parameters, and running statistics are buffers: each forward in training mode moves
them towards the new data, and normalizes by the batch. After fine-tuning, the part that was to stay as it was
evaluates differently, and weights that were loaded no longer fit their statistics.

## How it arises
Fine-tuning with `for p in backbone.parameters(): p.requires_grad = False`, the usual recipe, followed by
`model.train()`.

## Evidence
No threshold: training mode, running statistics that are tracked with a momentum other than 0, parameters that all have
`requires_grad=False`, and not frozen by `batchnorm.freeze`. Layers without weight and bias are not looked at, since
nothing says what is wanted.

## Remedy
`batchnorm.freeze(model, pattern)`: the layer stays in evaluation mode whatever `model.train()` says. That is safe:
evaluation stays what it is now.

## False positives
Adapting the statistics to new data with weights as they are (AdaBN) is meant to move them. A model that is about to be
put into evaluation mode.

## References
pytorch/pytorch#66073; Keras freezes both with `layer.trainable = False`, see its guide on transfer learning.
"""

from collections.abc import Iterator

from batchnorm.doctor.finding import Finding, Severity
from batchnorm.doctor.rule import Needs, Rule, Subject


def check(subject: Subject) -> Iterator[Finding]:
    """One finding for each layer."""
    from batchnorm.doctor.live_data import follows_its_mode, norms

    assert subject.model is not None
    for name, layer in norms(subject.model).items():
        parameters = list(layer.parameters())
        moves = layer.training and layer.track_running_stats and layer.momentum != 0 and follows_its_mode(layer)
        if moves and parameters and not any(parameter.requires_grad for parameter in parameters):
            yield Finding(
                RULE.code,
                RULE.name,
                Severity.WARNING,
                name,
                "Its weight and bias are frozen (requires_grad=False), but it is in training mode: each forward moves "
                "its running statistics, and it normalizes by the batch.",
                measured={"training": True, "requires_grad": False},
                threshold={"training": False},
                remedy="batchnorm.freeze(model, pattern): it stays in evaluation mode, whatever model.train() says.",
                safe=True,
                confidence="likely",
            )


RULE = Rule(
    "BN302",
    "half-frozen",
    Severity.WARNING,
    frozenset({Needs.MODEL}),
    "weight and bias are frozen, the running statistics are not",
    check,
    preview=True,
)
