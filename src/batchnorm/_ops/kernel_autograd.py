"""Eager calls of the kernels, and autograd around them: one kernel forward, one backward, nothing in between."""

from typing import Any

import torch
from torch import Tensor

from batchnorm._ops.aten import LEAKY_RELU_SLOPE
from batchnorm._ops.checks import check_not_differentiated, check_per_channel, check_training
from batchnorm._ops.double_backward import differentiable_gradients
from batchnorm._ops.dtypes import as_dtype, dense_format, statistics_dtype
from batchnorm._ops.kernel import (
    BATCH,
    BY_OUTPUT,
    PIECEWISE,
    RUNNING,
    Statistics,
    backward,
    backward_frozen,
    forward,
    plan_for,
    readable,
    resolved,
    running,
)
from batchnorm.errors import ImplementationError
from batchnorm.reference import per_channel


class KernelBatchNorm(torch.autograd.Function):
    """The eager way to the kernels, in training and with given statistics."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        eps: float,
        activation: str | None,
        statistics: Statistics,
    ) -> Tensor:
        _, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        given = statistics.given
        piecewise = activation in PIECEWISE
        frozen = given == RUNNING and not (needs_weight or needs_bias) and (activation is None or piecewise)
        masked = piecewise and (frozen or residual is not None)
        output, saved, mask = forward(input, weight, bias, residual, eps, activation, statistics, masked)
        ctx.set_materialize_grads(False)
        ctx.call = (eps, activation, given, residual is not None, output.stride())
        kept = None if activation is None or masked else residual
        result = output if activation in BY_OUTPUT and residual is None else None
        ctx.save_for_backward(None if frozen else input, weight, bias, kept, saved, mask, result)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if grad_output is None:
            return (None,) * 7
        input, weight, bias, residual, saved, mask, output = ctx.saved_tensors
        needs_input, needs_weight, needs_bias, needs_residual, *_ = ctx.needs_input_grad
        _, activation, given, has_residual, strides = ctx.call
        # is_grads_batched and vmap give gradients that have no memory of their own
        by_address = readable(grad_output) and torch._C._has_storage(grad_output)
        if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active() or not by_address:
            return *gradients_again(ctx, grad_output), None, None, None
        if grad_output.stride() != strides:
            grad_output = torch.empty_strided(
                grad_output.shape, strides, dtype=grad_output.dtype, device=grad_output.device
            ).copy_(grad_output)
        grad_weight = grad_bias = None
        try:
            if input is None:
                apart = has_residual and mask is not None
                grad_input, grad_sum = backward_frozen(grad_output, weight, saved, mask, activation, apart)
            else:
                grad_input, grad_weight, grad_bias, grad_sum = backward(
                    grad_output, input, weight, bias, residual, saved, mask, activation, given, needs_input, output
                )
                grad_weight = as_dtype(grad_weight, weight.dtype) if needs_weight else None
                grad_bias = as_dtype(grad_bias, bias.dtype) if needs_bias else None
        except ImplementationError:
            # the kernel of this backward pass cannot be compiled, or not here
            return *(None if g is None else g.detach() for g in gradients_again(ctx, grad_output)), None, None, None
        if not needs_residual:
            grad_sum = None
        elif grad_sum is None:
            grad_sum = grad_output
        return grad_input, grad_weight, grad_bias, grad_sum, None, None, None


def gradients_again(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of input, weight, bias and residual, to be differentiated again."""
    input, weight, bias, residual, saved, mask, _ = ctx.saved_tensors
    eps, activation, given, has_residual, strides = ctx.call
    if mask is not None:
        slope = LEAKY_RELU_SLOPE if activation == "leaky_relu" else 0.0
        passes = unpacked(mask, grad_output.shape, strides)
        grad_output = torch.where(passes, grad_output, grad_output * slope)
        activation = None
    mean, invstd = saved.view(2, -1)
    if input is None:
        scale = invstd.to(statistics_dtype(grad_output))
        scale = per_channel(scale if weight is None else scale * weight, grad_output)
        return (grad_output * scale).to(grad_output.dtype), None, None, grad_output if has_residual else None
    *grads, grad_sum = differentiable_gradients(
        grad_output, input, weight, bias, residual, eps, activation, ctx.needs_input_grad[:3],
        None if given == BATCH else (mean, invstd),
    )  # fmt: skip
    return *grads, grad_sum if has_residual else None


def unpacked(mask: Tensor, shape: torch.Size, strides: tuple[int, ...]) -> Tensor:
    """The bits of the mask of a tensor of this shape and strides, as a boolean tensor of both."""
    geometry = plan_for(torch.empty_strided(shape, strides, device="meta")).geometry
    bits = (mask.view(-1, 1) >> torch.arange(32, dtype=torch.int32)) & 1
    pieces = bits.view(geometry.rows, geometry.units, geometry.segments, -1)[..., : geometry.segment]
    strips = pieces.reshape(geometry.rows, geometry.units, -1)[..., : geometry.width]
    dense = strips.reshape(geometry.rows, -1)[:, : geometry.columns].contiguous()
    return dense.view(-1)[: geometry.elements].bool().as_strided(shape, strides)


def batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str | None,
    statistics: Statistics,
) -> Tensor:
    """Normalize, by the batch or by the running statistics, through the kernels. The arguments have been checked."""
    if not readable(input, weight, bias, residual, statistics.running_mean, statistics.running_var):
        input, weight, bias, residual = resolved(input), resolved(weight), resolved(bias), resolved(residual)  # pyright: ignore[reportAssignmentType]
        if not readable(statistics.running_mean, statistics.running_var):
            raise ImplementationError("running statistics that are a tensor subclass or a negated view")
    if not input.is_contiguous():
        input = input.contiguous(memory_format=dense_format(input) or torch.contiguous_format)
    if residual is not None and residual.stride() != input.stride():
        residual = torch.empty_like(input).copy_(residual)
    if torch.is_grad_enabled() and (
        input.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    ):
        return KernelBatchNorm.apply(input, weight, bias, residual, eps, activation, statistics)  # pyright: ignore[reportReturnType]
    return forward(input, weight, bias, residual, eps, activation, statistics, False)[0]


def train(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float | Tensor,
    num_batches_tracked: Tensor | None,
) -> Tensor:
    """The eager kernel: normalizes and moves running statistics and counter in one call."""
    check_training(input, eps)
    check_per_channel(input, running_mean=running_mean, running_var=running_var, weight=weight, bias=bias)
    counter = num_batches_tracked
    if counter is not None and not (counter.dtype is torch.int64 and counter.is_cpu and readable(counter)):
        counter = None
    if running_mean is None or running_var is None or (not isinstance(momentum, Tensor) and momentum == 0):
        statistics = Statistics(BATCH, counter=counter)
        output = batch_norm(input, weight, bias, residual, eps, activation, statistics)
        written = []
    else:
        check_not_differentiated(running_mean, running_var)
        mean, var = running(running_mean, input), running(running_var, input)
        statistics = Statistics(BATCH, mean, var, float(momentum), counter)
        output = batch_norm(input, weight, bias, residual, eps, activation, statistics)
        if mean is not running_mean:
            running_mean.copy_(mean)
        if var is not running_var:
            running_var.copy_(var)
        written = [running_mean, running_var]
    if counter is not None:
        written.append(counter)
    elif num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    torch.autograd.graph.increment_version(written)
    return output
