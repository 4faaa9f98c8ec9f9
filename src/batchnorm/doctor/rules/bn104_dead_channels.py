"""# BN104: dead-channels

## What it finds
Channels whose weight (gamma) is 0 or below 1e-5 in size: their output is the bias, whatever the input.

## Why it is bad
It is not wrong. The channel and the filter before it cost time and memory for a constant. Where many channels are
dead, much of the network's width is unused. Folding and quantization that divide by weight fail on 0.

## How it arises
- Weight decay on gamma, or a penalty that makes channels prunable (network slimming), drives weights to 0.
- A whole layer of exactly 0 is usually the last one of a residual block, initialized so on purpose: the block starts
  as the identity. After training it should not be 0 any more.

## Evidence
Weights of trained channels are of the order of 1. In the networks that BN103's page describes, the smallest weight of
the 14 runs with an accuracy above 0.3 was 0.03. A normalized input has standard deviation 1, so a weight of 1e-5 lets
through 1e-5, less than what float16 and bfloat16 resolve beside a bias of 0.1.

## Remedy
None needed. Channels can be pruned, with their bias moved into the next layer.

## False positives
Zero initialization in a model that is not trained yet: the message says so. Weights that start near 0: EfficientNet of
transformers draws them from a normal distribution of standard deviation 0.02, and 1 or 2 of 6448 channels were below
the limit by chance.

## References
Goyal et al. 2017 (arXiv:1706.02677), section 5.1, on gamma = 0 in residual blocks; Liu et al. 2017
(arXiv:1708.06519) on pruning by gamma; pytorch/pytorch pull 77434 (division by gamma = 0).
"""

from collections.abc import Iterator

import numpy as np

from batchnorm.doctor.checkpoint import Layer
from batchnorm.doctor.finding import Finding, Severity
from batchnorm.doctor.rule import Needs, Rule, Subject
from batchnorm.doctor.rules.values import (
    are_initial,
    beta_of,
    called,
    channels,
    counter_of,
    first_channels,
    gamma_of,
    plain,
    span,
    statistics_of,
)

LIMIT = 1e-5


def check(subject: Subject) -> Iterator[Finding]:
    """One finding for each layer."""
    for layer in subject.layers:
        if not layer.has("weight") or not layer.num_features:
            continue
        gamma = np.abs(gamma_of(layer))
        dead = gamma <= LIMIT
        if dead.any():
            yield Finding(
                RULE.code,
                RULE.name,
                Severity.INFO,
                layer.path,
                whole(layer) if not gamma.any() else some(layer, dead),
                measured={
                    "dead": int(dead.sum()),
                    "num_features": layer.num_features,
                    "largest_dead": plain(float(gamma[dead].max())),
                    "channels": first_channels(dead),
                },
                threshold={"largest_dead": LIMIT},
            )


def whole(layer: Layer) -> str:
    """For a layer of zeros."""
    found, count = statistics_of(layer), counter_of(layer)
    name, state = called(layer, "weight"), ""
    if count is not None and 0 < count < np.inf:
        state = f" After {count:,.0f} batches it is still 0: it was not trained, or hardly needed."
    elif found is not None and not are_initial(*found):
        state = " Its statistics have moved, but it is still 0: it was not trained, or hardly needed."
    return (
        f"{name} is exactly 0 in {channels(np.ones(layer.num_features, bool))}: initialized so, as the last layer of a "
        f"residual block often is, which then starts as the identity. The output is the bias ({span(beta_of(layer))})."
        f"{state}"
    )


def some(layer: Layer, dead: np.ndarray) -> str:
    return (
        f"{called(layer, 'weight')} is at most {LIMIT:g} in {channels(dead)}, {100 * dead.mean():.3g}%: whatever the "
        f"input, their output is the bias ({span(beta_of(layer)[dead])})."
    )


RULE = Rule(
    "BN104",
    "dead-channels",
    Severity.INFO,
    frozenset({Needs.FILE}),
    "weight is about 0, so that channels are constant",
    check,
)
