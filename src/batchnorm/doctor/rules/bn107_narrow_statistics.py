"""# BN107: narrow-statistics

## What it finds
A running mean or variance that is stored in float16 or bfloat16.

## Why it is bad
- Rounding: float16 keeps 11 bits and bfloat16 8, so a value is off by up to 0.05% or 0.4%. For the variance that is
  half as much in the output. For the mean it counts in standard deviations of the channel: a mean of 50 standard
  deviations in bfloat16 shifts the output by up to 0.2 of them.
- Range: float16 ends at 65504, and a larger variance is infinite, so that the channel becomes a constant; below
  6e-5 it has fewer digits, and below 3e-8 it is 0.
- Training: an average in bfloat16 does not move where momentum x difference is less than half a unit in the last
  place: with momentum 0.001 it stays where it is.

The message gives bounds of the first two from the values in the file: what rounding to this type can have done. The
values before rounding are not in the file.

## How it arises
`model.half()`, `model.bfloat16()`, export of all tensors in half precision, `load_state_dict(..., assign=True)` from
such a file.

## Evidence
No threshold. The bounds are those of rounding to nearest; a test rounds statistics and compares what
torch computes with them.

## Remedy
Convert the statistics to float32: safe, since every value stays what it is. That stops further loss; digits that are
gone come back only by measuring the statistics again. For training, `batchnorm.keep_float32(model)`.

## False positives
A file for inference in half precision, where activations are rounded alike: then small bounds are harmless.

## References
Documentation of `torch.amp` (batch norm statistics stay in float32); pytorch/pytorch pull 126525 (variance that
overflows in half precision).
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from batchnorm.doctor.checkpoint import STATISTICS, Layer
from batchnorm.doctor.finding import Finding, Severity
from batchnorm.doctor.rule import Needs, Rule, Subject
from batchnorm.doctor.rules.values import called, eps_in_words, eps_of, listed, plain


class Rounding(NamedTuple):
    """Of a type: the relative error of rounding, and the absolute one of the smallest numbers."""

    relative: float
    absolute: float


NARROW = {"float16": Rounding(2.0**-11, 2.0**-25), "bfloat16": Rounding(2.0**-8, 2.0**-134)}
EXACT = Rounding(0.0, 0.0)
TINY = np.finfo(np.float64).tiny


def check(subject: Subject) -> Iterator[Finding]:
    """One finding for each layer."""
    for layer in subject.layers:
        roles = [role for role in STATISTICS if layer.has(role) and layer.tensors[role].dtype in NARROW]
        if roles and layer.num_features:
            yield finding(layer, roles)


def finding(layer: Layer, roles: list[str]) -> Finding:
    types = sorted({layer.tensors[role].dtype for role in roles})
    measured, said = consequences(layer) if layer.has(*STATISTICS) else ({}, "")
    return Finding(
        RULE.code,
        RULE.name,
        Severity.WARNING,
        layer.path,
        f"{listed(called(layer, role) for role in roles)} {'are' if len(roles) > 1 else 'is'} stored in "
        f"{listed(types)}.{said} Further training in this type loses small updates.",
        measured={"dtype": listed(types), **measured},
        remedy="Convert the statistics to float32; keep them so in training with batchnorm.keep_float32.",
        safe=True,
    )


def consequences(layer: Layer) -> tuple[dict[str, float | int | None], str]:
    """What rounding can have done to evaluation, in numbers and in a sentence."""
    mean, var = layer.values("running_mean"), layer.values("running_var")
    infinite, zero = int(np.isinf(var).sum()), int((var == 0).sum())
    measured: dict[str, float | int | None] = {"infinite_variances": infinite, "zero_variances": zero}
    said = ""
    usable = np.isfinite(mean) & np.isfinite(var) & (var >= 0)
    if usable.any():
        mean, var, eps = mean[usable], var[usable], eps_of(layer)
        shift = float((error(layer, "running_mean", mean) / np.sqrt(np.maximum(var + eps, TINY))).max())
        # above a half only where there is hardly an eps
        ratio = np.minimum(error(layer, "running_var", var) / np.maximum(var + eps, TINY), 0.5)
        scale = float((1 / np.sqrt(1 - ratio) - 1).max())
        measured |= {"largest_shift_in_std": plain(shift), "largest_change_of_scale": plain(scale)}
        parts = [f"shifts outputs by up to {shift:.2g} standard deviations of their channel"] if shift else []
        parts += [f"scales them by up to {100 * scale:.2g}%"] if scale else []
        # variances of 0 in bfloat16 beside means in float32 changed nothing that has digits
        said = f" Rounding {listed(parts)} ({eps_in_words(layer)})." if parts else ""
    if infinite:
        said += f" {infinite} variances are infinite: too large for the type, and their channels are constant."
    if zero:
        said += f" {zero} variances are 0: perhaps too small for the type."
    return measured, said


def error(layer: Layer, role: str, values: np.ndarray) -> np.ndarray:
    """The most that rounding to the stored type changes."""
    rounding = NARROW.get(layer.tensors[role].dtype, EXACT)
    return np.maximum(rounding.relative * np.abs(values), rounding.absolute)


RULE = Rule(
    "BN107",
    "narrow-statistics",
    Severity.WARNING,
    frozenset({Needs.FILE}),
    "running statistics are stored in float16 or bfloat16",
    check,
)
