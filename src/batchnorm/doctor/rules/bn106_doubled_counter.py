"""# BN106: doubled-counter

## What it finds
Layers whose `num_batches_tracked` is twice that of other layers of the same state dict, to within 1%.

## Why it is bad
These layers updated their running statistics twice per training step. If it was the same batch twice, the average
forgets faster: with momentum 0.1 it acts as with 0.19, so that it follows about the last 9.5 batches instead of 19, and
evaluation is noisier. If it was two different inputs, the running statistics are a mix of two distributions, while
training normalized each by its own: evaluation is off wherever the two differ.

## How it arises
- Activation checkpointing (`torch.utils.checkpoint`, either variant) runs the forward pass of a block again during
  backward, and its layers count and update once more.
- A layer that is used in two places, or a network that is called twice per step: siamese networks, a discriminator
  that sees real and generated images one after the other.

## Evidence
Counters are whole numbers of training steps, so a factor of 2 within 1% between layers with at least 10 batches is no
chance; the 1% is room for steps that some layers skipped. A network that is checkpointed as a whole has no layers to
compare with, and the file does not show it. Factors of 3 and more are listed by BN105.

## Remedy
For checkpointing: `batchnorm.deferred_stats(model)` around forward and backward counts a recomputation once. For two
inputs: one call with both, or a layer for each (`batchnorm.nn.DomainBatchNorm2d`). Statistics that are off already can
be measured again with `batchnorm.recalibrate`. Nothing is changed in the file.

## False positives
Other layers that saw half of the batches: frozen for half of the training, or added in the middle of it. Hence
confidence "possible".

## References
pytorch/pytorch#96136, pytorch/pytorch#62471 (checkpointing), facebookresearch/fairscale#1035.
"""

import math
from bisect import bisect
from collections.abc import Iterator, Sequence

from batchnorm.doctor.checkpoint import Layer
from batchnorm.doctor.finding import Finding, Severity
from batchnorm.doctor.rule import Needs, Rule, Subject
from batchnorm.doctor.rules.values import counts_of, plain, together

RATIO, TOLERANCE = 2.0, 0.01
# below it, small numbers are in the ratio of 2 by chance
LEAST = 10


def check(subject: Subject) -> Iterator[Finding]:
    """One finding for each layer."""
    for layers in together(subject):
        found = doubled(layers)
        for layer in layers:
            if layer.path in found:
                yield finding(layer, *found[layer.path])


def doubled(layers: Sequence[Layer]) -> dict[str, tuple[float, float]]:
    """Path -> the counter, and that of the layers of which it is twice."""
    counts = counts_of(layers)
    singles = sorted({count for count in counts.values() if LEAST <= count < math.inf})
    found = {}
    for path, count in counts.items():
        place = bisect(singles, count / RATIO)
        near = [single for single in singles[max(0, place - 1) : place + 1] if is_double(count, single)]
        if near:
            found[path] = (count, min(near, key=lambda single: abs(count / RATIO - single)))
    return found


def is_double(count: float, single: float) -> bool:
    return abs(count / RATIO - single) <= TOLERANCE * single


def finding(layer: Layer, count: float, single: float) -> Finding:
    momentum = layer.momentum if layer.momentum is not None and 0 < layer.momentum < 1 else None
    example = momentum or 0.1
    return Finding(
        RULE.code,
        RULE.name,
        Severity.WARNING,
        layer.path,
        f"{count:,.0f} batches were counted, in other layers {single:,.0f}: the statistics were updated twice per "
        "step, by activation checkpointing or by two calls. Updated twice with the same batch, momentum "
        f"{example:g}{'' if momentum else ' (the default)'} acts as {1 - (1 - example) ** 2:.3g}; with two different "
        "inputs, evaluation mixes their statistics.",
        measured={"num_batches_tracked": plain(count), "of_other_layers": plain(single)},
        threshold={"ratio": RATIO, "tolerance": TOLERANCE},
        remedy="Train inside batchnorm.deferred_stats(model), which counts a recomputation once.",
        confidence="possible",
    )


RULE = Rule(
    "BN106",
    "doubled-counter",
    Severity.WARNING,
    frozenset({Needs.FILE}),
    "num_batches_tracked is twice that of other layers: updated twice per step",
    check,
)
