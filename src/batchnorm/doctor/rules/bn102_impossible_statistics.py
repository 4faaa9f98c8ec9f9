"""# BN102: impossible-statistics

## What it finds
A running mean or variance that is NaN or infinite, or a running variance below 0.

## Why it is bad
Evaluation computes weight / sqrt(variance + eps) and bias - mean x that. The channel becomes NaN, infinite, or a
constant; the message says which channels become what. One NaN channel makes everything behind the next convolution or
linear layer NaN.

## How it arises
- One batch with an infinite value, as after an overflow in half precision: the averages never forget it, since
  (1 - momentum) x inf is inf. A loss scaler that skips the step does not undo the forward pass.
- A batch with one value per channel, through `torch.batch_norm` directly: the unbiased variance is 0 / 0.
- Variance as E[x^2] - E[x]^2 in float32, of inputs far from 0; averages of models that were extrapolated; an eps that
  was subtracted on conversion.

## Evidence
No threshold. A variance below 0 from which eps still makes something positive is a warning: some converters subtract
a difference of eps on purpose. Everything else is an error. What becomes of a channel is computed from the file, with
the layer's eps where it is known, and otherwise the default of its framework; a test compares it with
`torch.nn.functional.batch_norm`.

## Remedy
Measure these layers on training data: `batchnorm.recalibrate(model, loader, layers=...)`. That changes outputs and is
not safe in that sense. Then look for where the first infinite value came from.

## False positives
None known.

## References
pytorch/pytorch#90342 (statistics after a skipped step), pytorch/pytorch#106605 (negative variance),
tensorflow/tensorflow#34062 (one value per channel), facebookresearch/detectron2 pull 3160 (eps subtracted).
"""

from collections.abc import Iterator

import numpy as np

from batchnorm.doctor.checkpoint import STATISTICS, Layer
from batchnorm.doctor.finding import Finding, Severity
from batchnorm.doctor.rule import Needs, Rule, Subject
from batchnorm.doctor.rules.values import (
    MEASURING,
    beta_of,
    called,
    channels,
    eps_in_words,
    eps_of,
    first_channels,
    gamma_of,
    listed,
    plain,
)


def check(subject: Subject) -> Iterator[Finding]:
    """One finding for each layer."""
    for layer in subject.layers:
        if layer.num_features and (faults := faults_of(layer)):
            yield finding(layer, faults)


def faults_of(layer: Layer) -> dict[str, np.ndarray]:
    """Masks of channels by what is wrong with them, such as "running_mean is NaN"."""
    masks = {}
    for role in STATISTICS:
        if not layer.has(role):
            continue
        values = layer.values(role)
        masks[f"{called(layer, role)} is NaN"] = np.isnan(values)
        masks[f"{called(layer, role)} is infinite"] = np.isinf(values)
        if role == "running_var":
            masks[f"{called(layer, role)} is negative"] = (values < 0) & np.isfinite(values)
    return {problem: mask for problem, mask in masks.items() if mask.any()}


def finding(layer: Layer, faults: dict[str, np.ndarray]) -> Finding:
    bad = np.logical_or.reduce(list(faults.values()))
    outcomes = outcomes_of(layer)
    worst = np.logical_or.reduce([mask for outcome, mask in outcomes.items() if outcome != "large"])
    measured: dict[str, float | None] = {
        problem.replace(" is ", "_"): int(mask.sum()) for problem, mask in faults.items()
    }
    if layer.has("running_var"):
        measured["least_variance"] = plain(float(np.nanmin(np.append(layer.values("running_var"), np.inf))))
    return Finding(
        RULE.code,
        RULE.name,
        Severity.ERROR if worst.any() or not layer.has(*STATISTICS) else Severity.WARNING,
        layer.path,
        f"{listed(f'{problem} in {channels(mask)}' for problem, mask in faults.items())}. {said(outcomes, layer)}",
        measured={**measured, "channels": first_channels(bad)},
        threshold={"least_variance": 0},
        remedy=f"Measure the statistics of these layers on training data with {MEASURING[layer.framework]}.",
        safe=False,
    )


def outcomes_of(layer: Layer) -> dict[str, np.ndarray]:
    """Masks of channels by what evaluation makes of them."""
    if not layer.has(*STATISTICS):
        return {}
    mean, var = layer.values("running_mean"), layer.values("running_var")
    with np.errstate(all="ignore"):
        scale = gamma_of(layer) / np.sqrt(var + eps_of(layer))
        shift = beta_of(layer) - mean * scale
        nan = np.isnan(scale) | np.isnan(shift)
        infinite = ~nan & (np.isinf(scale) | np.isinf(shift))
        constant = ~nan & ~infinite & np.isinf(var)
        large = ~nan & ~infinite & (var < 0)
    masks = {"NaN": nan, "infinite": infinite, "constant": constant, "large": large}
    return {outcome: mask for outcome, mask in masks.items() if mask.any()}


def said(outcomes: dict[str, np.ndarray], layer: Layer) -> str:
    """What follows for the output, in a sentence."""
    words = {
        "NaN": "NaN in {}",
        "infinite": "infinite in {}",
        "constant": "the constant bias in {}",
        "large": "finite in {}, but only because eps is larger than the variance is below 0",
    }
    parts = [words[outcome].format(channels(mask)) for outcome, mask in outcomes.items()]
    if not parts:
        return "Evaluation needs both statistics to be finite."
    behind = "; behind the next convolution or linear layer everything is NaN" if "NaN" in outcomes else ""
    return f"In evaluation ({eps_in_words(layer)}) the output is {listed(parts)}{behind}."


RULE = Rule(
    "BN102",
    "impossible-statistics",
    Severity.ERROR,
    frozenset({Needs.FILE}),
    "running statistics are NaN or infinite, or a variance is negative",
    check,
)
