"""How a training forward of a layer of ours tells the moments of its batch, and how one tool at a time may ask."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from batchnorm._ops.choice import Choice
from batchnorm.nn.batchnorm import FusedBatchNorm
from batchnorm.nn.renorm import BatchRenorm

# layers whose forward is being recorded
taken: WeakSet[nn.Module] = WeakSet()


@contextmanager
def claimed(layers: dict[str, Any]) -> Iterator[None]:
    """Refuse layers that another tool is recording, and keep others from these."""
    for name, layer in layers.items():
        if layer in taken or getattr(layer, "recorder", None) is not None:
            raise RuntimeError(
                f"layer {name!r} is being recorded already, by a deferred_stats or recalibrate that has not ended: "
                "leave that first"
            )
    taken.update(layers.values())
    try:
        yield
    finally:
        taken.difference_update(layers.values())


@contextmanager
def recorded_by(layer: FusedBatchNorm, recorder: Any) -> Iterator[None]:
    layer.recorder = recorder
    try:
        yield
    finally:
        layer.__dict__.pop("recorder", None)


def train_with_scratch(
    layer: FusedBatchNorm,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    choice: Choice,
) -> tuple[Tensor, Tensor, Tensor]:
    """What a training forward of the layer returns, mean and unbiased variance of the batch; nothing else moves."""
    running_mean, running_var = layer.running_mean, layer.running_var
    assert running_mean is not None
    assert running_var is not None
    # with momentum 1 they receive the batch's; Batch Renorm reads them before
    mean, var = running_mean.clone(), running_var.clone()
    with schedule_kept(layer):
        output = layer.train_and_track(input, weight, bias, residual, mean, var, 1.0, None, choice)
    return output, mean, var


def schedule_kept(layer: FusedBatchNorm) -> AbstractContextManager[None]:
    return buffer_kept(layer, "schedule_step") if isinstance(layer, BatchRenorm) else nullcontext()


@contextmanager
def buffer_kept(layer: nn.Module, name: str) -> Iterator[None]:
    """Let a forward write into a copy of a buffer."""
    buffer = layer._buffers[name]
    assert buffer is not None
    layer._buffers[name] = buffer.clone()
    try:
        yield
    finally:
        layer._buffers[name] = buffer


def is_frozen(layer: nn.Module) -> bool:
    return getattr(layer, "frozen_statistics", False) is True


def first_not_finite(tensors: Iterable[tuple[str, Tensor, Tensor]]) -> str | None:
    """The first name whose mean or spread has inf or NaN; asks the device once."""
    sums = [(name, mean.sum() + spread.sum()) for name, mean, spread in tensors]
    if not sums:
        return None
    flags = torch.stack([total.to(sums[0][1].device) for _, total in sums]).isfinite().tolist()
    return next((name for (name, _), is_finite in zip(sums, flags, strict=True) if not is_finite), None)


def without_compiled_graphs() -> AbstractContextManager[Any]:
    """Compiled graphs, which have the update of the buffers built in, run as the Python that they were made of."""
    # to import it takes a second; before, there is no compiled graph
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
