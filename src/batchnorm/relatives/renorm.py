"""Batch renormalization: a correction makes training normalize nearly as evaluation will."""

from typing import NamedTuple

from torch import Tensor

from batchnorm.reference import (
    TrainOutput,
    batch_mean,
    batch_var,
    normalize,
    per_channel,
    scale_and_shift,
    values_per_channel,
    widen,
)


class Limits(NamedTuple):
    """How far the correction may go: r within [1 / rmax, rmax], d within [-dmax, dmax]."""

    rmax: float
    dmax: float


def relaxed(limits: Limits, step: int, warmup_steps: int, rmax_steps: int, dmax_steps: int) -> Limits:
    """The limits at a step, counted from 1: no correction during the warm-up, then linear growth up to ``limits``.

    Example:
        >>> [relaxed(Limits(3.0, 5.0), step, 5000, 40_000, 25_000) for step in (5000, 15_000, 40_000)]
        [Limits(rmax=1.0, dmax=0.0), Limits(rmax=1.5714285714285714, dmax=2.5), Limits(rmax=3.0, dmax=5.0)]
    """

    def share(last: int) -> float:
        return min(max(step - warmup_steps, 0) / max(last - warmup_steps, 1), 1.0)

    return Limits(1 + share(rmax_steps) * (limits.rmax - 1), share(dmax_steps) * limits.dmax)


def correction(
    mean: Tensor, var: Tensor, running_mean: Tensor, running_var: Tensor, limits: Limits, eps: float
) -> tuple[Tensor, Tensor]:
    r"""r and d of Algorithm 1, shape (C,); no gradient passes.

    .. math:: r = \mathrm{clip}_{[1/r_{max}, r_{max}]}\Big(\frac{\sigma_B}{\sigma}\Big), \quad
        d = \mathrm{clip}_{[-d_{max}, d_{max}]}\Big(\frac{\mu_B - \mu}{\sigma}\Big), \quad
        \sigma_B = \sqrt{\sigma_B^2 + \epsilon}, \quad \sigma = \sqrt{\sigma^2 + \epsilon}
    """
    sigma = (running_var + eps).sqrt()
    r = ((var + eps).sqrt() / sigma).clamp(1 / limits.rmax, limits.rmax)
    d = ((mean - running_mean) / sigma).clamp(-limits.dmax, limits.dmax)
    return r.detach(), d.detach()


def batch_renorm_train(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    limits: Limits,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
) -> TrainOutput:
    r"""Algorithm 1: :math:`\hat x_i = \frac{x_i - \mu_B}{\sigma_B} r + d, \; y_i = \gamma \hat x_i + \beta`.

    Where nothing is clipped, :math:`\hat x_i = (x_i - \mu) / \sigma`, as in evaluation.

    Args:
        x: input, shape (N, C, *).
        running_mean: shape (C,), as it was before this batch.
        running_var: as ``running_mean``.
        limits: of the correction.
        weight: gamma, shape (C,), or None for 1.
        bias: beta, shape (C,), or None for 0.
        eps: added to both variances.

    Returns:
        :class:`batchnorm.reference.TrainOutput`, with the statistics of the batch.

    Source:
        Ioffe 2017 (arXiv:1702.03275), Algorithm 1. There :math:`\sigma` is a running average of :math:`\sigma_B`;
        here the root of the running variance, which is unbiased, so that evaluation and checkpoints are BN's.

    Example:
        >>> import torch
        >>> x, limits = torch.tensor([[4.0], [6.0]]), Limits(3.0, 5.0)
        >>> batch_renorm_train(x, torch.tensor([2.0]), torch.tensor([4.0]), limits, eps=0.0).output.flatten()
        tensor([1., 2.])
    """
    wide = widen(x)
    mean = batch_mean(wide)
    var = batch_var(wide, mean)
    r, d = correction(mean, var, widen(running_mean), widen(running_var), limits, eps)
    normalized = normalize(wide, mean, var, eps) * per_channel(r, x) + per_channel(d, x)
    return TrainOutput(scale_and_shift(normalized, weight, bias).to(x.dtype), mean, var, values_per_channel(x))
