"""The "kernel" implementation: our own kernels for the CPU, loaded at the first call that can use them.

Eager calls come from ``kernel_autograd.py``; the registered operators use ``train_forward`` and ``train_backward``.
"""

import math
import warnings
from functools import lru_cache
from struct import Struct
from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchnorm._ops import aten
from batchnorm._ops.dtypes import as_dtype, statistics_dtype
from batchnorm._ops.memory import empty_like
from batchnorm.errors import ImplementationError

DTYPES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16"}
# Their backward needs one bit per element instead of what went into them.
PIECEWISE = ("relu", "relu6", "leaky_relu")
# Their derivative is a function of the output, which the next layer keeps anyway.
BY_OUTPUT = ("sigmoid", "tanh")

# Which statistics normalize, in the words of the kernels' ``arguments.py``
BATCH, RUNNING = 0, 1

pack_forward = Struct("4q2d12q").pack
pack_backward = Struct("4q2d6q48x5q").pack

PLAIN_TYPES = (Tensor, torch.nn.Parameter)


class Kernels:
    """The loaded module, and why it serves no new calls; graphs that wait for their backward keep it."""

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
    """Serve no new call any more."""
    if Kernels.failure is not None:
        return
    Kernels.failure = f"the CPU kernels do not work here: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    warnings.warn(f"{Kernels.failure}; torch's own kernels serve instead", RuntimeWarning, stacklevel=2)


@lru_cache(maxsize=4096)
def kernel_and_plan(
    direction: str, shape: torch.Size, contiguous: bool, dtype: str, activation: str | None, residual: bool, mask: bool
) -> tuple[Any, Any]:
    """The kernel for a call, compiled before anything is written, and the plan for a dense tensor of this shape."""
    plan = plan_for(shape, contiguous)
    try:
        kernel = Kernels.launch.kernel(direction, plan.geometry.form, dtype, activation, residual, mask)
    except Exception as error:
        if not getattr(error, "only_here", False):
            give_up(error)
        raise ImplementationError(str(Kernels.failure or error)) from error
    return kernel, plan


def plan_for(shape: torch.Size, contiguous: bool) -> Any:
    if Kernels.launch is None:
        load()
    launch: Any = Kernels.launch
    if launch is None:
        raise ImplementationError(Kernels.failure)
    samples, channels, positions = shape[0], shape[1], math.prod(shape[2:])
    return launch.plan(samples, channels, positions, positions > 1 and not contiguous)


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def as_taken(input: Tensor, *per_channel: Tensor | None) -> list[Any]:
    """Per-channel tensors as the kernels take them: dense, all of the input's dtype or, beside bfloat16, of float32."""
    dtype = input.dtype
    if any(tensor is not None and tensor.dtype is not dtype for tensor in per_channel):
        dtype = statistics_dtype(input)
    return [None if tensor is None else as_dtype(tensor, dtype).contiguous() for tensor in per_channel]


def dtype_name(input: Tensor, *per_channel: Tensor | None) -> str:
    """The kernels' name for a call's dtypes."""
    if input.dtype is torch.bfloat16 and any(t is not None and t.dtype is torch.bfloat16 for t in per_channel):
        return "bfloat16_throughout"
    return DTYPES[input.dtype]


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
    """Output, saved statistics (2, C) and mask. Per-channel tensors are as ``as_taken`` returns them."""
    given, running_mean, running_var, momentum, counter, mean, var = statistics
    name = dtype_name(input, weight, bias, running_mean)
    kernel, plan = kernel_and_plan(
        "forward", input.shape, input.is_contiguous(), name, activation, residual is not None, masked
    )
    output = empty_like(input)
    saved = input.new_empty(2 * plan.geometry.channels, dtype=torch.float64)
    mask = input.new_empty(plan.geometry.mask_words, dtype=torch.int32) if masked else None
    fields = pack_forward(
        given == BATCH, 1, given, plan.values_per_channel, eps, momentum,
        input.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        0 if mask is None else mask.data_ptr(),
        0 if weight is None else weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        saved.data_ptr(),
        output.data_ptr(),
        0 if mean is None else mean.data_ptr(),
        0 if var is None else var.data_ptr(),
        0 if running_mean is None else running_mean.data_ptr(),
        0 if running_var is None else running_var.data_ptr(),
        0 if counter is None else counter.data_ptr(),
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
    """Gradients of input, weight, bias and of the sum before the activation; tensors as in :func:`forward`."""
    name = dtype_name(input, weight, bias)
    has_sum = activation is not None and (residual is not None or mask is not None)
    if output is not None:
        activation, residual = f"{activation}_by_output", output
    kernel, plan = kernel_and_plan(
        "backward", input.shape, input.is_contiguous(), name, activation, has_sum, mask is not None
    )
    grad_input = empty_like(input)
    grad_sum = empty_like(input) if has_sum else None
    per_channel = bias if weight is None else weight
    if per_channel is None:
        per_channel = input.new_empty(0, dtype=statistics_dtype(input))
    grad_weight = per_channel.new_empty(plan.geometry.channels)
    grad_bias = per_channel.new_empty(plan.geometry.channels)
    fields = pack_backward(
        1, needs_input, given, plan.values_per_channel, 0.0, 0.0,
        input.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        0 if mask is None else mask.data_ptr(),
        0 if weight is None else weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        saved.data_ptr(),
        grad_output.data_ptr(),
        grad_input.data_ptr(),
        0 if grad_sum is None else grad_sum.data_ptr(),
        grad_weight.data_ptr(),
        grad_bias.data_ptr(),
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
    mean = input.new_empty(input.shape[1], dtype=statistics_dtype(input))
    var = torch.empty_like(mean)
    statistics = Statistics(BATCH, mean=mean, var=var)
    weight, bias = as_taken(input, weight, bias)
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
    weight, bias = as_taken(input, weight, bias)
    grad_input, grad_weight, grad_bias, grad_sum = backward(
        grad_output, input, weight, bias, residual, saved, None, activation, BATCH, True
    )
    if grad_sum is None:
        grad_sum = grad_output
    dtype = statistics_dtype(input)
    return grad_input, as_dtype(grad_weight, dtype), as_dtype(grad_bias, dtype), grad_sum  # pyright: ignore[reportReturnType]


def backward_frozen(
    grad_output: Tensor, weight: Tensor | None, saved: Tensor, mask: Tensor | None, activation: str | None, apart: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients of input and of the sum, for given statistics, without the input."""
    name = dtype_name(grad_output, weight)
    kernel, plan = kernel_and_plan(
        "frozen", grad_output.shape, grad_output.is_contiguous(), name, activation, apart, mask is not None
    )
    grad_input = empty_like(grad_output)
    grad_sum = empty_like(grad_output) if apart else None
    fields = pack_backward(
        0, 1, RUNNING, plan.values_per_channel, 0.0, 0.0,
        0, 0, address(mask), address(weight), 0, saved.data_ptr(),
        grad_output.data_ptr(), grad_input.data_ptr(), address(grad_sum), 0, 0,
    )  # fmt: skip
    Kernels.launch.run(kernel, plan, fields)
    return grad_input, grad_sum
