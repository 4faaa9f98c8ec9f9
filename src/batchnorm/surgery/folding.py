"""The arithmetic of folding, on float64 tensors: a scale and a shift per channel go into a weight and a bias."""

from typing import Any

import torch
from torch import Tensor

from batchnorm.reference import inference_affine


def scale_and_shift(layer: Any) -> tuple[Tensor, Tensor]:
    """What a BN layer does to each channel in evaluation, ``scale * x + shift``, in float64."""
    mean, var = layer.running_mean.double(), layer.running_var.double()
    weight = torch.ones_like(mean) if layer.weight is None else layer.weight.double()
    bias = torch.zeros_like(mean) if layer.bias is None else layer.bias.double()
    return inference_affine(mean, var, weight, bias, layer.eps)


def fold_after(
    weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor, *, transposed: bool, groups: int
) -> tuple[Tensor, Tensor]:
    r"""Weight and bias of :math:`s (W * x + b) + t`: the normalization follows, its channels are the outputs.

    Args:
        weight: (out, in / groups, *) or, transposed, (in, out / groups, *).
        bias: (out,), or None for 0.
        scale: s, (out,).
        shift: t, (out,).
        transposed: of a transposed convolution.
        groups: of the convolution; 1 for a linear layer.
    """
    folded = by_output(by_output(weight, transposed, groups) * scale.view(-1, *ones(weight)), transposed, groups)
    return folded, shift if bias is None else bias * scale + shift


def fold_before(
    weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor, *, transposed: bool, groups: int
) -> tuple[Tensor, Tensor | None]:
    r"""Weight and bias of :math:`W * (s x + t) + b`: the normalization precedes, its channels are the inputs.

    Exact where every output sees the whole kernel. So with a shift there must be no padding by zeros, and the
    convolution must not be transposed; see :func:`fold_after` for the arguments, with (in,) for (out,).
    """
    if transposed:
        assert not shift.any()
        return weight * scale.view(-1, *ones(weight)), bias
    # groups, outputs of a group, inputs of a group, kernel
    parts = weight.unflatten(0, (groups, -1))
    shape = (groups, 1, -1, *ones(weight)[1:])
    folded = (parts * scale.view(shape)).flatten(0, 1)
    if not shift.any():
        return folded, bias
    added = (parts * shift.view(shape)).flatten(2).sum(2).flatten()
    return folded, added if bias is None else bias + added


def by_output(weight: Tensor, transposed: bool, groups: int) -> Tensor:
    """The weight with its outputs first; for a transposed convolution also the way back, with outputs as inputs."""
    if not transposed:
        return weight
    return weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)


def ones(weight: Tensor) -> list[int]:
    return [1] * (weight.dim() - 1)


def growth_and_spread(
    before: Tensor, after: Tensor, *, transposed: bool, groups: int
) -> tuple[float | None, float | None]:
    """How folding changed the range of a weight: the largest absolute value, and largest / smallest range of a channel.

    Channels that are 0 do not count; None where there is no other.
    """
    ranges = [by_output(w, transposed, groups).flatten(1).abs().amax(1).double() for w in (before, after)]
    ranges = [r[r > 0] for r in ranges]
    if not all(len(r) for r in ranges):
        return None, None
    largest = [r.max().item() for r in ranges]
    spread = [high / r.min().item() for high, r in zip(largest, ranges, strict=True)]
    return largest[1] / largest[0], spread[1] / spread[0]
