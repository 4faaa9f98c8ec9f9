"""The "kernel" implementation: our own kernels for the CPU, loaded at the first call that can use them.

Eager calls go through :class:`KernelBatchNorm`: one kernel forward, one backward, and nothing between them and Python.
The registered operators reach the same kernels by ``train_forward`` and ``train_backward``.
"""

import warnings
from struct import Struct
from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchnorm._ops import aten
from batchnorm._ops.double_backward import differentiable_gradients
from batchnorm._ops.dtypes import as_dtype, dense_format, statistics_dtype
from batchnorm._ops.memory import empty_like
from batchnorm.errors import ImplementationError
from batchnorm.reference import per_channel

DTYPES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16"}
# Their backward needs one bit per element instead of what went into them.
PIECEWISE = ("relu", "relu6", "leaky_relu")
LEAKY_RELU_SLOPE = 0.01
# Their derivative is a function of the output, which the next layer keeps anyway.
BY_OUTPUT = ("sigmoid", "tanh")

# Which statistics normalize, in the words of the kernels' ``arguments.py``
BATCH, RUNNING = 0, 1

pack_forward = Struct("4q2d12q").pack
pack_backward = Struct("4q2d6q48x5q").pack


class Kernels:
    """The loaded module, or why there is none."""

    launch: Any = None
    failure: str | None = None


def load() -> str | None:
    """Import the kernels; returns why that failed. What is installed but broken warns, once."""
    if Kernels.launch is None and Kernels.failure is None:
        try:
            from batchnorm._kernels.cpu import launch
        except Exception as error:
            give_up(error)
        else:
            Kernels.launch = launch
    return Kernels.failure


def give_up(error: Exception) -> None:
    """Serve no call any more."""
    Kernels.launch = None
    Kernels.failure = f"the CPU kernels do not work here: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    warnings.warn(f"{Kernels.failure}; torch's own kernels serve instead", RuntimeWarning, stacklevel=2)


def compiled(direction: str, form: str, dtype: str, activation: str | None, residual: bool, mask: bool) -> Any:
    """A kernel, compiled before anything is written."""
    if load() is not None:
        raise ImplementationError(Kernels.failure)
    try:
        return Kernels.launch.kernel(direction, form, dtype, activation, residual, mask)
    except Exception as error:
        give_up(error)
        raise ImplementationError(Kernels.failure) from error


