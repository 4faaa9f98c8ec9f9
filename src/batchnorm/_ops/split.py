"""The kernels in two halves, for statistics that replicas share: what one computes, all must know before it applies.

    forward     mean, var = batch_statistics(input)         of every replica; combine them
                output = normalize(input, saved, ...)       with the combined mean and 1 / sqrt(var + eps)
    backward    sums, ... = gradient_sums(...)              of every replica; add them
                grad_input = apply_gradient(..., sums, count)

``count`` is the number of values per channel of all replicas together. Tensors are dense and on the CPU.
"""

import torch
from torch import Tensor

from batchnorm._ops.dtypes import statistics_dtype
from batchnorm._ops.kernel import (
    BATCH,
    DTYPES,
    Kernels,
    address,
    compiled,
    pack_backward,
    pack_forward,
    parameter,
    plan_for,
)

# as in the kernels' ``arguments.py``
SAVED_BEFORE = 2


def batch_statistics(input: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (float64) and variance (divided by the count, in the dtype of the statistics) of each channel."""
    plan = plan_for(input)
    kernel = compiled("forward", plan.geometry.form, DTYPES[input.dtype], None, False, False)
    saved = torch.empty(2, plan.geometry.channels, dtype=torch.float64)
    mean, var = torch.empty(2, plan.geometry.channels, dtype=statistics_dtype(input))
    fields = pack_forward(
        1, 0, BATCH, plan.values_per_channel, 1.0, 0.0,
        input.data_ptr(), 0, 0, 0, 0, saved.data_ptr(), 0, mean.data_ptr(), var.data_ptr(), 0, 0, 0,
    )  # fmt: skip
    Kernels.launch.run(kernel, plan, fields)
    return saved[0], var


def normalize(
    input: Tensor,
    saved: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
) -> Tensor:
    """Output for ``saved``: mean and 1 / sqrt(var + eps), float64 (2, C)."""
    plan = plan_for(input)
    kernel = compiled("forward", plan.geometry.form, DTYPES[input.dtype], activation, residual is not None, False)
    dtype = statistics_dtype(input)
    weight, bias = parameter(weight, dtype), parameter(bias, dtype)
    output = torch.empty_like(input)
    fields = pack_forward(
        0, 1, SAVED_BEFORE, plan.values_per_channel, 0.0, 0.0,
        input.data_ptr(), address(residual), 0, address(weight), address(bias), saved.data_ptr(),
        output.data_ptr(), 0, 0, 0, 0, 0,
    )  # fmt: skip
    Kernels.launch.run(kernel, plan, fields)
    return output


def gradient_sums(
    grad_output: Tensor,
    input: Tensor,
    saved: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums (2, C) in float64, gradients of weight and bias, and the gradient before residual and activation."""
    plan = plan_for(input)
    has_sum = activation is not None
    # the sum before the activation is stored where there is a residual; without one, a zero stands for it
    if has_sum and residual is None:
        residual = torch.zeros_like(input)
    kernel = compiled("backward", plan.geometry.form, DTYPES[input.dtype], activation, has_sum, False)
    dtype = statistics_dtype(input)
    weight, bias = parameter(weight, dtype), parameter(bias, dtype)
    sums = torch.empty(2, plan.geometry.channels, dtype=torch.float64)
    grad_weight, grad_bias = torch.empty(2, plan.geometry.channels, dtype=dtype)
    grad_sum = torch.empty_like(input) if has_sum else grad_output
    fields = pack_backward(
        1, 0, BATCH, plan.values_per_channel, 0.0, 0.0,
        input.data_ptr(), address(residual), 0, address(weight), address(bias), saved.data_ptr(),
        grad_output.data_ptr(), 0, grad_sum.data_ptr(), grad_weight.data_ptr(), grad_bias.data_ptr(),
    )  # fmt: skip
    Kernels.launch.run(kernel, plan, fields, sums.data_ptr())
    return sums, grad_weight, grad_bias, grad_sum


def apply_gradient(
    grad_sum: Tensor, input: Tensor, saved: Tensor, weight: Tensor | None, sums: Tensor, count: int
) -> Tensor:
    """Gradient of the input, from that before residual and activation and the sums of all replicas."""
    plan = plan_for(input)
    kernel = compiled("backward", plan.geometry.form, DTYPES[input.dtype], None, False, False)
    weight = parameter(weight, statistics_dtype(input))
    grad_input = torch.empty_like(input)
    fields = pack_backward(
        0, 1, BATCH, count, 0.0, 0.0,
        input.data_ptr(), 0, 0, address(weight), 0, saved.data_ptr(),
        grad_sum.data_ptr(), grad_input.data_ptr(), 0, 0, 0,
    )  # fmt: skip
    Kernels.launch.run(kernel, plan, fields, sums.data_ptr())
    return grad_input
