"""GhostBatchNorm1d, GhostBatchNorm2d, GhostBatchNorm3d."""

from typing import Any

import torch
from torch import Tensor

from batchnorm import functional
from batchnorm._ops.choice import Choice
from batchnorm.nn.batchnorm import FusedBatchNorm
from batchnorm.reference import TrainOutput, values_per_channel


class GhostBatchNorm(FusedBatchNorm):
    """What the three layers share: how a batch is normalized in training."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        ghost_batch_size: int,
        bias: bool = True,
        activation: str | None = None,
        implementation: str = "auto",
    ) -> None:
        if ghost_batch_size < 1:
            raise ValueError(f"ghost_batch_size should be at least 1 sample, got {ghost_batch_size}")
        super().__init__(
            num_features,
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
        self.ghost_batch_size = ghost_batch_size

    def train_and_track(
        self,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float | Tensor,
        num_batches_tracked: Tensor | None,
        choice: Choice,
    ) -> Tensor:
        """Normalize part by part; running statistics receive the whole batch, once."""
        parts = len(input) // self.ghost_batch_size
        if not self.training or parts < 2 or not input.numel() or (running_mean is None) != (running_var is None):
            return super().train_and_track(
                input, weight, bias, residual, running_mean, running_var, momentum, num_batches_tracked, choice
            )
        if values_per_channel(input) == parts:
            raise ValueError(
                f"Expected more than 1 value per channel when training, got ghost_batch_size=1 for an input of size "
                f"{tuple(input.shape)}: use at least 2"
            )
        sizes = [len(input) // parts + (part < len(input) % parts) for part in range(parts)]
        # torch.split, whose gradient is one concatenation; chunks and slices have one tensor of zeros each
        residuals = [None] * parts if residual is None else residual.split(sizes)
        done = [
            functional.normalize_batch(
                part, weight, bias, running_mean, running_var, rest, self.activation, self.eps, self.implementation
            )
            for part, rest in zip(input.split(sizes), residuals, strict=True)
        ]
        output = torch.cat([part.output for part in done])
        if running_mean is not None and running_var is not None:
            functional.update_running_statistics(running_mean, running_var, merged(output, done), momentum)
            if num_batches_tracked is not None:
                num_batches_tracked.add_(1)
        return output

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, ghost_batch_size={self.ghost_batch_size}"


def merged(output: Tensor, parts: list[TrainOutput]) -> TrainOutput:
    """The output of a batch with the statistics of its parts together, by the law of total variance."""
    counts = [part.count for part in parts]
    means = torch.stack([part.mean for part in parts]).double()
    variances = torch.stack([part.var for part in parts]).double()
    shares = torch.tensor(counts, dtype=torch.float64, device=means.device)[:, None] / sum(counts)
    mean = (shares * means).sum(0)
    var = (shares * (variances + (means - mean).square())).sum(0)
    dtype = parts[0].mean.dtype
    return TrainOutput(output, mean.to(dtype), var.to(dtype), sum(counts))


class GhostBatchNorm1d(GhostBatchNorm, torch.nn.BatchNorm1d):
    r"""Ghost batch normalization of (N, C) or (N, C, L): parts of a large batch, each normalized as if it were alone.

    .. math:: y_i = \mathrm{act}\Big(\gamma \frac{x_i - \mu_{B_j}}{\sqrt{\sigma_{B_j}^2 + \epsilon}} + \beta
        + \mathrm{residual}_i\Big), \quad i \in B_j

    Training: a batch of N samples is cut into ``N // ghost_batch_size`` parts of consecutive samples, at least one.
    Where that does not divide N, parts differ by one sample, so none is smaller than ``ghost_batch_size`` unless the
    batch is. gamma and beta are shared. Running statistics move once per step, towards the mean and the unbiased
    variance of the whole batch, as BN's do. Evaluation and frozen: as :class:`BatchNorm1d`; the size of a batch and
    ``ghost_batch_size`` do not matter.

    Args:
        num_features: C.
        eps: added to the variance; positive.
        momentum: weight of the *new* batch in the running statistics; None for the cumulative average.
        affine: learn gamma (``weight``) and beta (``bias``).
        track_running_stats: keep running statistics. Without them, evaluation normalizes by the whole batch.
        device: of parameters and buffers.
        dtype: of parameters and buffers.
        ghost_batch_size: samples per part.
        bias: learn beta; only with ``affine``.
        activation: what follows the normalization, as in :class:`BatchNorm1d`.
        implementation: as in :class:`BatchNorm1d`.

    Shape:
        input and residual (N, C) or (N, C, L); output the same.

    Raises:
        ValueError: as :class:`BatchNorm1d`; ``ghost_batch_size`` below 1, or 1 for samples of one value per channel.
        RuntimeError: as :class:`BatchNorm1d`.

    Same as torch.nn: state_dict (that of ``BatchNorm1d``, both ways), evaluation, running statistics.

    Source:
        Hoffer, Hubara & Soudry 2017 (arXiv:1705.08741), Algorithm 1, which moves running averages once per part.

    Example:
        >>> layer = GhostBatchNorm1d(1, ghost_batch_size=2)
        >>> layer(torch.tensor([[1.0], [3.0], [10.0], [30.0]])).detach().flatten()
        tensor([-1.0000,  1.0000, -1.0000,  1.0000])
        >>> layer.running_mean
        tensor([1.1000])
    """


class GhostBatchNorm2d(GhostBatchNorm, torch.nn.BatchNorm2d):
    """Ghost batch normalization of (N, C, H, W). See :class:`GhostBatchNorm1d`.

    Example:
        >>> GhostBatchNorm2d(3, ghost_batch_size=16, activation="relu")(torch.randn(64, 3, 5, 5)).shape
        torch.Size([64, 3, 5, 5])
    """


class GhostBatchNorm3d(GhostBatchNorm, torch.nn.BatchNorm3d):
    """Ghost batch normalization of (N, C, D, H, W). See :class:`GhostBatchNorm1d`.

    Example:
        >>> GhostBatchNorm3d(2, ghost_batch_size=2)(torch.randn(4, 2, 3, 3, 3)).shape
        torch.Size([4, 2, 3, 3, 3])
    """
