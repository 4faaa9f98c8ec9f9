"""Layers that normalize by their batches while their inputs are measured, in a model that evaluates."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import batchnorm.nn
from batchnorm import functional
from batchnorm._ops import kernel_autograd
from batchnorm._ops.choice import READY, Choice
from batchnorm.errors import ImplementationError
from batchnorm.nn.batchnorm import FusedBatchNorm
from batchnorm.nn.renorm import BatchRenorm
from batchnorm.nn.whitening import Whitening
from batchnorm.reference import values_per_channel
from batchnorm.statistics.moments import Moments
from batchnorm.statistics.recording import claimed, recorded_by, train_with_scratch, without_compiled_graphs

# as they were imported: a forward that somebody replaced is run as it is
TORCH_FORWARD = nn.modules.batchnorm._BatchNorm.forward
OURS: dict[type, type[FusedBatchNorm]] = {
    nn.BatchNorm1d: batchnorm.nn.BatchNorm1d,
    nn.BatchNorm2d: batchnorm.nn.BatchNorm2d,
    nn.BatchNorm3d: batchnorm.nn.BatchNorm3d,
}
OWN_ATTRIBUTES = ("activation", "implementation", "last_choice", "recorder")


@contextmanager
def measuring(model: nn.Module, layers: dict[str, Any]) -> Iterator[dict[str, Moments]]:
    """Evaluation mode, but with layers that normalize by their batches and whose inputs are measured.

    Yields:
        Moments by name, of the layers that were reached, in the order in which they were.
    """
    moments: dict[str, Moments] = {}
    with ExitStack() as stack:
        stack.enter_context(claimed(layers))
        stack.enter_context(without_compiled_graphs())
        stack.enter_context(evaluating(model))
        for name, layer in layers.items():
            stack.enter_context(measured(name, layer, moments))
        yield moments


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Only the flags: ``eval()`` of some modules, such as those that merge weights, does more than it undoes."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, training in modes:
            module.training = training


def measured(name: str, layer: Any, moments: dict[str, Moments]) -> AbstractContextManager[None]:
    """One layer normalizes by its batches and is measured."""
    if isinstance(layer, FusedBatchNorm) or is_torchs_own(layer):
        return measured_by_its_forward(name, layer, moments)
    return measured_before_its_forward(name, layer, moments)


def is_torchs_own(layer: nn.Module) -> bool:
    """Whether our forward can stand in for the layer's."""
    return (
        type(layer) in OURS
        and type(layer).forward is TORCH_FORWARD
        and "forward" not in layer.__dict__
        and not any(hasattr(layer, name) for name in OWN_ATTRIBUTES)
    )


@contextmanager
def measured_by_its_forward(name: str, layer: Any, moments: dict[str, Moments]) -> Iterator[None]:
    """The moments are a by-product of normalizing, and a block that was fused stays fused."""
    original = type(layer)
    layer.training = True
    layer.__class__ = OURS.get(original, original)
    try:
        with recorded_by(layer, Measurement(name, moments)):
            yield
    finally:
        layer.__class__ = original
        if original in OURS:
            layer.__dict__.pop("last_choice", None)


class Measurement:
    """The recorder of a layer."""

    def __init__(self, name: str, moments: dict[str, Moments]) -> None:
        self.name, self.moments = name, moments

    def __call__(
        self,
        layer: FusedBatchNorm,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        choice: Choice,
    ) -> Tensor:
        count = values_per_channel(input)
        output, mean, var = train_and_measure(layer, input, weight, bias, residual, choice, count)
        self.moments.setdefault(self.name, Moments()).merge(count, mean, var)
        return output

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """A copy of the layer is not recorded."""
        return type(None), ()


def train_and_measure(
    layer: FusedBatchNorm,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    choice: Choice,
    count: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalize by the batch of this process, without the correction of Batch Renorm; its mean and biased variance."""
    by_whole_batch = type(layer).train_and_track is FusedBatchNorm.train_and_track
    if not by_whole_batch and not isinstance(layer, (BatchRenorm, nn.SyncBatchNorm)):
        output, mean, var_unbiased = train_with_scratch(layer, input, weight, bias, residual, choice)
        return output, mean, var_unbiased.double() * ((count - 1) / max(count, 1))
    if choice is READY and not torch.is_grad_enabled():
        try:
            return kernel_autograd.measure(input, weight, bias, residual, layer.eps, layer.activation)
        except ImplementationError:
            # the next way warns, and chooses another implementation
            pass
    return functional.normalize_batch(
        input, weight, bias, None, None, residual, layer.activation, layer.eps, layer.implementation
    )[:3]


@contextmanager
def measured_before_its_forward(name: str, layer: Any, moments: dict[str, Moments]) -> Iterator[None]:
    """The input is read once more, in float64; the layer's own forward normalizes it and tracks nothing."""
    hook = layer.register_forward_pre_hook(measure(name, moments), with_kwargs=True)
    track, buffers = layer.track_running_stats, dict(layer._buffers)
    try:
        # without buffers it normalizes by its own batch: other processes may have other numbers of batches
        if isinstance(layer, nn.SyncBatchNorm):
            layer._buffers.update(dict.fromkeys(buffers))
        else:
            layer.training = True
            layer.track_running_stats = False
        yield
    finally:
        hook.remove()
        layer.track_running_stats = track
        layer._buffers.update(buffers)


def measure(name: str, moments: dict[str, Moments]) -> Callable[..., None]:
    """A hook that adds the input of a layer, given by position or by name."""

    def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        moments.setdefault(name, Moments(group_size_of(layer))).add(args[0] if args else kwargs["input"])

    return hook


def group_size_of(layer: Any) -> int | None:
    return (layer.group_size or layer.num_features) if isinstance(layer, Whitening) else None
