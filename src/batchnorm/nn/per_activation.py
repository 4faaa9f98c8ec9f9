"""PerActivationBatchNorm."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from batchnorm._ops.checks import check_input
from batchnorm.nn.batchnorm import BatchNorm1d


class PerActivationBatchNorm(torch.nn.Module):
    r"""Batch normalization with a mean, a variance, a gamma and a beta for every activation instead of every channel.

    .. math:: y^{(k)} = \mathrm{act}\Big(\gamma^{(k)} \frac{x^{(k)} - \mu^{(k)}}{\sqrt{\sigma^{2(k)} + \epsilon}}
        + \beta^{(k)} + \mathrm{residual}^{(k)}\Big), \quad k = 1 \ldots C \cdot H \cdot W, \quad m = N

    Training, evaluation and frozen: as :class:`BatchNorm1d` on the flattened samples. That layer is ``norm``; its
    parameters and statistics, of C x H x W elements each, are the layer's.

    Args:
        normalized_shape: shape of a sample, such as (C, H, W); other inputs are refused. A number stands for (C,).
        eps: added to the variance; positive.
        momentum: weight of the *new* batch in the running statistics; None for the cumulative average.
        affine: learn gamma and beta.
        track_running_stats: keep running statistics. Without them, evaluation normalizes by the batch too.
        device: of parameters and buffers.
        dtype: of parameters and buffers.
        bias: learn beta; only with ``affine``.
        activation: what follows the normalization, as in :class:`BatchNorm1d`.
        implementation: as in :class:`BatchNorm1d`.

    Shape:
        input and residual (N, *normalized_shape); output the same.

    Raises:
        ValueError: samples of another shape; a batch of one sample when training; as :class:`BatchNorm1d`.
        RuntimeError: as :class:`BatchNorm1d`.

    Source:
        Ioffe & Szegedy 2015, Algorithm 1 for every activation; section 3.2 describes the convolutional form that
        :class:`BatchNorm2d` is instead, and section 4.2.3 has a network with this one in its last layers.

    Example:
        >>> layer = PerActivationBatchNorm((8, 4, 4), activation="relu")
        >>> layer(torch.randn(16, 8, 4, 4)).shape, layer.norm.running_mean.shape
        (torch.Size([16, 8, 4, 4]), torch.Size([128]))
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        activation: str | None = None,
        implementation: str = "auto",
    ) -> None:
        super().__init__()
        self.normalized_shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
        self.norm = BatchNorm1d(
            math.prod(self.normalized_shape),
            eps,
            momentum,
            affine,
            track_running_stats,
            device,
            dtype,
            bias=bias,
            activation=activation,
            implementation=implementation,
        )

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """Normalize ``input``, add ``residual`` of the same shape, apply the activation."""
        if input.shape[1:] != self.normalized_shape:
            raise ValueError(
                f"expected input of shape (N, {', '.join(map(str, self.normalized_shape))}), got {tuple(input.shape)}"
            )
        if residual is None:
            return self.norm(input.flatten(1)).view(input.shape)
        check_input(input, residual, None)
        return self.norm(input.flatten(1), residual.flatten(1)).view(input.shape)

    def extra_repr(self) -> str:
        return f"normalized_shape={self.normalized_shape}"
