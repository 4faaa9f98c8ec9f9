"""Whitening matrices of all groups at once, in float64, each with its exact derivative.

A method returns its matrix W (groups, d, d) and a function that takes the gradient of W to the gradient of the
covariance, which is symmetric. Only PCA's divides by the difference of two eigenvalues.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from batchnorm.relatives import whitening

# Relative to the largest eigenvalue. Smaller gaps are rounding, which leaves 1e-15 where a covariance has zeros
SMALLEST_GAP = 1e-12

Derivative = Callable[[Tensor], Tensor]


class Method(NamedTuple):
    """Which matrix: the arguments of :func:`batchnorm.functional.whiten` that say so."""

    method: str
    eps: float
    iterations: int
    shrinkage: float


def whitening_matrix(cov: Tensor, how: Method) -> tuple[Tensor, Derivative]:
    """The matrix in float64, NaN for groups whose covariance is not finite, and its derivative."""
    cov = cov.double()
    finite = cov.sum((-2, -1), keepdim=True).isfinite()
    all_finite = bool(finite.all())
    if not all_finite:
        cov = torch.where(finite, cov, torch.eye(cov.shape[-1], dtype=cov.dtype, device=cov.device))
    compute = METHODS[how.method]
    matrix, derivative = compute(whitening.shrink(cov, how.shrinkage) if how.shrinkage else cov, how)
    if not all_finite:
        matrix = matrix.where(finite, torch.nan)
    if not how.shrinkage:
        return matrix, derivative
    return matrix, lambda grad: whitening.shrink(derivative(grad), how.shrinkage)


def eigenpairs(cov: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Eigenvalues plus eps (groups, d), and eigenvectors as columns."""
    values, vectors = torch.linalg.eigh(cov)
    # rounding makes eigenvalues of a singular covariance (m < d) slightly negative
    return values.clamp_(min=0).add_(eps), vectors


def symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.mT) / 2


def divided_differences(s: Tensor) -> Tensor:
    """Those of the inverse square root, from s = 1 / sqrt(eigenvalue); see ``reference.whiten_backward``."""
    return -s[:, :, None] * s[:, None, :] / (1 / s[:, :, None] + 1 / s[:, None, :])


def zca(cov: Tensor, how: Method) -> tuple[Tensor, Derivative]:
    values, vectors = eigenpairs(cov, how.eps)
    s = values.rsqrt()

    def derivative(grad: Tensor) -> Tensor:
        inner = divided_differences(s) * symmetric(vectors.mT @ grad @ vectors)
        return vectors @ inner @ vectors.mT

    return vectors * s[:, None, :] @ vectors.mT, derivative


def pca(cov: Tensor, how: Method) -> tuple[Tensor, Derivative]:
    r"""The ZCA matrix, turned into the eigenvectors.

    The derivative is ZCA's with the eigenvectors held, and what turning them does:
    :math:`(A_{ji} s_i - A_{ij} s_j) / 2 (\lambda_j - \lambda_i)`, A = grad V. Where two eigenvalues coincide, the
    eigenvectors in their plane are arbitrary, and only a loss that does not depend on them has a gradient. Its
    numerator is 0, so there the term is left out.
    """
    values, vectors = eigenpairs(cov, how.eps)
    values, vectors = values.flip(-1), vectors.flip(-1)
    vectors = vectors * whitening.signs(vectors)[:, None, :]
    s = values.rsqrt()

    def derivative(grad: Tensor) -> Tensor:
        turned = grad @ vectors
        gap = values[:, None, :] - values[:, :, None]
        gap = gap.masked_fill(gap.abs() <= SMALLEST_GAP * values[:, :1, None], torch.inf)
        inner = divided_differences(s) * symmetric(turned) + torque(turned, s) / (2 * gap)
        return vectors @ inner @ vectors.mT

    return s[:, :, None] * vectors.mT, derivative


def torque(turned: Tensor, s: Tensor) -> Tensor:
    """Antisymmetric: how the loss changes when two outputs turn into each other."""
    scaled = turned.mT * s[:, :, None]
    return scaled - scaled.mT


def cholesky(cov: Tensor, how: Method) -> tuple[Tensor, Derivative]:
    """L^-1. Its derivative uses nothing else: with W = L^-1 the usual one is W^T F(-grad W^T) W.

    F keeps the lower triangle and half of the diagonal (Murray 2016, arXiv:1602.07527).
    """
    eye = torch.eye(cov.shape[-1], dtype=cov.dtype, device=cov.device)
    factor, failed = torch.linalg.cholesky_ex(cov + how.eps * eye)
    if failed.any():
        factor = factor_of_semidefinite(cov, how.eps)
    matrix = torch.linalg.solve_triangular(factor, eye, upper=False)

    def derivative(grad: Tensor) -> Tensor:
        inner = -(grad @ matrix.mT).tril()
        inner.diagonal(dim1=-2, dim2=-1).mul_(0.5)
        return symmetric(matrix.mT @ inner @ matrix)

    return matrix, derivative


def factor_of_semidefinite(cov: Tensor, eps: float) -> Tensor:
    """The factor where rounding has left none: negative eigenvalues count as 0, as for ZCA."""
    values, vectors = eigenpairs(cov, eps)
    factor = torch.linalg.qr(values.sqrt()[:, :, None] * vectors.mT).R.mT
    return factor * factor.diagonal(dim1=-2, dim2=-1).sign()[:, None, :]


def newton_schulz(cov: Tensor, how: Method) -> tuple[Tensor, Derivative]:
    """``relatives.whitening.newton_schulz_matrix``, whose steps are kept for the derivative."""
    eye = torch.eye(cov.shape[-1], dtype=cov.dtype, device=cov.device)
    cov = cov + how.eps * eye
    trace = trace_of(cov)
    normalized = cov / trace
    root, inverse, steps = normalized, eye.expand_as(cov), []
    for _ in range(how.iterations):
        factor = torch.baddbmm(eye, inverse, root, beta=1.5, alpha=-0.5)
        steps.append((root, inverse, factor))
        root, inverse = root @ factor, factor @ inverse

    def derivative(grad: Tensor) -> Tensor:
        grad_root, grad_inverse = torch.zeros_like(cov), grad
        for root, before, factor in reversed(steps):
            half = (root.mT @ grad_root + grad_inverse @ before.mT) / 2
            grad_root = grad_root @ factor.mT - before.mT @ half
            grad_inverse = factor.mT @ grad_inverse - half @ root.mT
        scale = (grad * inverse).sum((-2, -1), keepdim=True) / 2 + (grad_root * normalized).sum((-2, -1), keepdim=True)
        return (symmetric(grad_root) - scale * eye) / trace * trace.rsqrt()

    return inverse * trace.rsqrt(), derivative


def trace_of(matrix: Tensor) -> Tensor:
    """(groups, 1, 1)."""
    return matrix.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]


METHODS = {"zca": zca, "pca": pca, "cholesky": cholesky, "newton_schulz": newton_schulz}
