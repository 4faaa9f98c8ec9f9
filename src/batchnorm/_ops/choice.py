"""Which implementation serves a call."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active as are_transforms_active
from torch._C import _get_tracing_state as tracing_state
from torch._C import _has_storage as has_storage
from torch._C import _len_torch_dispatch_stack as number_of_dispatch_modes
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from batchnorm._ops import kernel
from batchnorm._ops.batch_norm import seen_through
from batchnorm._ops.checks import check_input
from batchnorm._ops.kernel import DTYPES, PLAIN_TYPES, Kernels
from batchnorm.errors import ImplementationError
from batchnorm.reference import ACTIVATIONS


class Choice(NamedTuple):
    """Which implementation serves a call, and why."""

    implementation: str
    reason: str


REQUESTED = {name: Choice(name, f"implementation={name!r} was asked for") for name in ("kernel", "aten", "reference")}
SEEN_THROUGH = Choice("reference", "a compiler, an exporter or torch.func must see plain operations")
KERNEL = Choice("kernel", "one pass over the input, compiled for this processor")
# the same for tensors that were found to be in order
READY = Choice(*KERNEL)
EVALUATION_SEEN_THROUGH = Choice("aten", "torch.batch_norm is one operation that every compiler and exporter knows")
EMPTY = Choice("aten", "the input is empty")
NOT_PLAIN = Choice(
    "aten", "the input is a tensor subclass, has another layout than strided, or a dispatch mode is active"
)
IMPLEMENTATIONS = ("auto", *REQUESTED)


def choose(
    implementation: str,
    input: Tensor,
    training: bool,
    residual: Tensor | None = None,
    activation: str | None = None,
    *per_channel: Tensor | None,
) -> Choice:
    """Check the input and what it is used with, and choose. A request by name never falls back to another.

    All but :data:`READY` leaves the per-channel tensors to be checked.
    """
    if implementation == "auto" and ready(input, residual, activation, *per_channel):
        return READY
    check_input(input, residual, activation)
    if implementation == "auto":
        if seen_through():
            return SEEN_THROUGH if training else EVALUATION_SEEN_THROUGH
        return obstacle(input) or KERNEL
    choice = REQUESTED[check_implementation(implementation)]
    if implementation == "kernel":
        found = obstacle(input)
        if found is not None and found is not EMPTY:
            raise ImplementationError(f"implementation='kernel' cannot serve this call: {found.reason}")
    return choice


def ready(input: Tensor, residual: Tensor | None, activation: str | None, *per_channel: Tensor | None) -> bool:
    """Whether a kernel can serve this call with these tensors as they are, as it almost always can.

    Where it says no, the longer way finds out what is wrong, what must be converted and what serves instead.
    """
    if (
        is_compiling()
        or type(input) not in PLAIN_TYPES
        or not input.is_cpu
        or Kernels.launch is None
        or Kernels.failure is not None
        or input.dtype not in DTYPES
        or input.layout is not torch.strided
        or are_transforms_active()
        or tracing_state() is not None
        or number_of_dispatch_modes()
        or forward_ad._current_level >= 0
        or input.numel() == 0
        or input.is_neg()
        or not has_storage(input)
        or (activation is not None and activation not in ACTIVATIONS)
    ):
        return False
    shape = input.shape
    if len(shape) < 2:
        return False
    dtype, size = input.dtype, shape[1:2]
    if residual is not None and not (
        type(residual) in PLAIN_TYPES
        and residual.shape == shape
        and residual.dtype is dtype
        and residual.is_cpu
        and residual.layout is torch.strided
        and not residual.is_neg()
    ):
        return False
    for tensor in per_channel:
        if tensor is not None and not (
            type(tensor) in PLAIN_TYPES
            and tensor.dtype is dtype
            and tensor.shape == size
            and tensor.is_cpu
            and tensor.is_contiguous()
            and not tensor.is_neg()
        ):
            return False
    return True


def obstacle(input: Tensor) -> Choice | None:
    """What serves instead of the kernels where they cannot."""
    if not input.is_cpu:
        return Choice("aten", f"the kernels run on the cpu, and the input is on {input.device}")
    if input.dtype not in DTYPES:
        return Choice("aten", f"the kernels take float32, float64 and bfloat16, and the input is {input.dtype}")
    if type(input) not in PLAIN_TYPES or number_of_dispatch_modes() or input.layout is not torch.strided:
        return NOT_PLAIN
    if input.numel() == 0:
        return EMPTY
    failure = kernel.load()
    return None if failure is None else Choice("aten", failure)


def instead(choice: Choice, error: ImplementationError) -> Choice:
    """What serves after the kernels refused a call; one that asked for them by name gets the error."""
    if choice != KERNEL:
        raise error
    return Choice("aten", str(error))


def check_implementation(implementation: str) -> str:
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"unknown implementation {implementation!r}: expected one of {', '.join(IMPLEMENTATIONS)}")
    return implementation
