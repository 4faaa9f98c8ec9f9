"""# BN101: initial-statistics

## What it finds
A layer whose running mean is exactly 0 and whose running variance is exactly 1 in all channels, as in a new layer,
while something shows that the model was trained: the layer's counter of batches, its weight and bias, or the
statistics of other layers.

## Why it is bad
With mean 0 and variance 1 evaluation does not normalize: a channel whose inputs have mean m and standard deviation s
comes out s times as large as in training, and shifted by its weight times m. Nothing fails, and the layers behind it
get inputs that they never saw.

## How it arises
- Statistics that were not in a checkpoint (BN100), loaded leniently, and then saved again.
- TensorFlow: the update operations (`tf.GraphKeys.UPDATE_OPS`) were never run; Keras: the layer ran with
  `training=False`.
- PyTorch: training in `eval()` mode, or with `momentum=0`; a moving average of weights (EMA, SWA) that copies
  parameters without buffers; a layer in a branch that training never reaches.

## Evidence
No threshold: the comparison is exact, and a single batch moves the statistics. What shows training decides the
severity.
- The counter is above 0: error, certain. Every batch that is counted moves the statistics, unless momentum is 0.
- Bias, or a weight without bias, differs between channels: error, likely. In a torch file without counters it is a
  warning, since frozen layers whose statistics were absorbed into weight and bias look the same.
- Weight and bias are those of a new layer, but other layers were trained: warning. It was never reached, or reset.
- Nothing shows training: one info for the file. A weight that differs between channels while the bias does not shows
  none: DCGAN draws its initial weights from a normal distribution.

## Remedy
Take another checkpoint, or measure the statistics on training data: `batchnorm.recalibrate(model, loader)`. Not safe
in the sense of leaving outputs as they are: it is meant to change them. An untrained file needs none.

## False positives
A frozen layer that is an affine map by design (detectron2's `FrozenBatchNorm2d` of Caffe2 models, whose statistics were
absorbed into weight and bias) and that was saved with a counter. A layer that is part of the file but of no
evaluation, such as an auxiliary head.

## References
Ioffe and Szegedy 2015, algorithm 2. Threads: deezer/spleeter#151 (a released model), tensorpack/tensorpack#880,
hiwonjoon/tf-frrn#2.
"""

from collections.abc import Iterable, Iterator

import numpy as np

from batchnorm.doctor.checkpoint import Layer
from batchnorm.doctor.finding import Finding, Severity
from batchnorm.doctor.rule import Needs, Rule, Subject
from batchnorm.doctor.rules.values import (
    MEASURING,
    are_initial,
    called,
    counter_of,
    eps_of,
    plain,
    span,
    statistics_of,
    together,
)


def check(subject: Subject) -> Iterator[Finding]:
    """One finding for each layer; of a state dict that shows no training, one for all."""
    for layers in together(subject):
        found = [(layer, statistics) for layer in layers if (statistics := statistics_of(layer))]
        initial = [layer for layer, statistics in found if are_initial(*statistics)]
        spreads = spreads_of(var for _, (mean, var) in found if not are_initial(mean, var))
        trained = {layer.path for layer in layers if is_trained(layer)}
        if initial and not trained and len(initial) == len(found):
            yield untrained(initial)
            continue
        for layer in initial:
            yield finding(layer, layer.path in trained, spreads)


def spreads_of(variances: Iterable[np.ndarray]) -> np.ndarray:
    """Median standard deviation of each layer, of those whose variances can be used."""
    usable = [var for var in variances if np.isfinite(var).all() and (var >= 0).all()]
    return np.array([np.sqrt(np.median(var)) for var in usable])


def is_trained(layer: Layer) -> bool:
    """Whether counter or parameters show it."""
    counter = counter_of(layer)
    if counter is not None and counter > 0:
        return True
    role = "bias" if layer.has("bias") else "weight"
    if not layer.has(role) or not layer.num_features:
        return False
    values = layer.values(role)
    # a constant may be an initial value; of one channel, only 0 and 1 are
    return bool((values != values[0]).any()) if len(values) > 1 else bool(values[0] not in (0, 1))


def untrained(layers: list[Layer]) -> Finding:
    count = f"All {len(layers)} layers have" if len(layers) > 1 else "The only layer has"
    return Finding(
        RULE.code,
        RULE.name,
        Severity.INFO,
        "",
        f"{count} mean 0 and variance 1, and nothing shows training: these are the values of a new model. "
        "Evaluation does not normalize.",
        measured={"layers": len(layers)},
        confidence="likely",
    )


def finding(layer: Layer, trained: bool, spreads: np.ndarray) -> Finding:
    counter = counter_of(layer)
    severity, confidence, why = judge(layer, trained, counter)
    measured = {"num_batches_tracked": None if counter is None else plain(counter), "trained": trained}
    if spreads.size:
        measured["median_std_of_other_layers"] = plain(float(np.median(spreads)))
    return Finding(
        RULE.code,
        RULE.name,
        severity,
        layer.path,
        f"{called(layer, 'running_mean')} is 0 and {called(layer, 'running_var')} 1 in all {layer.num_features} "
        f"channels, {why}. {consequence(spreads, eps_of(layer))}",
        measured=measured,
        threshold={"num_batches_tracked": 0},
        remedy=f"Measure the statistics on training data with {MEASURING[layer.framework]}, or take another "
        "checkpoint.",
        safe=False,
        confidence=confidence,
    )


def judge(layer: Layer, trained: bool, counter: float | None) -> tuple[Severity, str, str]:
    """Severity, confidence, and what shows training."""
    if counter is not None and counter > 0:
        return Severity.ERROR, "certain", f"although {counter:,.0f} batches were counted"
    if trained and layer.framework == "torch" and counter is None:
        why = "although its parameters are trained; only if they absorbed the statistics, as in some frozen layers"
        return Severity.WARNING, "possible", f"{why}, this is right"
    if trained:
        return Severity.ERROR, "likely", "although its parameters are trained"
    return Severity.WARNING, "likely", "although other layers are trained: training never reached it, or it was reset"


def consequence(spreads: np.ndarray, eps: float) -> str:
    if not spreads.size:
        return (
            "Evaluation does not normalize here: a channel whose inputs have standard deviation s comes out s times as "
            "large as in training."
        )
    factors = np.sqrt((spreads**2 + eps) / (1 + eps))
    return (
        f"Evaluation does not normalize here: if its inputs spread like those of the {spreads.size} other layers, "
        f"outputs are {np.median(factors):.3g} times as large as in training ({span(factors)} over these layers)."
    )


RULE = Rule(
    "BN101",
    "initial-statistics",
    Severity.ERROR,
    frozenset({Needs.FILE}),
    "running statistics are those of a new layer, mean 0 and variance 1, in a trained model",
    check,
)
