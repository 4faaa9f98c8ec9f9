"""# BN301: mixed-modes

## What it finds
Batch normalization layers of one model of which some are in training mode and some in evaluation mode.

## Why it is bad
In a model that evaluates or is exported, a layer in training mode normalizes by the batch and moves its running
statistics: outputs depend on the batch, and every evaluation changes the model. In a model that trains, layers that
were put into evaluation mode by `layer.eval()` are a way of freezing them that the next `model.train()` ends.

## How it arises
`model.train()` on a part after `model.eval()` on the whole; layers that were added or replaced after `eval()`; a
`train()` that was overridden; freezing by `eval()`.

## Evidence
No threshold. Layers frozen by `batchnorm.freeze`, layers told what to normalize by, and layers without running
statistics do not count. A warning for each layer in training mode inside a model in evaluation mode; info for each
layer in evaluation mode if others of the model train.

## Remedy
`model.eval()` before evaluation or export, which changes outputs; for layers that are to stay as they are in training,
`batchnorm.freeze(model, pattern)`, which does not.

## False positives
Adaptation at test time that keeps some layers in training mode on purpose: `batchnorm.normalize_by(model, "batch")`
says so. Freezing by `eval()` in a `train()` of one's own.

## References
pytorch/pytorch#66073, #86590 (frozen layers that come back to life).
"""

from collections.abc import Iterator

from batchnorm.doctor.finding import Finding, Severity
from batchnorm.doctor.rule import Needs, Rule, Subject


def check(subject: Subject) -> Iterator[Finding]:
    """One finding for each layer in the other mode than the model."""
    from batchnorm.doctor.live_data import follows_its_mode, norms

    model = subject.model
    assert model is not None
    layers = {name: layer for name, layer in norms(model).items() if layer is not model and follows_its_mode(layer)}
    awake = [name for name, layer in layers.items() if layer.training]
    odd = [name for name in layers if layers[name].training != model.training]
    if not odd or (model.training and not awake):
        return
    for name in odd:
        yield asleep(name, len(awake)) if model.training else awake_in_evaluation(name, len(awake), len(layers))


def awake_in_evaluation(name: str, awake: int, total: int) -> Finding:
    return Finding(
        RULE.code,
        RULE.name,
        Severity.WARNING,
        name,
        f"It is in training mode in a model in evaluation mode ({awake} of {total} layers are): it normalizes by the "
        "batch, and every forward moves its running statistics.",
        measured={"training": True, "layers_in_training": awake},
        threshold={"training": False},
        remedy="model.eval() before evaluation or export.",
        safe=False,
    )


def asleep(name: str, awake: int) -> Finding:
    return Finding(
        RULE.code,
        RULE.name,
        Severity.INFO,
        name,
        f"It is in evaluation mode in a model that trains ({awake} other layers do); the next model.train() ends that.",
        measured={"training": False, "layers_in_training": awake},
        threshold={"training": True},
        remedy="If it is meant to be frozen: batchnorm.freeze(model, pattern), which model.train() does not undo.",
        safe=True,
        confidence="possible",
    )


RULE = Rule(
    "BN301",
    "mixed-modes",
    Severity.WARNING,
    frozenset({Needs.MODEL}),
    "some layers are in training mode and others in evaluation mode",
    check,
    preview=True,
)
