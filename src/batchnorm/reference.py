r"""Batch Normalization in plain PyTorch: one function per equation of the paper.

Read this file first. Every other implementation in the package is tested against it, in float64.
All functions differentiate through autograd. Whole transforms compute float16 and bfloat16 in float32; single equations
compute in the dtype they are given.

Notation of the paper (Ioffe & Szegedy 2015, arXiv:1502.03167) and the names used in code:

    x          input, shape (N, C, *)      channel (feature) in dimension 1, as in torch
    m          ``count``                   values per channel: N for a dense layer, N x H x W for a
                                           convolution (section 3.2: "effective mini-batch size m' = m pq")
    mu_B       ``mean``, shape (C,)        mini-batch mean
    sigma_B^2  ``var``, shape (C,)         mini-batch variance, divided by m
    x_hat      ``normalized``              normalized input
    gamma, beta  ``weight``, ``bias``      shape (C,), learned

The dense and the convolutional form are the same formulas over other dimensions: statistics are taken over
every dimension but 1.

Example:
    >>> x = torch.tensor([[1.0], [3.0]])
    >>> normalize(x, batch_mean(x), batch_var(x, batch_mean(x)), eps=0.0).flatten()
    tensor([-1.,  1.])
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    name: getattr(F, name)
    for name in ("relu", "relu6", "leaky_relu", "elu", "silu", "gelu", "mish", "sigmoid", "tanh", "hardswish")
}
"""What can follow a normalization, with torch's default parameters."""


class TrainOutput(NamedTuple):
    """Output (N, C, *), the batch's ``mean`` and ``var`` (C,), and ``count``, the values per channel."""

    output: Tensor
    mean: Tensor
    var: Tensor
    count: int  # pyright: ignore[reportIncompatibleMethodOverride]


class Gradients(NamedTuple):
    """Gradients of the loss: ``grad_input`` (N, C, *), ``grad_weight`` and ``grad_bias`` (C,)."""

    grad_input: Tensor
    grad_weight: Tensor
    grad_bias: Tensor


def reduced_dims(x: Tensor) -> list[int]:
    """Dimensions that statistics run over: all but the channel dimension 1."""
    return [0, *range(2, x.dim())]


def values_per_channel(x: Tensor) -> int:
    """m of the paper: N for (N, C), N x H x W for (N, C, H, W)."""
    count = x.shape[0]
    for size in x.shape[2:]:
        count = count * size
    return count


def per_channel(v: Tensor, x: Tensor) -> Tensor:
    """View a (C,) vector so that it broadcasts over (N, C, *)."""
    return v.view(1, -1, *[1] * (x.dim() - 2))


# Algorithm 1: the Batch Normalizing Transform


def batch_mean(x: Tensor) -> Tensor:
    r"""Mini-batch mean, Algorithm 1 line 1: :math:`\mu_B = \frac{1}{m} \sum_i x_i`, shape (C,)."""
    return x.mean(reduced_dims(x))


def batch_var(x: Tensor, mean: Tensor) -> Tensor:
    r"""Mini-batch variance, Algorithm 1 line 2: :math:`\sigma_B^2 = \frac{1}{m} \sum_i (x_i - \mu_B)^2`, shape (C,)."""
    return (x - per_channel(mean, x)).square().mean(reduced_dims(x))


