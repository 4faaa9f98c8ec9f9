"""Running statistics: how they follow those of the batches."""

import torch
from torch import Tensor

from batchnorm._ops.checks import check_not_differentiated


def update_running_statistics(
    running_mean: Tensor,
    running_var: Tensor,
    statistics: tuple[Tensor, Tensor, Tensor, int],
    momentum: float | Tensor,
) -> None:
    """Move running statistics towards those of a batch, in place.

    ``running = (1 - momentum) * running + momentum * batch``; the variance enters unbiased (divided by count - 1).
    An empty batch and a momentum of 0 change nothing.

    Args:
        running_mean: shape (C,), any floating dtype; narrow ones are computed in the dtype of the statistics.
        running_var: as ``running_mean``.
        statistics: what :func:`batch_norm_train` returned.
        momentum: weight of the batch; a 0-dim tensor, such as 1 / num_batches_tracked, stays on its device.
    """
    _, mean, var, count = statistics
    check_not_differentiated(running_mean, running_var)
    if count < 2 or (not isinstance(momentum, Tensor) and momentum == 0):
        return
    if running_mean.dtype != mean.dtype:
        wide_mean, wide_var = running_mean.to(mean.dtype), running_var.to(var.dtype)
        update_running_statistics(wide_mean, wide_var, statistics, momentum)
        running_mean.copy_(wide_mean)
        running_var.copy_(wide_var)
        return
    bessel = count / (count - 1)
    if isinstance(momentum, Tensor):
        running_mean.mul_(1 - momentum).add_(mean * momentum)
        running_var.mul_(1 - momentum).add_(var * (momentum * bessel))
    else:
        running_mean.mul_(1 - momentum).add_(mean, alpha=momentum)
        running_var.mul_(1 - momentum).add_(var, alpha=momentum * bessel)


def snapshot(*tensors: Tensor) -> list[Tensor]:
    """Copies that keep their values for the backward pass while the originals move, under torch.compile too.

    Its partitioner takes a copy or an expression of a buffer for cheap and computes it again in the backward pass, when
    the buffer has moved: silently wrong gradients (github.com/pytorch/pytorch/pull/197039). It keeps concatenations.
    """
    together = torch.cat([tensor.flatten() for tensor in tensors])
    parts = together.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
