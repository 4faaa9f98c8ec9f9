"""The "reference" implementation behind the operator: the formulas of ``reference.py``, forward and backward."""

import torch
from torch import Tensor

from batchnorm import reference
from batchnorm._ops.aten import ACTIVATION_BACKWARD
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
        zeros = widen(input.new_zeros(input.shape[1]))
        return torch.empty_like(input), zeros, zeros.clone(), zeros.clone()
    output, mean, var, _ = reference.batch_norm_train(
        input, weight, bias, residual=residual, activation=activation, eps=eps
    )
    return output, mean, var, torch.rsqrt(var + eps)


def train_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    eps: float,
    activation: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As ``aten.train_backward``; the batch statistics are computed again."""
    gamma = torch.ones_like(mean) if weight is None else widen(weight)
    if values_per_channel(input) == 0:
        return torch.empty_like(input), torch.zeros_like(mean), torch.zeros_like(mean), grad_output
    grad_z = grad_output
    if activation is not None:
        z = scale_and_shift(normalize(widen(input), mean, invstd.pow(-2), 0.0), gamma, bias)
        z = activate(z, residual, None)
        grad_z = ACTIVATION_BACKWARD[activation](grad_output.to(z.dtype), z)
    grad_input, grad_weight, grad_bias = reference.batch_norm_backward_simplified(grad_z, input, gamma, eps)
    return grad_input.to(input.dtype), grad_weight, grad_bias, grad_z.to(input.dtype)
