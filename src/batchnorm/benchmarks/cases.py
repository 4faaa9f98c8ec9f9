"""What is measured: shapes of batch normalization by where they occur, and the bytes that each must move."""

import fnmatch
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

FORWARD, BOTH, EVALUATION = "forward", "forward+backward", "evaluation"
"""The passes: training mode without and with backward; evaluation mode, which has no gradient here."""
PASSES = (FORWARD, BOTH, EVALUATION)
MEMORY_FORMATS = {
    "contiguous": torch.contiguous_format,
    "channels_last": torch.channels_last,
    "channels_last_3d": torch.channels_last_3d,
}
# A tensor that no last-level cache of today's desktops and small servers holds together with the four others
LARGE_BYTES = 32 * 2**20
# Their derivative depends only on where z lies, which takes a bit or two per element to keep
PIECEWISE_LINEAR: dict[str, tuple[float, ...]] = {"relu": (0.0,), "relu6": (0.0, 6.0), "leaky_relu": (0.0,)}
"""Activations made of straight lines, and where they bend."""
BENDS = {**PIECEWISE_LINEAR, "hardswish": (-3.0, 3.0), "elu": (0.0,)}


@dataclass(frozen=True)
class Case:
    """One call of a layer: ``act(bn(input) + residual)``.

    Attributes:
        where: the network or the group it comes from.
        shape: of the input, (N, C, *).
        activation: a name that the layers know, or None.
        residual: whether there is one.
        dtype: of the input and the parameters, a name in torch.
        memory_format: "contiguous", "channels_last" or "channels_last_3d".
        passes: which of :data:`PASSES` are timed.
        quick: whether it belongs to the quick suite too.
    """

    where: str
    shape: tuple[int, ...]
    activation: str | None = "relu"
    residual: bool = False
    dtype: str = "float32"
    memory_format: str = "contiguous"
    passes: tuple[str, ...] = (BOTH,)
    quick: bool = False

    @property
    def name(self) -> str:
        """Unique in a suite.

        Example:
            >>> Case("ResNet-50", (24, 64, 112, 112), residual=True).name
            'ResNet-50 24x64x112x112 bn+add+relu float32 contiguous'
        """
        parts = ["bn", *(["add"] if self.residual else []), *([self.activation] if self.activation else [])]
        return f"{self.where} {'x'.join(map(str, self.shape))} {'+'.join(parts)} {self.dtype} {self.memory_format}"

    @property
    def tensor_bytes(self) -> int:
        """Size of the input, and of every other tensor of full size."""
        return math.prod(self.shape) * getattr(torch, self.dtype).itemsize


def tensors_moved(case: Case, pass_: str) -> int:
    r"""How many tensors of full size a pass must read or write at least, if each channel were read once and cached.

    ========================  =====  ===============  ==========================================
    what                      alone  with a residual  which
    ========================  =====  ===============  ==========================================
    forward, evaluation       2      3                read x (and r), write y
    backward                  3      3                read x and dy, write dx; dr is dy itself
    backward with activation  3      4                and write dr = act'(z) dy
    same, if act' varies      3      5                and read r again, as z = bn(x) + r
    ========================  =====  ===============  ==========================================

    Without a residual z is computed from x again, which is read anyway. For activations made of straight lines act' is
    a bit or two per element; those bytes, and those of the (C,) vectors, are left out.

    Example:
        >>> tensors_moved(Case("", (2, 2)), "forward+backward")
        5
        >>> tensors_moved(Case("", (2, 2), residual=True), "forward+backward")
        7
    """
    forward = 2 + case.residual
    if pass_ != BOTH:
        return forward
    if not case.residual or case.activation is None:
        return forward + 3
    return forward + 4 + (case.activation not in PIECEWISE_LINEAR)


class Inputs(NamedTuple):
    """The tensors of a case. ``residual`` is None where the case has none."""

    x: Tensor
    residual: Tensor | None
    grad_output: Tensor
    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    """Draw the tensors of a case: channels of different mean and scale, parameters around 1 and 0."""
    generator = torch.Generator().manual_seed(seed)
    dtype, channels = getattr(torch, case.dtype), case.shape[1]

    def full(mean: float = 0.0, std: float = 1.0) -> Tensor:
        value = torch.empty(case.shape).normal_(mean, std, generator=generator).to(dtype)
        return value.contiguous(memory_format=MEMORY_FORMATS[case.memory_format])

    def vector(mean: float, std: float) -> Tensor:
        return torch.empty(channels).normal_(mean, std, generator=generator).to(dtype)

    return Inputs(
        x=full(mean=1.0, std=2.0),
        residual=full() if case.residual else None,
        grad_output=full(),
        weight=vector(1.0, 0.1),
        bias=vector(0.0, 0.5),
        running_mean=vector(0.5, 0.1),
        running_var=vector(2.0, 0.1).abs(),
    )


def choose_cases(cases: Sequence[Case], patterns: Sequence[str]) -> list[Case]:
    """The cases whose name contains one of the patterns, in which ``*`` stands for anything; all without a pattern.

    Example:
        >>> cases = [Case("MNIST network", (60, 100), "sigmoid"), Case("very small", (2, 3))]
        >>> [case.shape for case in choose_cases(cases, ["mnist*sigmoid"])]
        [(60, 100)]
    """
    return [case for case in cases if name_matches(case.name, patterns)]


def name_matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a name contains one of the patterns, or there are none."""
    return not patterns or any(fnmatch.fnmatchcase(name.lower(), f"*{pattern.lower()}*") for pattern in patterns)
