"""Eager calls of the kernels, and autograd around them: one kernel forward, one backward, nothing in between."""

from typing import Any

import torch
from torch import Tensor
from torch._C import _increment_version as increment_version

from batchnorm._ops.aten import LEAKY_RELU_SLOPE
from batchnorm._ops.checks import check_not_differentiated, check_per_channel, check_training
from batchnorm._ops.double_backward import differentiable_gradients
from batchnorm._ops.dtypes import dense_format, statistics_dtype
from batchnorm._ops.kernel import (
    BATCH,
    BY_OUTPUT,
    PIECEWISE,
    PLAIN_TYPES,
    RUNNING,
    Statistics,
    as_taken,
    backward,
    backward_frozen,
    forward,
    plan_for,
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
        given = statistics.given
        piecewise = activation in PIECEWISE
        frozen = given == RUNNING and not any(ctx.needs_input_grad[1:3]) and (activation is None or piecewise)
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
        by_address = type(grad_output) is Tensor and not grad_output.is_neg() and torch._C._has_storage(grad_output)
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
                if not needs_weight:
                    grad_weight = None
                if not needs_bias:
                    grad_bias = None
        except ImplementationError:
            # the kernel of this backward pass cannot be compiled, or not here
            return *(None if g is None else g.detach() for g in gradients_again(ctx, grad_output)), None, None, None
        if not needs_residual:
            grad_sum = None
        elif grad_sum is None:
            grad_sum = grad_output
        return grad_input, grad_weight, grad_bias, grad_sum, None, None, None


# Function.apply and the node's apply without what other Functions need: torch.func, vjp, boxed gradients. For a small
# input that is 2 us of 40.
apply: Any = super(torch.autograd.Function, KernelBatchNorm).apply  # pyright: ignore[reportAttributeAccessIssue]
KernelBatchNorm._backward_cls.apply = KernelBatchNorm.backward  # pyright: ignore[reportAttributeAccessIssue]


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
    geometry = plan_for(shape, torch.empty_strided(shape, strides, device="meta").is_contiguous()).geometry
    bits = (mask.view(-1, 1) >> torch.arange(32, dtype=torch.int32)) & 1
    pieces = bits.view(geometry.rows, geometry.units, geometry.segments, -1)[..., : geometry.segment]
    strips = pieces.reshape(geometry.rows, geometry.units, -1)[..., : geometry.width]
    dense = strips.reshape(geometry.rows, -1)[:, : geometry.columns].contiguous()
    return dense.view(-1)[: geometry.elements].bool().as_strided(shape, strides)


def made_ready(input: Tensor, residual: Tensor | None, *per_channel: Tensor | None) -> tuple[Any, Any, list[Any]]:
    """The same values as a kernel can read them, of arguments that were checked."""
    tensors = (input, residual, *per_channel)
    for tensor in tensors:
        if tensor is not None and type(tensor) not in PLAIN_TYPES:
            raise ImplementationError(f"the kernels take plain tensors, not {type(tensor).__name__}")
        if tensor is not None and not torch._C._has_storage(tensor):
            raise ImplementationError("the kernels take tensors with memory of their own")
    input, residual, *rest = (None if tensor is None else tensor.resolve_neg() for tensor in tensors)  # pyright: ignore[reportAssignmentType]
    return input, residual, as_taken(input, *rest)


def batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str | None,
    statistics: Statistics,
) -> Tensor:
    """Normalize, by the batch or by the running statistics, through the kernels. All tensors are ready."""
    input, residual = dense(input, residual)
    if torch.is_grad_enabled() and (
        input.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    ):
        return apply(input, weight, bias, residual, eps, activation, statistics)
    return forward(input, weight, bias, residual, eps, activation, statistics, False)[0]


def dense(input: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Without gaps, and of the same strides."""
    if not input.is_contiguous():
        input = input.contiguous(memory_format=dense_format(input) or torch.contiguous_format)
    if residual is not None and residual.stride() != input.stride():
        residual = torch.empty_like(input).copy_(residual)
    return input, residual


def measure(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalize without a gradient; also the batch's mean, in float64, and biased variance. All tensors are ready."""
    check_training(input, eps)
    input, residual = dense(input, residual)
    var = input.new_empty(input.shape[1], dtype=statistics_dtype(input))
    statistics = Statistics(BATCH, mean=torch.empty_like(var), var=var)
    output, saved, _ = forward(input, weight, bias, residual, eps, activation, statistics, False)
    return output, saved[: len(var)], var


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
    """Normalize, and move running statistics and counter in the same call. All tensors are ready."""
    check_training(input, eps)
    counter = num_batches_tracked
    if counter is not None and not (counter.dtype is torch.int64 and counter.is_cpu and type(counter) in PLAIN_TYPES):
        counter = None
    if running_mean is None or running_var is None or (momentum.__class__ is not Tensor and momentum == 0):
        statistics = Statistics(BATCH, counter=counter)
        written = () if counter is None else (counter,)
    else:
        check_not_differentiated(running_mean, running_var)
        statistics = Statistics(BATCH, running_mean, running_var, float(momentum), counter)
        written = (running_mean, running_var) if counter is None else (running_mean, running_var, counter)
    output = batch_norm(input, weight, bias, residual, eps, activation, statistics)
    if counter is not num_batches_tracked:
        num_batches_tracked.add_(1)  # pyright: ignore[reportOptionalMemberAccess]
    increment_version(written)
    return output


def train_checked(
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
    """As :func:`train`, of tensors that are not ready. The input and the residual have been checked."""
    check_training(input, eps)
    check_per_channel(input, running_mean=running_mean, running_var=running_var, weight=weight, bias=bias)
    input, residual, (weight, bias, mean, var) = made_ready(input, residual, weight, bias, running_mean, running_var)
    output = train(input, weight, bias, residual, eps, activation, mean, var, momentum, num_batches_tracked)
    if running_mean is not None and running_var is not None and momentum != 0:
        if mean is not running_mean:
            running_mean.copy_(mean)
        if var is not running_var:
            running_var.copy_(var)
    return output
