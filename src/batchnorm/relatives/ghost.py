"""Ghost batch normalization: parts of a large batch are normalized as if each were the batch."""

import torch
from torch import Tensor

from batchnorm.reference import TrainOutput, batch_norm_train, pooled_statistics


def ghost_sizes(batch_size: int, ghost_batch_size: int) -> list[int]:
    """Samples per part: as many parts as have ``ghost_batch_size`` samples, which differ by at most one sample.

    Example:
        >>> ghost_sizes(11, 3), ghost_sizes(2, 3)
        ([4, 4, 3], [2])
    """
    parts = max(batch_size // ghost_batch_size, 1)
    return [batch_size // parts + (part < batch_size % parts) for part in range(parts)]


def ghost_batch_norm_train(
    x: Tensor, ghost_batch_size: int, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-5
) -> TrainOutput:
    r"""Normalize each part :math:`B_j` of a batch by its own statistics: :math:`y_i = BN_{\gamma,\beta}(x_i; B_j)`.

    As :func:`batchnorm.reference.batch_norm_train`; gamma and beta are shared. The statistics that are returned are
    those of all parts together, by the law of total variance: what running averages receive.

    Source:
        Hoffer, Hubara & Soudry 2017 (arXiv:1705.08741), Algorithm 1. There running averages receive the parts one
        after the other; here all together, once per step.
    """
    parts = [batch_norm_train(part, weight, bias, eps=eps) for part in x.split(ghost_sizes(len(x), ghost_batch_size))]
    outputs, means, variances, counts = zip(*parts, strict=True)
    mean, var_unbiased = pooled_statistics(means, variances, counts)
    count = sum(counts)
    return TrainOutput(torch.cat(outputs), mean, var_unbiased * ((count - 1) / count), count)
