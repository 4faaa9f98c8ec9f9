"""# BN108: stale-statistics

## What it finds
A layer whose running mean or running variance is far from the mean and variance that its input has on the data given.

## Why it is bad
Evaluation subtracts the running mean and divides by the running standard deviation. Where these are not those of the
input, the output is shifted and scaled channel by channel, and everything behind the layer works on values it was
never trained on. Training does not show it, since it normalizes by the batch.

## How it arises
- The weights changed after the statistics were averaged: a learning rate that was raised, a momentum so small that the
  average lags, averaged or pruned or quantized weights, weights that were loaded without their statistics.
- Training ended after fewer batches than the average needs to forget mean 0 and variance 1.
- The data are not those of training: other preparation, another range, another domain.

## Evidence
The first items of the loader, at least 512 samples if there are so many, are measured as `batchnorm.recalibrate`
measures: this layer and all others normalize by their batches, everything else evaluates. So a layer is not blamed for
what layers before it do. A channel is off if its running mean is more than 0.5 standard deviations, and four standard
errors, from the measured one, or its running variance (plus eps) more than 2 times too large or too small, and more
than `1 + 8 sqrt(2 / samples)` times. A layer is reported if that holds for a tenth of its channels. These limits are
set where sampling does not reach: if each of 32 images counts as one value, means of batches scatter by 1 / sqrt(32) =
0.18 standard deviations, and their average with momentum 0.1 by 0.18 sqrt(0.1 / 1.9) = 0.04.

Fewer than 32 samples tell too little about a variance, and nothing is reported.

## Remedy
`batchnorm.recalibrate(model, loader)` with training data. It is not safe in the sense of leaving outputs as they are:
it is meant to change them. Statistics of other data than those of training are a choice; see BN207 for what they
change.

## False positives
Data that differ from training on purpose: strong augmentation in training and none here, or a loader of noise. Layers
that `batchnorm.freeze` froze, and layers told what to normalize by, are not looked at.

## References
Ioffe and Szegedy 2015, algorithm 2; Wu and Johnson 2021 (arXiv:2105.07576), section 3, for precise statistics.
"""

from collections.abc import Iterator
from typing import Any

from batchnorm.doctor.finding import Finding, Severity
from batchnorm.doctor.rule import Needs, Rule, Subject
from batchnorm.doctor.rules.values import plain

MEAN_OFF = 0.5
STANDARD_ERRORS = 4.0
VAR_FACTOR = 2.0
FEWEST_SAMPLES = 32
SHARE = 0.1


def check(subject: Subject) -> Iterator[Finding]:
    """One finding for each layer."""
    from batchnorm.doctor.live_data import follows_its_mode, moments_of, norms, sample_of

    assert subject.model is not None
    layers = norms(subject.model)
    samples = sample_of(subject).samples
    for name, measured in moments_of(subject).items():
        if follows_its_mode(layers[name]) and samples >= FEWEST_SAMPLES:
            yield from compare(name, layers[name], measured, samples)


def compare(name: str, layer: Any, moments: Any, samples: int) -> Iterator[Finding]:
    """Channels with inf or NaN are left to BN102."""
    from batchnorm.statistics.layers import spread_of
    from batchnorm.statistics.moments import diagonal

    mean, spread = moments.pooled()
    running = spread_of(layer)
    assert running is not None
    wide = diagonal(spread) + layer.eps
    stored_mean, stored = layer.running_mean.to(mean), diagonal(running.to(mean)) + layer.eps
    shift = (stored_mean - mean).abs() / wide.sqrt()
    factor = (stored / wide).clamp(min=0).nan_to_num(0.0)
    factor = factor.maximum(1 / factor)
    fine = stored_mean.isfinite() & stored.isfinite() & (stored > 0) & mean.isfinite() & wide.isfinite()
    mean_limit = (STANDARD_ERRORS * standard_errors(moments, samples)).clamp(min=MEAN_OFF)
    var_limit = max(VAR_FACTOR, 1 + 8 * (2 / max(samples, 1)) ** 0.5)
    off = ((shift > mean_limit) | (factor > var_limit)) & fine
    count, total = int(off.sum()), len(off)
    if not count or count < SHARE * total:
        return
    error = (((wide / stored).sqrt() - 1).square() + (mean - stored_mean).square() / stored)[fine].mean().sqrt().item()
    largest_shift, largest_factor = shift[fine].max().item(), factor[fine].max().item()
    yield Finding(
        RULE.code,
        RULE.name,
        Severity.WARNING,
        name,
        f"In {count} of {total} channels the running statistics are not those of these {samples} samples: the mean is "
        f"up to {largest_shift:.2g} standard deviations off, the variance by up to a factor of {largest_factor:.2g}. "
        f"The normalized output of evaluation is about {error:.2g} standard deviations off.",
        measured={
            "channels": count,
            "num_features": total,
            "samples": samples,
            "mean_off": plain(largest_shift),
            "var_factor": plain(largest_factor),
            "output_off": plain(error),
        },
        threshold={"channels": SHARE * total, "mean_off": MEAN_OFF, "var_factor": plain(var_limit)},
        remedy="Measure them on training data: batchnorm.recalibrate(model, loader). If these are training data, the "
        "weights moved since; if not, compare how the two are prepared.",
        safe=False,
        confidence="likely",
    )


def standard_errors(moments: Any, samples: int) -> Any:
    """Of the mean of each channel, in its standard deviations: what is drawn are batches, and in them samples."""
    from batchnorm.statistics.moments import diagonal

    share = (moments.between / diagonal(moments.squares)).nan_to_num(0.0, 0.0)
    of_batches = (share * (moments.count - 1) / moments.count / max(moments.batches - 1, 1)).sqrt()
    # two batches may agree by chance, and one has nothing to differ from
    return of_batches.clamp(min=max(samples, 1) ** -0.5)


RULE = Rule(
    "BN108",
    "stale-statistics",
    Severity.WARNING,
    frozenset({Needs.MODEL, Needs.DATA}),
    "running statistics are far from those of the data",
    check,
    preview=True,
)
