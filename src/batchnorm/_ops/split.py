"""The kernels in two halves, for statistics that replicas share: what one computes, all must know before it applies.

    forward     mean, var = batch_statistics(input)         of every replica; combine them
                output = normalize(input, saved, ...)       with the combined mean and 1 / sqrt(var + eps)
    backward    sums, ... = gradient_sums(...)              of every replica; add them
                grad_input = apply_gradient(..., sums, count)

``count`` is the number of values per channel of all replicas together. Tensors are dense and on the CPU.
"""

from typing import Any

import torch
from torch import Tensor

from batchnorm._ops.dtypes import statistics_dtype
from batchnorm._ops.kernel import (
    BATCH,
    Kernels,
    address,
    as_taken,
    dtype_name,
    kernel_and_plan,
    pack_backward,
    pack_forward,
)

# as in the kernels' ``arguments.py``
SAVED_BEFORE = 2


def kernel_for(
    direction: str, input: Tensor, activation: str | None, residual: bool, *per_channel: Tensor | None
) -> tuple[Any, Any]:
    name = dtype_name(input, *per_channel)
    return kernel_and_plan(direction, input.shape, input.is_contiguous(), name, activation, residual, False)


def batch_statistics(input: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (float64) and variance (divided by the count, in the dtype of the statistics) of each channel."""
    kernel, plan = kernel_for("forward", input, None, False)
    saved = input.new_empty((2, plan.geometry.channels), dtype=torch.float64)
    mean, var = input.new_empty((2, plan.geometry.channels), dtype=statistics_dtype(input))
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
    weight, bias = as_taken(input, weight, bias)
    kernel, plan = kernel_for("forward", input, activation, residual is not None, weight, bias)
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
    has_sum = activation is not None
    # the sum before the activation is stored where there is a residual; without one, a zero stands for it
    if has_sum and residual is None:
        residual = torch.zeros_like(input)
    weight, bias = as_taken(input, weight, bias)
    dtype = statistics_dtype(input) if weight is None else weight.dtype
    kernel, plan = kernel_for("backward", input, activation, has_sum, weight, bias)
    sums = input.new_empty((2, plan.geometry.channels), dtype=torch.float64)
    grad_weight, grad_bias = input.new_empty((2, plan.geometry.channels), dtype=dtype)
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
    (weight,) = as_taken(input, weight)
    kernel, plan = kernel_for("backward", input, None, False, weight)
    grad_input = torch.empty_like(input)
    fields = pack_backward(
        0, 1, BATCH, count, 0.0, 0.0,
        input.data_ptr(), 0, 0, address(weight), 0, saved.data_ptr(),
        grad_sum.data_ptr(), grad_input.data_ptr(), 0, 0, 0,
    )  # fmt: skip
    Kernels.launch.run(kernel, plan, fields, sums.data_ptr())
    return grad_input
