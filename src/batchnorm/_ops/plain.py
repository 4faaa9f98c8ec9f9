"""The "reference" implementation behind the operator: the formulas of ``reference.py``, forward and backward."""

import torch
from torch import Tensor

from batchnorm import reference
from batchnorm._ops import aten
from batchnorm._ops.dtypes import statistics_dtype
from batchnorm.reference import activate, normalize, scale_and_shift, values_per_channel, widen


def train_forward(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As ``aten.train_forward``."""
    if values_per_channel(input) == 0:
        return aten.train_forward(input, weight, bias, residual, eps, activation)
    output, mean, var, _ = reference.batch_norm_train(
        input, weight, bias, residual=residual, activation=activation, eps=eps
    )
    return output, mean, var, torch.stack([mean.double(), torch.rsqrt(var.double() + eps)])


def train_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    saved: Tensor,
    eps: float,
    activation: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As ``aten.train_backward``; the batch statistics are computed again."""
    if values_per_channel(input) == 0:
        return aten.train_backward(grad_output, input, weight, bias, residual, saved, eps, activation)
    mean, invstd = saved.to(statistics_dtype(input))
    gamma = torch.ones_like(mean) if weight is None else widen(weight)
    grad_z = grad_output
    if activation is not None:
        z = scale_and_shift(normalize(widen(input), mean, invstd.pow(-2), 0.0), gamma, bias)
        z = activate(z, residual, None)
        grad_z = aten.ACTIVATION_BACKWARD[activation](grad_output.to(z.dtype), z)
    grad_input, grad_weight, grad_bias = reference.batch_norm_backward_simplified(grad_z, input, gamma, eps)
    return grad_input.to(input.dtype), grad_weight, grad_bias, grad_z.to(input.dtype)
