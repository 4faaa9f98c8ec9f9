"""The "aten" implementation: torch's own batch norm kernels, with the epilogue (residual, activation) around them.

Every implementation is a module with ``train_forward`` and ``train_backward``; the operators in ``batch_norm.py``
call them.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from batchnorm._ops.dtypes import as_dtype, statistics_dtype
from batchnorm.reference import ACTIVATIONS, per_channel, values_per_channel

aten = torch.ops.aten
native_backward = aten.native_batch_norm_backward.default

# torch.nn.functional's default slope and alpha
LEAKY_RELU_SLOPE = 0.01
ELU_ALPHA = 1.0

ACTIVATION_BACKWARD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu": lambda g, z: aten.threshold_backward(g, z, 0),
    "relu6": lambda g, z: aten.hardtanh_backward(g, z, 0, 6),
    "leaky_relu": lambda g, z: aten.leaky_relu_backward(g, z, LEAKY_RELU_SLOPE, False),
    "elu": lambda g, z: aten.elu_backward(g, ELU_ALPHA, 1, 1, False, z),
    "silu": lambda g, z: aten.silu_backward(g, z),
    "gelu": lambda g, z: aten.gelu_backward(g, z),
    "mish": lambda g, z: aten.mish_backward(g, z),
    "sigmoid": lambda g, z: aten.sigmoid_backward(g, torch.sigmoid(z)),
    "tanh": lambda g, z: aten.tanh_backward(g, torch.tanh(z)),
    "hardswish": lambda g, z: aten.hardswish_backward(g, z),
}


def train_forward(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, batch mean, batch variance (divided by the count), and what the backward pass needs of them.

    The last is mean and 1 / sqrt(variance + eps) in float64, shape (2, C).
    """
    if input.numel() == 0:
        zeros = torch.zeros(input.shape[1], dtype=statistics_dtype(input), device=input.device)
        return torch.empty_like(input), zeros, zeros.clone(), torch.zeros_like(zeros.double().expand(2, -1))
    z, mean, var, invstd = train_natively(input, weight, bias, eps)
    return epilogue_(z, residual, activation), mean, var, torch.stack([mean.double(), invstd.double()])


def train_natively(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As :func:`train_forward`, for what ATen does in one operation, with its own autograd: no residual or activation.

    Through that autograd a call costs 24 us less than through an operator of ours.
    """
    dtype = statistics_dtype(input)
    # With momentum 1 the buffers receive the batch mean and the unbiased variance themselves. The variance
    # that could be recovered from 1 / sqrt(var + eps) loses its digits where var << eps.
    mean = torch.zeros(input.shape[1], dtype=dtype, device=input.device)
    var_unbiased = torch.zeros_like(mean)
    z, _, invstd = torch.native_batch_norm(
        input, parameter(weight, dtype), parameter(bias, dtype), mean, var_unbiased, True, 1.0, eps
    )
    count = values_per_channel(input)
    return z, mean, var_unbiased * ((count - 1) / count), invstd


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
    """Gradients of input, weight, bias and of the sum before the activation, which is the residual's."""
    dtype = statistics_dtype(input)
    mean, invstd = saved.to(dtype)
    if input.numel() == 0:
        return torch.empty_like(input), torch.zeros_like(mean), torch.zeros_like(mean), grad_output
    weight = parameter(weight, dtype)
    grad_z = grad_output
    if activation is not None:
        z = normalize_again(input, weight, parameter(bias, dtype), mean, invstd)
        if residual is not None:
            z.add_(residual)
        grad_z = ACTIVATION_BACKWARD[activation](grad_output, z)
    grads = native_backward(grad_z, input, weight, None, None, mean, invstd, True, eps, [True, True, True])
    return *grads, grad_z


def parameter(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else as_dtype(tensor, dtype)


def epilogue_(z: Tensor, residual: Tensor | None, activation: str | None) -> Tensor:
    """``activation(z + residual)``, overwriting z where that saves memory."""
    if residual is not None:
        z.add_(residual)
    return z if activation is None else ACTIVATIONS[activation](z)


def normalize_again(input: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, invstd: Tensor) -> Tensor:
    """The value before residual and activation, computed again from the input instead of kept."""
    scale = invstd if weight is None else invstd * weight
    z = (input - per_channel(mean, input)).mul_(per_channel(scale, input))
    return (z if bias is None else z.add_(per_channel(bias, input))).to(input.dtype)
