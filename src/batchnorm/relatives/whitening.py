r"""Whitening of mini-batches in plain PyTorch: one function per equation.

Every function of a matrix takes one covariance (d, d); :func:`whiten_train` and :func:`whiten_inference` cut (N, C, *)
into groups of d features. With :math:`\Sigma = V \Lambda V^T = L L^T`, each method has a matrix W with
:math:`W \Sigma W^T = I`:

    ZCA              V Lambda^(-1/2) V^T     the features stay as close as possible to what they were
    PCA              Lambda^(-1/2) V^T       principal components, the largest variance first
    Cholesky         L^(-1)                  feature i is made of features 0 to i
    Newton-Schulz    ZCA by a fixed number of matrix products, complete where eigenvalues are not small

Example:
    >>> x = torch.randn(50, 3) @ torch.randn(3, 3)
    >>> output, mean, cov, count = whiten_train(x, method="cholesky", eps=1e-12)
    >>> torch.allclose(covariance(output), torch.eye(3), atol=1e-3)
    True
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from batchnorm.reference import (
    batch_mean,
    covariance,
    inverse_sqrt,
    per_channel,
    scale_and_shift,
    values_per_channel,
    widen,
)

METHODS = ("zca", "pca", "cholesky", "newton_schulz")


class WhitenOutput(NamedTuple):
    """Output (N, C, *), the batch's ``mean`` (C,) and ``cov`` (groups, d, d), and ``count``, the values per channel."""

    output: Tensor
    mean: Tensor
    cov: Tensor
    count: int  # pyright: ignore[reportIncompatibleMethodOverride]


def shrink(cov: Tensor, shrinkage: float) -> Tensor:
    r"""Shrinkage towards a multiple of the identity: :math:`(1 - a) \Sigma + a \frac{tr \Sigma}{d} I`.

    Ledoit & Wolf 2004. Any batch of shape (\*, d, d).
    """
    mean_var = cov.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    return (1 - shrinkage) * cov + shrinkage * mean_var * torch.eye(cov.shape[-1], dtype=cov.dtype, device=cov.device)


def signs(vectors: Tensor) -> Tensor:
    r"""1 or -1 for each eigenvector, the columns of (\*, d, d), so that its product with a fixed vector is positive.

    The fixed vector is 1 plus the fractional part of i times the golden ratio. The usual rule, which makes the largest
    component positive, flips with the noise of a batch where two components are as large, as for two features of one
    variance; no two components of this vector are alike.
    """
    golden = (1 + math.sqrt(5)) / 2
    fixed = 1 + (torch.arange(vectors.shape[-1], dtype=vectors.dtype, device=vectors.device) * golden).frac()
    return 1 - 2 * (fixed @ vectors < 0).to(vectors.dtype)


def zca_matrix(cov: Tensor, eps: float) -> Tensor:
    r""":math:`V (\Lambda + \epsilon I)^{-1/2} V^T`, symmetric. Section 2 of Ioffe & Szegedy 2015; Huang et al. 2018."""
    return inverse_sqrt(cov, eps)


def pca_matrix(cov: Tensor, eps: float) -> Tensor:
    r""":math:`(\Lambda + \epsilon I)^{-1/2} V^T`, the largest eigenvalue first, signs by :func:`signs`."""
    values, vectors = torch.linalg.eigh(cov)
    values, vectors = values.flip(-1), vectors.flip(-1)
    return torch.rsqrt(values.clamp(min=0) + eps)[:, None] * (vectors * signs(vectors)).mT


def cholesky_matrix(cov: Tensor, eps: float) -> Tensor:
    r""":math:`L^{-1}` with :math:`L L^T = \Sigma + \epsilon I`, lower triangular. Siarohin et al. 2019."""
    eye = torch.eye(cov.shape[-1], dtype=cov.dtype, device=cov.device)
    return torch.linalg.solve_triangular(torch.linalg.cholesky(cov + eps * eye), eye, upper=False)


