"""Which implementation serves a call."""

from typing import NamedTuple

import torch
from torch import Tensor

from batchnorm._ops import kernel
from batchnorm._ops.batch_norm import seen_through
from batchnorm.errors import ImplementationError


class Choice(NamedTuple):
    """Which implementation serves a call, and why."""

    implementation: str
    reason: str


REQUESTED = {name: Choice(name, f"implementation={name!r} was asked for") for name in ("kernel", "aten", "reference")}
SEEN_THROUGH = Choice("reference", "a compiler, an exporter or torch.func must see plain operations")
KERNEL = Choice("kernel", "one pass over the input, compiled for this processor")
EVALUATION_SEEN_THROUGH = Choice("aten", "torch.batch_norm is one operation that every compiler and exporter knows")
EMPTY = Choice("aten", "the input is empty")
NOT_PLAIN = Choice(
    "aten", "the input is a tensor subclass, has another layout than strided, or a dispatch mode is active"
)
IMPLEMENTATIONS = ("auto", *REQUESTED)


def choose(implementation: str, input: Tensor, training: bool) -> Choice:
    """Choose the implementation of a call. A request by name never falls back to another."""
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


def obstacle(input: Tensor) -> Choice | None:
    """What serves instead of the kernels where they cannot."""
    if not input.is_cpu:
        return Choice("aten", f"the kernels run on the cpu, and the input is on {input.device}")
    if input.dtype not in kernel.DTYPES:
        return Choice("aten", f"the kernels take float32, float64 and bfloat16, and the input is {input.dtype}")
    if (
        type(input) not in kernel.PLAIN_TYPES
        or torch._C._len_torch_dispatch_stack()
        or input.layout is not torch.strided
    ):
        return NOT_PLAIN
    if input.numel() == 0:
        return EMPTY
    failure = kernel.load()
    return None if failure is None else Choice("aten", failure)


def instead(choice: Choice, error: ImplementationError) -> Choice:
    """What serves after the kernels refused a call; one that asked for them by name gets the error."""
    if choice is not KERNEL:
        raise error
    return Choice("aten", str(error))


def check_implementation(implementation: str) -> str:
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"unknown implementation {implementation!r}: expected one of {', '.join(IMPLEMENTATIONS)}")
    return implementation
