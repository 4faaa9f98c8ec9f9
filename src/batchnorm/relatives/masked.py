"""Batch normalization of sequences of different lengths: padding is no data."""

import torch
from torch import Tensor

from batchnorm.reference import (
    TrainOutput,
    normalize,
    per_channel,
    reduced_dims,
    scale_and_shift,
    widen,
)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    r"""Mean of the valid values, :math:`\mu_B = \frac{1}{m} \sum_i M_i x_i` with :math:`m = \sum_i M_i`, shape (C,)."""
    return torch.where(mask.unsqueeze(1), x, 0).sum(reduced_dims(x)) / mask.sum()


def masked_var(x: Tensor, mean: Tensor, mask: Tensor) -> Tensor:
    r"""Variance of the valid values, :math:`\sigma_B^2 = \frac{1}{m} \sum_i M_i (x_i - \mu_B)^2`, shape (C,)."""
    return masked_mean((x - per_channel(mean, x)).square(), mask)


def masked_batch_norm_train(
    x: Tensor, mask: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-5
) -> TrainOutput:
    """Normalize the valid values of (N, C, L) or (N, C) by their own statistics; 0 stands at the others.

    Args:
        x: input, shape (N, C, L) or (N, C).
        mask: True where a value is valid, shape (N, L) or (N,).
        weight: gamma, shape (C,), or None for 1.
        bias: beta, shape (C,), or None for 0.
        eps: added to the variance.

    Returns:
        :class:`batchnorm.reference.TrainOutput`; ``count`` is the number of valid values per channel.

    Source:
        Ioffe & Szegedy 2015, Algorithm 1, over the valid values alone.

    Example:
        >>> masked_batch_norm_train(torch.tensor([[1.0], [3.0], [99.0]]), torch.tensor([True, True, False])).mean
        tensor([2.])
    """
    wide = widen(x)
    mean = masked_mean(wide, mask)
    var = masked_var(wide, mean, mask)
    output = scale_and_shift(normalize(wide, mean, var, eps), weight, bias)
    return TrainOutput(torch.where(mask.unsqueeze(1), output, 0).to(x.dtype), mean, var, int(mask.sum()))