def normalize(x: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    r"""Normalize, Algorithm 1 line 3: :math:`\hat x_i = (x_i - \mu_B) / \sqrt{\sigma_B^2 + \epsilon}`."""
    return (x - per_channel(mean, x)) * per_channel(torch.rsqrt(var + eps), x)


def scale_and_shift(normalized: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    r"""Scale and shift, Algorithm 1 line 4: :math:`y_i = \gamma \hat x_i + \beta`. None stands for 1 and 0."""
    output = normalized if weight is None else normalized * per_channel(weight, normalized)
    return output if bias is None else output + per_channel(bias, output)


def activate(z: Tensor, residual: Tensor | None, activation: str | None) -> Tensor:
    """What follows the transform in a network: ``activation(z + residual)``; None leaves either out."""
    if residual is not None:
        z = z + residual
    return z if activation is None else ACTIVATIONS[activation](z)


def batch_norm_train(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
    eps: float = 1e-5,
) -> TrainOutput:
    r"""Algorithm 1: normalize a mini-batch by its own statistics, then scale and shift.

    .. math:: y = \mathrm{act}(\gamma \hat x + \beta + \mathrm{residual})

    Args:
        x: input, shape (N, C, *).
        weight: gamma, shape (C,), or None for 1.
        bias: beta, shape (C,), or None for 0.
        residual: added before the activation, shape of ``x``.
        activation: a name of :data:`ACTIVATIONS`, or None.
        eps: added to the variance. Unlike the layers, the reference accepts 0.

    Returns:
        :class:`TrainOutput`. Gradients flow through the statistics, as section 2 of the paper demands.

    Source:
        Algorithm 1. float16 and bfloat16 inputs are normalized in float32, as ATen does.

    Example:
        >>> output, mean, var, count = batch_norm_train(torch.tensor([[1.0], [3.0]]))
        >>> mean, var, count
        (tensor([2.]), tensor([1.]), 2)
    """
    wide = widen(x)
    mean = batch_mean(wide)
    var = batch_var(wide, mean)
    z = scale_and_shift(normalize(wide, mean, var, eps), weight, bias)
    output = activate(z, residual, activation).to(x.dtype)
    return TrainOutput(output, mean, var, values_per_channel(x))


def widen(x: Tensor) -> Tensor:
    """The dtype that statistics are computed in: float32 for half-precision inputs, else the input's."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


# Section 3: the backward pass, as the paper prints it


def grad_normalized(grad_output: Tensor, weight: Tensor) -> Tensor:
    r""":math:`\partial l / \partial \hat x_i = \partial l / \partial y_i \cdot \gamma`."""
    return grad_output * per_channel(weight, grad_output)


def grad_batch_var(grad_normalized: Tensor, centered: Tensor, var: Tensor, eps: float) -> Tensor:
    r""":math:`\partial l / \partial \sigma_B^2 = \sum_i \partial l / \partial \hat x_i \, (x_i - \mu_B) \cdot
    -\frac{1}{2} (\sigma_B^2 + \epsilon)^{-3/2}`."""
    return (grad_normalized * centered).sum(reduced_dims(centered)) * -0.5 * (var + eps) ** -1.5


def grad_batch_mean(
    grad_normalized: Tensor, grad_batch_var: Tensor, centered: Tensor, var: Tensor, eps: float
) -> Tensor:
    r""":math:`\partial l / \partial \mu_B = \sum_i \partial l / \partial \hat x_i \cdot -1/\sqrt{\sigma_B^2 + \epsilon}
    + \partial l / \partial \sigma_B^2 \cdot \frac{1}{m} \sum_i -2 (x_i - \mu_B)`.

    The second term is zero for any x; the paper prints it.
    """
    dims, count = reduced_dims(centered), values_per_channel(centered)
    return -grad_normalized.sum(dims) * torch.rsqrt(var + eps) + grad_batch_var * (-2 * centered).sum(dims) / count


def grad_input(
    grad_normalized: Tensor, grad_batch_var: Tensor, grad_batch_mean: Tensor, centered: Tensor, var: Tensor, eps: float
) -> Tensor:
    r""":math:`\partial l / \partial x_i = \partial l / \partial \hat x_i / \sqrt{\sigma_B^2 + \epsilon}
    + \partial l / \partial \sigma_B^2 \cdot 2 (x_i - \mu_B) / m + \partial l / \partial \mu_B / m`."""
    count = values_per_channel(centered)
    direct = grad_normalized * per_channel(torch.rsqrt(var + eps), centered)
    through_var = per_channel(grad_batch_var, centered) * 2 * centered / count
    return direct + through_var + per_channel(grad_batch_mean, centered) / count


def grad_weight(grad_output: Tensor, normalized: Tensor) -> Tensor:
    r""":math:`\partial l / \partial \gamma = \sum_i \partial l / \partial y_i \cdot \hat x_i`."""
    return (grad_output * normalized).sum(reduced_dims(normalized))


def grad_bias(grad_output: Tensor) -> Tensor:
    r""":math:`\partial l / \partial \beta = \sum_i \partial l / \partial y_i`."""
    return grad_output.sum(reduced_dims(grad_output))


def batch_norm_backward(grad_output: Tensor, x: Tensor, weight: Tensor, eps: float) -> Gradients:
    """The six equations of section 3, in the paper's order.

    ``grad_output`` and ``x`` have shape (N, C, *), ``weight`` (C,); ``eps`` is the forward pass's. For half-precision
    inputs the gradients come in float32.
    """
    grad_output, x, weight = widen(grad_output), widen(x), widen(weight)
    mean, var = batch_mean(x), batch_var(x, batch_mean(x))
    d_normalized = grad_normalized(grad_output, weight)
    centered = x - per_channel(mean, x)
    d_var = grad_batch_var(d_normalized, centered, var, eps)
    d_mean = grad_batch_mean(d_normalized, d_var, centered, var, eps)
    d_input = grad_input(d_normalized, d_var, d_mean, centered, var, eps)
    return Gradients(d_input, grad_weight(grad_output, normalize(x, mean, var, eps)), grad_bias(grad_output))


def batch_norm_backward_simplified(grad_output: Tensor, x: Tensor, weight: Tensor, eps: float) -> Gradients:
    r"""The same gradients with the sums collected; what a kernel computes.

    .. math:: \frac{\partial l}{\partial x_i} = \frac{\gamma}{m \sqrt{\sigma_B^2 + \epsilon}} \Big(
        m \frac{\partial l}{\partial y_i} - \sum_j \frac{\partial l}{\partial y_j}
        - \hat x_i \sum_j \frac{\partial l}{\partial y_j} \hat x_j \Big)
    """
    count = values_per_channel(x)
    grad_output, x, weight = widen(grad_output), widen(x), widen(weight)
    mean, var = batch_mean(x), batch_var(x, batch_mean(x))
    normalized = normalize(x, mean, var, eps)
    d_bias, d_weight = grad_bias(grad_output), grad_weight(grad_output, normalized)
    centered_grad = grad_output - per_channel(d_bias / count, x) - normalized * per_channel(d_weight / count, x)
    return Gradients(centered_grad * per_channel(weight * torch.rsqrt(var + eps), x), d_weight, d_bias)


# Section 3.1 and Algorithm 2: population statistics and inference


def running_average(running: Tensor, new: Tensor, momentum: float) -> Tensor:
    """The moving average kept while training (section 3.1); ``momentum`` weighs the new batch, as in torch."""
    return (1 - momentum) * running + momentum * new


def var_unbiased(var: Tensor, count: int) -> Tensor:
    r""":math:`\frac{m}{m-1} \sigma_B^2`: what running averages of the variance accumulate."""
    return var * (count / (count - 1))


def population_mean(means: Sequence[Tensor]) -> Tensor:
    r"""Algorithm 2 line 10: :math:`E[x] = E_B[\mu_B]` over training mini-batches of one size."""
    return torch.stack(list(means)).mean(0)


def population_var(variances: Sequence[Tensor], count: int) -> Tensor:
    r"""Algorithm 2 line 10: :math:`Var[x] = \frac{m}{m-1} E_B[\sigma_B^2]`, mini-batches of ``count`` values each.

    Unbiased for independent draws. The variance between the means is left out; :func:`pooled_statistics` counts it.
    """
    return var_unbiased(torch.stack(list(variances)).mean(0), count)


def pooled_statistics(
    means: Sequence[Tensor], variances: Sequence[Tensor], counts: Sequence[int]
) -> tuple[Tensor, Tensor]:
    r"""Mean and unbiased variance of all values together, by the law of total variance; batches of any size.

    .. math:: E[x] = \frac{1}{M} \sum_B m_B \mu_B, \quad
        Var[x] = \frac{1}{M - 1} \sum_B m_B \big(\sigma_B^2 + (\mu_B - E[x])^2\big), \quad M = \sum_B m_B

    Example:
        >>> pooled_statistics([torch.tensor(1.0), torch.tensor(3.0)], [torch.tensor(0.0)] * 2, [2, 2])
        (tensor(2.), tensor(1.3333))
    """
    total = sum(counts)
    shares = [count / total for count in counts]
    mean = torch.stack([share * m for share, m in zip(shares, means, strict=True)]).sum(0)
    spread = [share * (var + (m - mean).square()) for share, m, var in zip(shares, means, variances, strict=True)]
    return mean, torch.stack(spread).sum(0) * (total / (total - 1))


def batch_norm_inference(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
    eps: float = 1e-5,
) -> Tensor:
    r"""Normalize by population statistics: :math:`y = \gamma (x - E[x]) / \sqrt{Var[x] + \epsilon} + \beta`.

    As :func:`batch_norm_train`, with ``mean`` and ``var`` of the population, shape (C,).
    """
    z = scale_and_shift(normalize(widen(x), widen(mean), widen(var), eps), weight, bias)
    return activate(z, residual, activation).to(x.dtype)


def inference_affine(mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    r"""Algorithm 2 line 11: inference as one affine map ``scale * x + shift`` per channel.

    .. math:: y = \frac{\gamma}{\sqrt{Var[x] + \epsilon}} x
        + \Big(\beta - \frac{\gamma E[x]}{\sqrt{Var[x] + \epsilon}}\Big)
    """
    scale = weight * torch.rsqrt(var + eps)
    return scale, bias - scale * mean


# Section 2: the two roads not taken


def normalize_outside_gradient(x: Tensor, eps: float) -> Tensor:
    """Normalization that the gradient ignores: a bias before it drifts without bound at constant loss (section 2)."""
    mean = batch_mean(x).detach()
    return normalize(x, mean, batch_var(x, mean).detach(), eps)


def covariance(x: Tensor) -> Tensor:
    r"""Covariance of the features of a batch (m, d): :math:`\frac{1}{m} \sum_i (x_i - \mu)(x_i - \mu)^T`, (d, d)."""
    centered = x - batch_mean(x)
    return centered.mT @ centered / x.shape[0]


def inverse_sqrt(cov: Tensor, eps: float) -> Tensor:
    r""":math:`(\Sigma + \epsilon I)^{-1/2}` of a symmetric positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(cov)
    # rounding makes eigenvalues of a singular covariance (m < d) slightly negative
    return vectors * torch.rsqrt(values.clamp(min=0) + eps) @ vectors.mT


def whiten(x: Tensor, eps: float) -> Tensor:
    r"""Full whitening of a mini-batch (m, d), section 2: :math:`Cov[x]^{-1/2} (x - E[x])` (ZCA)."""
    return (x - batch_mean(x)) @ inverse_sqrt(covariance(x), eps)


def whiten_backward(grad_output: Tensor, x: Tensor, eps: float) -> Tensor:
    r"""Gradient of :func:`whiten` with respect to x, through the mean and the covariance, shape (m, d).

    The derivative of :math:`f(\Sigma) = (\Sigma + \epsilon I)^{-1/2}` with eigenpairs :math:`\lambda_i, v_i` is

    .. math:: \partial l/\partial \Sigma = V (K \circ V^T G V) V^T, \quad
        K_{ij} = \frac{f(\lambda_i) - f(\lambda_j)}{\lambda_i - \lambda_j} = -\frac{s_i s_j}{1/s_i + 1/s_j},
        \quad s_i = (\lambda_i + \epsilon)^{-1/2}

    The right-hand form of K has no difference in its denominator, so equal eigenvalues need no special case
    (divided differences: Daleckii & Krein 1965).
    """
    centered = x - batch_mean(x)
    values, vectors = torch.linalg.eigh(covariance(x))
    s = torch.rsqrt(values.clamp(min=0) + eps)
    divided_differences = -torch.outer(s, s) / (1 / s[:, None] + 1 / s[None, :])
    in_eigenbasis = vectors.mT @ (centered.mT @ grad_output) @ vectors
    grad_cov = vectors @ (divided_differences * in_eigenbasis) @ vectors.mT
    grad_centered = grad_output @ (vectors * s @ vectors.mT) + centered @ (grad_cov + grad_cov.mT) / x.shape[0]
    return grad_centered - grad_centered.mean(0)
