"""The "kernel" implementation: our own kernels for the CPU, loaded at the first call that can use them.

Eager calls come from ``kernel_autograd.py``; the registered operators use ``train_forward`` and ``train_backward``.
"""

import warnings
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


def compiled(direction: str, form: str, dtype: str, activation: str | None, residual: bool, mask: bool) -> Any:
    """A kernel, compiled before anything is written."""
    try:
        return Kernels.launch.kernel(direction, form, dtype, activation, residual, mask)
    except Exception as error:
        if not getattr(error, "only_here", False):
            give_up(error)
        raise ImplementationError(str(Kernels.failure or error)) from error


def plan_for(input: Tensor) -> Any:
    if Kernels.launch is None:
        load()
    launch: Any = Kernels.launch
    if launch is None:
        raise ImplementationError(Kernels.failure)
    shape = input.shape
    samples, channels = shape[0], shape[1]
    positions = input.numel() // (samples * channels)
    return launch.plan(samples, channels, positions, positions > 1 and not input.is_contiguous())


def readable(*tensors: Tensor | None) -> bool:
    """Whether a kernel may read and write these by their addresses: no subclass, and no negation that is pending."""
    return all(t is None or (type(t) in PLAIN_TYPES and not t.is_neg()) for t in tensors)


def resolved(tensor: Tensor | None) -> Tensor | None:
    """The same values as a kernel can read them."""
    if tensor is None or readable(tensor):
        return tensor
    if type(tensor) not in PLAIN_TYPES:
        raise ImplementationError(f"the kernels take plain tensors, not {type(tensor).__name__}")
    return tensor.resolve_neg()


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
