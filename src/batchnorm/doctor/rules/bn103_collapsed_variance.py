"""# BN103: collapsed-variance

## What it finds
Channels that evaluation multiplies by more than 100: |weight| / sqrt(running_var + eps), because the running variance
is next to nothing, or the weight is huge.

## Why it is bad
A running variance near 0 says that the channel was constant over the training data. As long as it is, the output is
the bias. A difference that training never saw (another resolution, quantization, another device) comes out more than
100 times as large. Where the variance is below eps, eps and not the data decides the scale, so a conversion that
changes eps changes the output. In float16 and in integers such scales cost digits or overflow when the layer is folded
into a convolution.

## How it arises
Units that died (a convolution whose weights decayed to 0, a ReLU that no input reaches), parts of the input that are
constant, such as one-hot features, weights that are very small everywhere, training that diverged.

## Evidence
The limit of 100 comes from ten networks of three libraries: ResNet (two kinds), RegNet, MobileNet V1 and V2 and
EfficientNet of transformers, EfficientNet-B0 of efficientnet_pytorch, DenseNet-121, U-Net and ResNet-18 of MONAI. They
had random weights, as published ones could not be fetched where this was measured, and were trained on MNIST for 150
steps, by SGD and by AdamW (`tests/doctor/thresholds.py`). In the 14 runs with an accuracy above 0.3 the largest factor
was 22.4 with eps 1e-5 and 31.8 with eps 1e-3; MobileNet V1, which diverged under SGD, had 49,000. A variance of 0 with
weight 1 and eps 1e-5 gives 316; with eps 1e-3 it gives 31.6 and is not reported. Where eps is unknown, as in a state
dict, the default of the framework is assumed, and the confidence is "likely".

## Remedy
None to apply. See whether the channel is needed: if its input is constant it can be removed, with its bias moved into
the next layer. Measure the statistics again if the data changed.

## False positives
Channels that are dead by design or harmless: information, never a failure. State dicts of MobileNet and EfficientNet,
whose eps is 1e-3 while 1e-5 is assumed: of the networks above, both MobileNets in small are reported.

## References
Cadene/pretrained-models.pytorch#99 (a real case).
"""

from collections.abc import Iterator

import numpy as np

from batchnorm.doctor.finding import Finding, Severity
from batchnorm.doctor.rule import Needs, Rule, Subject
from batchnorm.doctor.rules.values import (
    called,
    channels,
    eps_in_words,
    eps_of,
    first_channels,
    gamma_of,
    plain,
    span,
    statistics_of,
)

LIMIT = 100.0


def check(subject: Subject) -> Iterator[Finding]:
    """One finding for each layer."""
    for layer in subject.layers:
        found = statistics_of(layer)
        if found is None:
            continue
        var = found[1]
        with np.errstate(all="ignore"):
            factors = np.abs(gamma_of(layer)) / np.sqrt(var + eps_of(layer))
        # what is not finite or negative is BN102's
        high = np.isfinite(factors) & (var >= 0) & (factors > LIMIT)
        if high.any():
            worst = float(factors[high].max())
            below = int((var[high] < eps_of(layer)).sum())
            yield Finding(
                RULE.code,
                RULE.name,
                Severity.INFO,
                layer.path,
                f"Evaluation multiplies {channels(high)} by {span(factors[high])} "
                f"({called(layer, 'running_var')} {span(var[high])}, {eps_in_words(layer)}): "
                f"a change of 0.01 in the input of the worst becomes {0.01 * worst:.3g} in its output.",
                measured={
                    "largest_factor": plain(worst),
                    "least_variance": plain(float(var[high].min())),
                    "channels_below_eps": below,
                    "channels": first_channels(high),
                },
                threshold={"largest_factor": LIMIT},
                remedy="See whether these channels are needed: their input hardly varied in training.",
                confidence="certain" if eps_of(layer) == layer.eps else "likely",
            )


RULE = Rule(
    "BN103",
    "collapsed-variance",
    Severity.INFO,
    frozenset({Needs.FILE}),
    "evaluation multiplies a channel by more than 100, since its running variance is next to nothing",
    check,
)
