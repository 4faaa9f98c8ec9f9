"""The buffers of normalizing layers: copied from model to model, and reset."""

from collections.abc import Iterable, Mapping
from itertools import dropwhile
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.statistics.layers import has_running_statistics, normalizing_layers, spread_of

NAMES = ("running_mean", "running_var", "running_cov", "num_batches_tracked", "schedule_step")
# what DistributedDataParallel, AveragedModel and torch.compile call the model that they wrap
WRAPPERS = ("module", "_orig_mod")


def tracking_layers(model: nn.Module, pattern: str | Iterable[str] = "*") -> dict[str, Any]:
    """Those of :func:`normalizing_layers` that have running statistics."""
    return {name: layer for name, layer in normalizing_layers(model, pattern).items() if has_running_statistics(layer)}


def statistics_of(layer: nn.Module) -> dict[str, Tensor]:
    """Running statistics and counters of a layer."""
    buffers = {name: getattr(layer, name, None) for name in NAMES}
    return {name: buffer for name, buffer in buffers.items() if buffer is not None}


def fresh(spread: Tensor) -> Tensor:
    """What a running variance is before the first batch; of a covariance (C / d, d, d), the identity."""
    if spread.dim() == 1:
        return torch.ones_like(spread)
    return torch.eye(spread.shape[-1], dtype=spread.dtype, device=spread.device).expand_as(spread)


def variances(buffers: Mapping[str, Tensor]) -> Tensor:
    """Running variances, or of a whitening layer the diagonals of its covariances."""
    if "running_var" in buffers:
        return buffers["running_var"]
    return buffers["running_cov"].diagonal(dim1=-2, dim2=-1)


@torch.no_grad()
def reset_running_stats(model: nn.Module, *, pattern: str | Iterable[str] = "*") -> list[str]:
    """Set running statistics to those of a new layer: mean 0, variance 1 (covariance the identity), counters 0.

    For a model that was built on the meta device: ``to_empty`` gives it memory, with whatever stands there. Batch
    Renorm starts its schedule again. Weights stay as they are.

    Args:
        model: holds BN layers of ``torch.nn`` or ``batchnorm.nn``, or whitening layers.
        pattern: of the names of layers, as of a shell; one or several.

    Returns:
        The names of the layers that were reset; those without running statistics are not among them.

    Raises:
        ValueError: nothing matches the pattern, or a layer has no memory yet; then nothing is reset.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 3, device="meta"), nn.BatchNorm1d(3, device="meta"))
        >>> model = model.to_empty(device="cpu")
        >>> reset_running_stats(model)
        ['1']
        >>> model[1].running_var
        tensor([1., 1., 1.])
    """
    layers = tracking_layers(model, pattern)
    for name, layer in layers.items():
        if nn.parameter.is_lazy(layer.running_mean):
            raise ValueError(f"layer {name!r} is lazy and has no statistics yet: call the model once first")
        if layer.running_mean.is_meta:
            raise ValueError(f"layer {name!r} is on the meta device: call model.to_empty(device=...) first")
    for layer in layers.values():
        for buffer in statistics_of(layer).values():
            buffer.zero_()
        spread = spread_of(layer)
        assert spread is not None
        spread.copy_(fresh(spread))
    return list(layers)


@torch.no_grad()
def copy_running_stats(source: nn.Module, target: nn.Module) -> None:
    """Give a copy of a model, such as its moving average, the running statistics and counters of the model.

    Layers are matched by name; what ``DistributedDataParallel``, ``AveragedModel`` and ``torch.compile`` put before a
    name does not count. These are the statistics of the weights of ``source``; :func:`recalibrate` measures those of
    averaged weights.

    Args:
        source: the model that is trained.
        target: its copy, which is written in place.

    Raises:
        ValueError: the layers of the two, or their sizes, differ; then nothing is copied.

    Example:
        >>> model = nn.Sequential(nn.BatchNorm1d(2))
        >>> average = torch.optim.swa_utils.AveragedModel(model)
        >>> _ = model(torch.tensor([[0.0, 10.0], [2.0, 30.0]]))
        >>> copy_running_stats(model, average)
        >>> average.module[0].running_mean
        tensor([0.1000, 2.0000])
    """
    given = {unwrapped(name): statistics_of(layer) for name, layer in tracking_layers(source).items()}
    wanted = {unwrapped(name): statistics_of(layer) for name, layer in tracking_layers(target).items()}
    for name in {**given, **wanted}:
        sizes = [
            {key: tuple(buffer.shape) for key, buffer in layers.get(name, {}).items()} for layers in (given, wanted)
        ]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"the models differ in layer {name!r}: the source has {sizes[0] or 'none'}, the target "
                f"{sizes[1] or 'none'}"
            )
    for name, buffers in wanted.items():
        for key, buffer in buffers.items():
            buffer.copy_(given[name][key])


def unwrapped(name: str) -> str:
    """The name of a layer in the innermost model."""
    return ".".join(dropwhile(lambda part: part in WRAPPERS, name.split(".")))