def plan_for(input: Tensor) -> Any:
    if load() is not None:
        raise ImplementationError(Kernels.failure)
    shape = input.shape
    samples, channels = shape[0], shape[1]
    positions = input.numel() // (samples * channels)
    return Kernels.launch.plan(samples, channels, positions, positions > 1 and not input.is_contiguous())


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def parameter(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A per-channel tensor as a kernel reads it."""
    return None if tensor is None else as_dtype(tensor, dtype).contiguous()


def running(tensor: Tensor, input: Tensor) -> Tensor:
    """Running statistics as a kernel reads and writes them; the tensor itself where that is possible."""
    return as_dtype(tensor, statistics_dtype(input)).contiguous()


class Statistics(NamedTuple):
    """Which statistics normalize, and what becomes of them."""

    given: int
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    momentum: float = 0.0
    counter: Tensor | None = None  # num_batches_tracked, int64
    mean: Tensor | None = None  # filled with the batch's
    var: Tensor | None = None


def forward(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str | None,
    statistics: Statistics,
    masked: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Output, saved statistics (2, C) and mask."""
    plan = plan_for(input)
    geometry = plan.geometry
    given, running_mean, running_var, momentum, counter, mean, var = statistics
    dtype = statistics_dtype(input)
    kernel = compiled("forward", geometry.form, DTYPES[input.dtype], activation, residual is not None, masked)
    output = empty_like(input)
    saved = torch.empty(2 * geometry.channels, dtype=torch.float64)
    mask = torch.empty(geometry.mask_words, dtype=torch.int32) if masked else None
    weight, bias = parameter(weight, dtype), parameter(bias, dtype)
    fields = pack_forward(
        given == BATCH, 1, given, plan.values_per_channel, eps, momentum,
        input.data_ptr(), address(residual), address(mask), address(weight), address(bias), saved.data_ptr(),
        output.data_ptr(), address(mean), address(var), address(running_mean), address(running_var), address(counter),
    )  # fmt: skip
    Kernels.launch.run(kernel, plan, fields)
    return output, saved, mask


def backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    saved: Tensor,
    mask: Tensor | None,
    activation: str | None,
    given: int,
    needs_input: bool,
    output: Tensor | None = None,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:
    """Gradients of input, weight, bias and of the sum before the activation."""
    plan = plan_for(input)
    geometry = plan.geometry
    dtype = statistics_dtype(input)
    has_sum = activation is not None and (residual is not None or mask is not None)
    if output is not None:
        activation, residual = f"{activation}_by_output", output
    kernel = compiled("backward", geometry.form, DTYPES[input.dtype], activation, has_sum, mask is not None)
    weight, bias = parameter(weight, dtype), parameter(bias, dtype)
    grad_input = empty_like(input)
    grad_sum = empty_like(input) if has_sum else None
    grad_weight = torch.empty(geometry.channels, dtype=dtype)
    grad_bias = torch.empty(geometry.channels, dtype=dtype)
    fields = pack_backward(
        1, needs_input, given, plan.values_per_channel, 0.0, 0.0,
        input.data_ptr(), address(residual), address(mask), address(weight), address(bias), saved.data_ptr(),
        grad_output.data_ptr(), grad_input.data_ptr(), address(grad_sum), grad_weight.data_ptr(), grad_bias.data_ptr(),
    )  # fmt: skip
    Kernels.launch.run(kernel, plan, fields)
    return grad_input if needs_input else None, grad_weight, grad_bias, grad_sum


def train_forward(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As ``aten.train_forward``, for the operator."""
    if input.numel() == 0:
        return aten.train_forward(input, weight, bias, residual, eps, activation)
    mean = torch.empty(input.shape[1], dtype=statistics_dtype(input))
    var = torch.empty_like(mean)
    statistics = Statistics(BATCH, mean=mean, var=var)
    output, saved, _ = forward(input, weight, bias, residual, eps, activation, statistics, False)
    return output, mean, var, saved.view(2, -1)


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
    """As ``aten.train_backward``, for the operator."""
    if input.numel() == 0:
        return aten.train_backward(grad_output, input, weight, bias, residual, saved, eps, activation)
    grad_input, grad_weight, grad_bias, grad_sum = backward(
        grad_output, input, weight, bias, residual, saved, None, activation, BATCH, True
    )
    return grad_input, grad_weight, grad_bias, grad_output if grad_sum is None else grad_sum  # pyright: ignore[reportReturnType]


def backward_frozen(
    grad_output: Tensor, weight: Tensor | None, saved: Tensor, mask: Tensor | None, activation: str | None, apart: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients of input and of the sum, for given statistics, without the input."""
    plan = plan_for(grad_output)
    geometry = plan.geometry
    kernel = compiled("frozen", geometry.form, DTYPES[grad_output.dtype], activation, apart, mask is not None)
    weight = parameter(weight, statistics_dtype(grad_output))
    grad_input = empty_like(grad_output)
    grad_sum = empty_like(grad_output) if apart else None
    fields = pack_backward(
        0, 1, RUNNING, plan.values_per_channel, 0.0, 0.0,
        0, 0, address(mask), address(weight), 0, saved.data_ptr(),
        grad_output.data_ptr(), grad_input.data_ptr(), address(grad_sum), 0, 0,
    )  # fmt: skip
    Kernels.launch.run(kernel, plan, fields)
    return grad_input, grad_sum


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
        if grad_output.stride() != strides:
            grad_output = torch.empty_strided(
                grad_output.shape, strides, dtype=grad_output.dtype, device=grad_output.device
            ).copy_(grad_output)
        if torch.is_grad_enabled():
            return *gradients_again(ctx, grad_output), None, None, None
        grad_weight = grad_bias = None
        if input is None:
            apart = has_residual and mask is not None
            grad_input, grad_sum = backward_frozen(grad_output, weight, saved, mask, activation, apart)
        else:
            grad_input, grad_weight, grad_bias, grad_sum = backward(
                grad_output, input, weight, bias, residual, saved, mask, activation, given, needs_input, output
            )
            grad_weight = as_dtype(grad_weight, weight.dtype) if needs_weight else None
            grad_bias = as_dtype(grad_bias, bias.dtype) if needs_bias else None
        if not needs_residual:
            grad_sum = None
        elif grad_sum is None:
            grad_sum = grad_output
        return grad_input, grad_weight, grad_bias, grad_sum, None, None, None


def gradients_again(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of input, weight, bias and residual, to be differentiated again."""
    input, weight, bias, residual, saved, mask, _ = ctx.saved_tensors
    eps, activation, given, has_residual, _ = ctx.call
    if mask is not None:
        slope = LEAKY_RELU_SLOPE if activation == "leaky_relu" else 0.0
        grad_output = torch.where(unpacked(mask, grad_output), grad_output, grad_output * slope)
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


def unpacked(mask: Tensor, like: Tensor) -> Tensor:
    """The bits of a mask as a boolean tensor of the shape and strides of ``like``."""
    geometry = plan_for(like).geometry
    bits = (mask.view(-1, 1) >> torch.arange(32, dtype=torch.int32)) & 1
    pieces = bits.view(geometry.rows, geometry.units, geometry.segments, -1)[..., : geometry.segment]
    strips = pieces.reshape(geometry.rows, geometry.units, -1)[..., : geometry.width]
    dense = strips.reshape(geometry.rows, -1)[:, : geometry.columns].contiguous()
    return dense.view(-1).bool().as_strided(like.shape, like.stride())


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