def newton_schulz_matrix(cov: Tensor, eps: float, iterations: int) -> Tensor:
    r"""T steps of Newton's iteration towards the ZCA matrix; Huang et al. 2019 (IterNorm). Any batch (\*, d, d).

    .. math:: S = \frac{\Sigma + \epsilon I}{tr(\Sigma + \epsilon I)}, \quad P_0 = I, \quad
        P_{k+1} = \frac{3 P_k - P_k^3 S}{2}, \quad W = \frac{P_T}{\sqrt{tr(\Sigma + \epsilon I)}}

    ``root`` is S P_k. Kept beside P_k it makes rounding errors die out, which a product with S itself lets grow
    (Higham 1986).
    """
    eye = torch.eye(cov.shape[-1], dtype=cov.dtype, device=cov.device)
    cov = cov + eps * eye
    trace = cov.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    root, inverse = cov / trace, eye.expand_as(cov)
    for _ in range(iterations):
        factor = (3 * eye - inverse @ root) / 2
        root, inverse = root @ factor, factor @ inverse
    return inverse * torch.rsqrt(trace)


def whitening_matrix(cov: Tensor, method: str, eps: float, iterations: int = 5, shrinkage: float = 0.0) -> Tensor:
    """The matrices of a method for covariances (groups, d, d)."""
    matrices = {"zca": zca_matrix, "pca": pca_matrix, "cholesky": cholesky_matrix}
    shrunk = shrink(cov, shrinkage)
    if method == "newton_schulz":
        return newton_schulz_matrix(shrunk, eps, iterations)
    return torch.stack([matrices[method](one, eps) for one in shrunk])


def values_of_groups(x: Tensor, group_size: int) -> Tensor:
    """(N, C, *) as (groups, m, d)."""
    return x.movedim(1, -1).reshape(-1, x.shape[1] // group_size, group_size).transpose(0, 1)


def apply_matrix(x: Tensor, mean: Tensor, matrix: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    r""":math:`y = \gamma W (x - \mu) + \beta` for (N, C, *), group by group."""
    centered = values_of_groups(x - per_channel(mean, x), matrix.shape[-1])
    white = (centered @ matrix.mT).transpose(0, 1).reshape(x.movedim(1, -1).shape).movedim(-1, 1)
    return scale_and_shift(white, weight, bias)


def whiten_train(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    method: str = "zca",
    group_size: int | None = None,
    eps: float = 1e-5,
    iterations: int = 5,
    shrinkage: float = 0.0,
) -> WhitenOutput:
    r"""Whiten a mini-batch by its own mean and covariance: :math:`y = \gamma W(\Sigma_B) (x - \mu_B) + \beta`.

    Args:
        x: input, shape (N, C, *).
        weight: gamma, shape (C,), or None for 1.
        bias: beta, shape (C,), or None for 0.
        method: one of :data:`METHODS`.
        group_size: features that are whitened together; None for all.
        eps: added to the diagonal of the covariance.
        iterations: of Newton-Schulz.
        shrinkage: a of :func:`shrink`, 0 to 1.

    Returns:
        :class:`WhitenOutput`; the covariance is divided by the count and not shrunk.
    """
    wide = widen(x)
    group_size = group_size or x.shape[1]
    mean = batch_mean(wide)
    cov = torch.stack([covariance(group) for group in values_of_groups(wide, group_size)])
    matrix = whitening_matrix(cov, method, eps, iterations, shrinkage)
    output = apply_matrix(wide, mean, matrix, weight, bias).to(x.dtype)
    return WhitenOutput(output, mean, cov, values_per_channel(x))


def whiten_inference(
    x: Tensor,
    mean: Tensor,
    cov: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    method: str = "zca",
    eps: float = 1e-5,
    iterations: int = 5,
    shrinkage: float = 0.0,
) -> Tensor:
    """Whiten by a given mean (C,) and covariance (groups, d, d). Other args as :func:`whiten_train`."""
    matrix = whitening_matrix(widen(cov), method, eps, iterations, shrinkage)
    return apply_matrix(widen(x), widen(mean), matrix, weight, bias).to(x.dtype)
