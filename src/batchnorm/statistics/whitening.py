"""Whitening of a whole data set: its mean and covariance, measured once, and the matrix that they give."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from batchnorm._ops.whiten import check_group_size, check_method
from batchnorm._ops.whitening_autograd import whiten_by
from batchnorm._ops.whitening_matrix import whitening_matrix
from batchnorm.relatives.whitening import shrink
from batchnorm.statistics.moments import Moments


@dataclass(frozen=True)
class DatasetWhitening:
    """What :func:`whiten_dataset` found, in float64.

    Attributes:
        mean: shape (C,).
        cov: unbiased, shape (C / d, d, d).
        matrix: W, shape (C / d, d, d).
        count: values per feature.
    """

    mean: Tensor
    cov: Tensor
    matrix: Tensor
    count: int

    def apply(self, input: Tensor) -> Tensor:
        """``W (input - mean)`` for (N, C, *), in the dtype of the input, differentiable."""
        if input.dim() < 2 or input.shape[1] != len(self.mean):
            raise ValueError(f"expected input of size (N, {len(self.mean)}, *), got {tuple(input.shape)}")
        return whiten_by(input, self.mean, self.matrix, None, None)


@torch.no_grad()
def whiten_dataset(
    data: Tensor | Iterable[Any],
    *,
    method: str = "zca",
    group_size: int | None = None,
    eps: float = 1e-5,
    iterations: int = 5,
    shrinkage: float = 0.0,
) -> DatasetWhitening:
    r"""Fit a whitening transform to data, such as the inputs of a network.

    .. math:: y = W (x - E[x]), \quad W \Big((1 - a) Cov[x] + a \frac{tr Cov[x]}{d} I + \epsilon I\Big) W^T = I

    Batches are merged in float64 and may differ in size (Chan et al. 1979). A layer ``Whitening1d(C)`` whose running
    statistics are this mean and covariance does the same in evaluation.

    Args:
        data: (N, C, *), or yields such batches, or tuples whose first element is one.
        method: "zca", "pca", "cholesky" or "newton_schulz", explained at :func:`batchnorm.functional.whiten`.
        group_size: d, the features that are whitened together; None for all.
        eps: added to the diagonal of the covariance; 0 is allowed.
        iterations: of Newton-Schulz.
        shrinkage: a, 0 to 1, for a singular covariance: fewer values than features, or features that depend on others.

    Returns:
        :class:`DatasetWhitening`, whose ``apply`` whitens.

    Raises:
        ValueError: fewer than two values per feature, inf or NaN, batches of different C, a covariance that stays
            singular with this ``eps`` and ``shrinkage``, or an argument that :func:`batchnorm.functional.whiten`
            refuses.

    Source:
        Ioffe & Szegedy 2015, section 2, for the population.

    Example:
        >>> data = torch.randn(1000, 3) @ torch.randn(3, 3) + 5
        >>> whitening = whiten_dataset(data.split(300), eps=0.0)
        >>> torch.allclose(torch.cov(whitening.apply(data).T), torch.eye(3), atol=1e-4)
        True
    """
    how = check_method(method, eps, iterations, shrinkage, training=False)
    mean, cov, count = measure([data] if isinstance(data, Tensor) else data, group_size)
    if not (mean.isfinite().all() and cov.isfinite().all()):
        raise ValueError("the data has inf or NaN: leave these samples out")
    d = cov.shape[-1]
    regular = shrink(cov, shrinkage) + eps * torch.eye(d, dtype=cov.dtype, device=cov.device)
    rank = torch.linalg.matrix_rank(regular, hermitian=True)
    if (rank < d).any():
        raise ValueError(
            f"the covariance of {count} values per feature is singular, of rank {int(rank.min())} for {d} features, "
            f"with eps={eps} and shrinkage={shrinkage}: raise one of them"
        )
    return DatasetWhitening(mean, cov, whitening_matrix(cov, how)[0], count)


def measure(batches: Iterable[Any], group_size: int | None) -> tuple[Tensor, Tensor, int]:
    """Mean, unbiased covariance of each group, and count, of all batches together."""
    moments: Moments | None = None
    for item in batches:
        batch = item[0] if isinstance(item, (tuple, list)) else item
        wanted = "C" if moments is None or not moments.count else len(moments.mean)
        if batch.dim() < 2 or wanted not in ("C", batch.shape[1]):
            raise ValueError(f"expected batches of size (N, {wanted}, *), got {tuple(batch.shape)}")
        moments = moments or Moments(check_group_size(batch.shape[1], group_size))
        moments.add(batch)
    count = moments.count if moments else 0
    if moments is None or count < 2:
        raise ValueError(f"a covariance needs at least 2 values per feature, but the data has {count}")
    return *moments.pooled(), count
