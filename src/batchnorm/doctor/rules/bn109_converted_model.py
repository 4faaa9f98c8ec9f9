"""# BN109: converted-model

## What it finds
Signs that a layer came from TensorFlow or Keras, or went there, and that something was carried over as it was. A file
shows little of that; this rule says only what can be seen.
1. A momentum of 0.5 or more, where momentum is the weight of the new batch. Keras and TensorFlow use the weight of the
   old average, 0.99 or 0.999 by default, under the same name. (Whole models and configurations; in live models BN202
   finds it.)
2. In torch: eps of 1e-3, the default of Keras and TensorFlow, in a layer whose counter is 0 or absent though its
   statistics have moved, so that they were put there and not measured. (Where eps is known.)
3. In a torch or safetensors file: tensors that are called moving_mean and moving_variance, which no layer of torch
   loads.

## Why it is bad
1. With 0.99 as the weight of the new batch, the running statistics are those of the last batch, give or take 1%.
2. It is right as it is. But the eps is not in the state dict: a model that is built with torch's default of 1e-5
   multiplies channels of small variance by up to sqrt((var + 1e-3) / (var + 1e-5)) too much; the message has the
   number.
3. `load_state_dict(..., strict=False)` passes over them and leaves mean 0 and variance 1.

## How it arises
Converters that copy numbers and names; models that are rewritten by hand in the other framework.

## Evidence
torch's default momentum is 0.1, and Keras' 0.99 is 0.01 in torch's sense. A weight of 0.5 or more averages over three
batches or less, which serves nobody. Preview: the rule has not been tried on many converted models.

## Remedy
1. Use 1 - momentum, and measure the statistics again (not safe: it changes outputs).
2. Keep eps = 1e-3 when the model is built. A layer with eps 1e-5 computes the same in evaluation if 1e-3 - 1e-5 is
   added to its running variance.
3. Rename: gamma is weight, beta is bias, moving_mean is running_mean, moving_variance is running_var.

## False positives
A momentum of 1 to take the statistics of a single large batch, on purpose. Architectures whose torch version has eps
1e-3 by definition (MobileNet, EfficientNet, Inception), with statistics from a recalibration that did not count its
batches.

What no file shows: variances that are biased (TensorFlow divides by n, torch by n - 1: a factor of (n - 1) / n that
nothing tells from other variances), and an eps that was forgotten.

## References
pytorch/pytorch#15298 (momentum), huggingface/transformers pull 18597 and 19454 (eps and momentum of converted models),
the documentation of `keras.layers.BatchNormalization`.
"""

import re
from collections.abc import Iterator

import numpy as np

from batchnorm.doctor.checkpoint import Layer
from batchnorm.doctor.finding import Finding, Severity
from batchnorm.doctor.rule import Needs, Rule, Subject
from batchnorm.doctor.rules.values import MEASURING, are_initial, counter_of, plain, statistics_of

OURS = ("torch", "safetensors", "state dict")
MOMENTUM, NEAR_CERTAIN = 0.5, 0.9
THEIR_EPS, OUR_EPS = 1e-3, 1e-5
THEIR_NAMES = re.compile(r"(^|[./])moving_(mean|variance)(:0)?$")


def check(subject: Subject) -> Iterator[Finding]:
    """One finding for each layer, and one for names."""
    for layer in subject.layers:
        if subject.model is None and layer.momentum is not None and layer.momentum >= MOMENTUM:
            yield other_sense(layer, layer.momentum)
        if layer.framework == "torch" and layer.eps is not None and abs(layer.eps / THEIR_EPS - 1) < 1e-3:
            yield from put_there(layer)
    checkpoint = subject.checkpoint
    if checkpoint is not None and checkpoint.format in OURS:
        names = [name for name in checkpoint.tensors if THEIR_NAMES.search(name)]
        if names:
            yield foreign_names(names)


def other_sense(layer: Layer, momentum: float) -> Finding:
    said = f"momentum {1 - momentum:.3g}" if layer.framework == "torch" else f"momentum {momentum:.3g}"
    return Finding(
        RULE.code,
        RULE.name,
        Severity.WARNING,
        layer.path,
        f"The last batch alone makes up {100 * momentum:.4g}% of the running statistics: the momentum is meant in the "
        "other framework's sense, as the weight of the old average.",
        measured={"momentum": plain(momentum)},
        threshold={"momentum": MOMENTUM},
        remedy=f"Set {said}, and measure the statistics on training data with {MEASURING[layer.framework]}.",
        safe=False,
        confidence="likely" if NEAR_CERTAIN <= momentum < 1 else "possible",
    )


def put_there(layer: Layer) -> Iterator[Finding]:
    """With the eps of TensorFlow, and statistics that no batch was counted for."""
    found = statistics_of(layer)
    if found is None or counter_of(layer) not in (None, 0.0) or are_initial(*found):
        return
    var = found[1][np.isfinite(found[1]) & (found[1] >= 0)]
    if not var.size:
        return
    factor = float(np.sqrt((var.min() + THEIR_EPS) / (var.min() + OUR_EPS)))
    yield Finding(
        RULE.code,
        RULE.name,
        Severity.INFO,
        layer.path,
        f"eps is {THEIR_EPS:g}, as in TensorFlow and Keras, and no batch was counted: the statistics come from "
        f"elsewhere. Built with torch's eps of {OUR_EPS:g}, channels would come out up to {factor:.4g} times as large.",
        measured={"eps": plain(layer.eps or 0.0), "least_variance": plain(float(var.min())), "factor": plain(factor)},
        threshold={"eps": THEIR_EPS},
        remedy=f"Keep eps={THEIR_EPS:g} when the model is built; momentum 0.99 of Keras is 0.01 in torch.",
        confidence="likely",
    )


def foreign_names(names: list[str]) -> Finding:
    return Finding(
        RULE.code,
        RULE.name,
        Severity.INFO,
        "",
        f"{len(names)} tensors have TensorFlow's names, moving_mean and moving_variance, which torch's layers do not "
        "load: with strict=False they evaluate with mean 0 and variance 1.",
        measured={"tensors": len(names)},
        remedy="For torch, rename moving_mean and moving_variance to running_mean and running_var, gamma and beta to "
        "weight and bias.",
        confidence="likely",
    )


RULE = Rule(
    "BN109",
    "converted-model",
    Severity.WARNING,
    frozenset({Needs.FILE}),
    "eps, the sense of momentum or names were carried over from TensorFlow or Keras",
    check,
    preview=True,
)
