"""# BN204: no-running-statistics

## What it finds
A layer that has no running statistics (`track_running_stats=False`), so that evaluation normalizes by the batch too.

## Why it is bad
What the model says about a sample depends on the other samples of its batch, and on its size. Evaluated one sample at
a time, each sample is normalized by itself: after (N, C) input the output is beta whatever the input was, or an error;
for images every channel loses its mean and its contrast.

## How it arises
`track_running_stats=False` to get rid of wrong running statistics, or to adapt to data at test time; meta-learning and
some generators do it on purpose.

## Evidence
With a loader: a warning if all of its first batches have one sample. Otherwise info, since how a model is evaluated
cannot be seen from it.

## Remedy
Build the layer with `track_running_stats=True` and measure: `batchnorm.recalibrate(model, loader)`. That changes
outputs.

## False positives
Models that are meant to normalize by the batch in evaluation, in batches that are large and alike.

## References
Nado et al. 2020 (arXiv:2006.10963) for prediction-time batch normalization and what it depends on.
"""

from collections.abc import Iterator

from batchnorm.doctor.finding import Finding, Severity
from batchnorm.doctor.rule import Needs, Rule, Subject


def check(subject: Subject) -> Iterator[Finding]:
    """One finding for each layer."""
    from batchnorm.doctor.live_data import norms, sample_of
    from batchnorm.statistics.layers import has_running_statistics

    assert subject.model is not None
    layers = {name: layer for name, layer in norms(subject.model).items() if not has_running_statistics(layer)}
    if not layers:
        return
    sample = None if subject.loader is None else sample_of(subject)
    alone = sample is not None and sample.samples == len(sample.items)
    size = None if sample is None else sample.samples / len(sample.items)
    for name in layers:
        yield Finding(
            RULE.code,
            RULE.name,
            Severity.WARNING if alone else Severity.INFO,
            name,
            "It has no running statistics, so evaluation normalizes by the batch: "
            + (
                "these batches have one sample, and each is normalized by itself."
                if alone
                else "what it says about a sample depends on the other samples of its batch."
            ),
            measured={"samples_per_batch": size},
            threshold={"samples_per_batch": 1} if alone else {},
            remedy="Build it with track_running_stats=True and measure: batchnorm.recalibrate(model, loader).",
            safe=False,
            confidence="certain" if alone else "possible",
        )


RULE = Rule(
    "BN204",
    "no-running-statistics",
    Severity.WARNING,
    frozenset({Needs.MODEL}),
    "evaluation normalizes by the batch",
    check,
    preview=True,
)
