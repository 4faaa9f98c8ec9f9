"""Outputs of the same model in different modes, compared."""

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor


def distance(some: list[list[Tensor]], others: list[list[Tensor]], spread: list[list[Tensor]]) -> float:
    """Root of the mean square difference over the standard deviation, of that output of which it is largest."""
    found = [relative_difference(*columns) for columns in columns_of(some, others, spread)]
    return max(found, key=lambda value: (value == value, value), default=float("nan"))


def columns_of(*passes: list[list[Tensor]]) -> Iterator[tuple[Tensor, ...]]:
    """Output by output, the values of all items in a row, of those that have the same shapes in all passes."""
    numbers = [len(outputs) for one in passes for outputs in one]
    for number in range(min(numbers, default=0)):
        columns = [[outputs[number] for outputs in one] for one in passes]
        if all(len({tensor.shape for tensor in row}) == 1 for row in zip(*columns, strict=True)):
            yield tuple(torch.cat([tensor.flatten().double() for tensor in column]) for column in columns)


def relative_difference(some: Tensor, others: Tensor, spread: Tensor) -> float:
    """0 where nothing differs; infinite where one alone is not finite, or the outputs are all alike."""
    both = some.isfinite() & others.isfinite()
    same = (some == others) | (some.isnan() & others.isnan())
    if not bool((both | same).all()):
        return float("inf")
    difference = (some - others).masked_fill(same, 0.0).square().mean().sqrt().item() if some.numel() else 0.0
    finite = spread[spread.isfinite()]
    scale = finite.std(correction=0).item() if len(finite) else 0.0
    if not difference:
        return 0.0
    return difference / scale if scale else float("inf")


def disagreement(some: list[list[Tensor]], others: list[list[Tensor]]) -> float | None:
    """Share of samples with another largest value, of the first output (N, K) with K > 1."""
    for number in range(min((len(outputs) for one in (some, others) for outputs in one), default=0)):
        pairs = [(a[number], b[number]) for a, b in zip(some, others, strict=True)]
        if all(a.dim() == 2 and a.shape == b.shape and a.shape[1] > 1 and len(a) for a, b in pairs):
            return torch.cat([a.argmax(1) != b.argmax(1) for a, b in pairs]).double().mean().item()
    return None


def floats_in(value: Any) -> Iterator[Tensor]:
    """The floating point tensors in an output, in order."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value.detach()
    elif isinstance(value, Mapping):
        yield from floats_in(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from floats_in(item)
    elif is_dataclass(value):
        yield from floats_in([getattr(value, one.name) for one in fields(value)])
