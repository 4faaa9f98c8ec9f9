"""Repairs that need the file alone: the dtype of statistics, counters, the eps and the count of another framework."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from batchnorm.doctor.checkpoint import STATISTICS, Layer
from batchnorm.doctor.finding import Finding
from batchnorm.doctor.fixes.outcome import Action, Outcome, Result, fixed, left, refused
from batchnorm.doctor.rules.values import are_initial, channels, counter_of, statistics_of

NARROW = ("float16", "bfloat16")
COUNTER = "num_batches_tracked"
CONVERTED = ("BN109", "converted-model")


def upcast(layers: Sequence[Layer], findings: Iterable[Finding]) -> Result:
    """BN107: statistics as float32. Every float16 and every bfloat16 is a float32, so no value changes."""
    by_path = {layer.path: layer for layer in layers}
    values, outcomes = {}, []
    for finding in findings:
        tensors = {role: by_path[finding.layer].tensors.get(role) for role in STATISTICS}
        values[finding.layer] = {
            role: tensor.load().astype(np.float32)
            for role, tensor in tensors.items()
            if tensor is not None and tensor.dtype in NARROW
        }
        outcomes.append(fixed(finding, "stored as float32; no value changes", safe=True))
    return Result(values, outcomes)


def count(layers: Sequence[Layer], findings: Iterable[Finding], batches: int | None) -> Result:
    """BN105: counters that are absent, 0 or impossible become that of the other layers, or ``batches``."""
    known = usual_counter(layers) if batches is None else batches
    values, outcomes = {}, []
    for finding in findings:
        paths = [layer.path for layer in layers if lacks_counter(layer) and finding.layer in ("", layer.path)]
        if not paths or finding.safe is not True:
            outcomes.append(left(finding))
        elif known is None:
            why = "no other layer says how many batches there were; give their number, batches= or --batches"
            outcomes.append(refused(finding, why))
        else:
            values |= {path: {COUNTER: np.array(known, np.int64)} for path in paths}
            origin = "as in the other layers" if batches is None else "as given"
            outcomes.append(fixed(finding, f"set to {known:,}, {origin}; evaluation does not use it", safe=True))
    return Result(values, outcomes)


def lacks_counter(layer: Layer) -> bool:
    """Whether it has statistics, and no counter that could be right."""
    statistics, counter = statistics_of(layer), counter_of(layer)
    if layer.framework != "torch" or statistics is None or are_initial(*statistics):
        return False
    return counter is None or not (math.isfinite(counter) and counter > 0 and counter % 1 == 0)


def usual_counter(layers: Iterable[Layer]) -> int | None:
    """The most frequent one, of those that could be right."""
    counters = [counter_of(layer) for layer in layers if layer.framework == "torch"]
    usable = [int(each) for each in counters if each and math.isfinite(each) and each > 0 and each % 1 == 0]
    return Counter(usable).most_common(1)[0][0] if usable else None


def convert_eps(
    layers: Sequence[Layer], eps_from: float | None, eps_to: float | None, counts: Mapping[str, int]
) -> tuple[dict[str, dict[str, np.ndarray]], list[Outcome]]:
    """BN109: running variances that make a layer with ``eps_to`` compute in evaluation what it does with its own eps.

    Args:
        layers: those that are not measured anew.
        eps_from: their eps, where the file does not tell.
        eps_to: of the layers as they will be built; None for what it is.
        counts: by layer the values per channel and batch, where the variance is to become an unbiased one, too.
    """
    values, outcomes = {}, []
    for layer in layers:
        own, var = layer.eps if layer.eps is not None else eps_from, layer.tensors.get("running_var")
        n = counts.get(layer.path)
        if var is None or (n is None and eps_to in (None, own)):
            continue
        if eps_to is not None and own is None:
            why = "the file does not tell its eps; give it, eps_from= or --eps-from"
            outcomes.append(Outcome(*CONVERTED, layer.path, Action.REFUSED, why))
            continue
        before, after = (own, eps_to) if own is not None and eps_to is not None else (0.0, 0.0)
        try:
            new = converted_variance(layer.values("running_var"), before, after, n)
        except ValueError as error:
            outcomes.append(Outcome(*CONVERTED, layer.path, Action.REFUSED, str(error)))
            continue
        values[layer.path] = {"running_var": new.astype(np.float64 if var.dtype == "float64" else np.float32)}
        said = [f"for eps {after:g} instead of {before:g}"] * (before != after)
        said += [] if n is None else [f"unbiased for {n:,} values"]
        outcomes.append(Outcome(*CONVERTED, layer.path, Action.FIXED, f"variance {', '.join(said)}", False))
    return values, outcomes


def converted_variance(var: np.ndarray, eps_from: float, eps_to: float, count: int | None = None) -> np.ndarray:
    """var + eps_from - eps_to, so that the sum of variance and eps is the same; ``count`` makes it unbiased before.

    Args:
        var: running variance, shape (C,), float64.
        eps_from: eps that the layer had.
        eps_to: eps that it will have.
        count: values per channel and batch, where the variance divides by them and not by one less.

    Returns:
        float64, shape (C,).

    Raises:
        ValueError: a variance would be negative; the message names the channels. Nothing is converted in part.

    Example:
        >>> converted_variance(np.array([0.5, 2.0]), 1e-3, 1e-5).round(6).tolist()
        [0.50099, 2.00099]
        >>> converted_variance(np.array([0.5, 1e-4]), 1e-5, 1e-3)
        Traceback (most recent call last):
        ValueError: the variance would be negative in 1 of 2 channels (1), so the layer stays as it is
    """
    if count is not None and count < 2:
        raise ValueError(f"an unbiased variance needs 2 values per channel and batch, got {count}")
    new = (var if count is None else var * (count / (count - 1))) + (eps_from - eps_to)
    if (new < 0).any():
        raise ValueError(f"the variance would be negative in {channels(new < 0)}, so the layer stays as it is")
    return new
