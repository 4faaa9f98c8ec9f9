"""A checkpoint in a model although its running statistics are missing or broken, and new ones put into it."""

from collections.abc import Iterable, Mapping
from typing import Any

import click
import torch
from torch import Tensor, nn

from batchnorm.cli.checkpoints import Checkpoint, listing, unwrapped
from batchnorm.cli.user_code import UserCodeError
from batchnorm.errors import DataError
from batchnorm.report.text import clean
from batchnorm.statistics.layers import has_running_statistics, normalizing_layers

STATISTICS = ("running_mean", "running_var", "running_cov", "num_batches_tracked")
COUNTER = "num_batches_tracked"
# A layer that is never called looks so, too, and the others can be measured without it
NEVER_UPDATED = "never updated"


def tracking_layers(model: nn.Module) -> dict[str, Any]:
    """The layers that have running statistics."""
    try:
        layers = {name: layer for name, layer in normalizing_layers(model).items() if has_running_statistics(layer)}
    except ValueError as error:
        raise UserCodeError(str(error)) from error
    if not layers:
        raise UserCodeError("no batch normalization layer of the model has running statistics")
    lazy = [name for name, layer in layers.items() if nn.parameter.is_lazy(layer.running_mean)]
    if lazy:
        raise UserCodeError(f"{listing(lazy)} have no sizes yet: let the function that builds the model call it once")
    return layers


def load_repairable(model: nn.Module, checkpoint: Checkpoint) -> tuple[dict[str, str], str]:
    """Load a checkpoint that fits but for running statistics.

    Returns:
        What is wrong with the statistics, by layer; and what a wrapper had put before the names in the file.

    Raises:
        DataError: anything else does not fit.
    """
    state, prefix = unwrapped(checkpoint.state, model)
    faults = {}
    for name, layer in tracking_layers(model).items():
        fault = fault_of(layer, {key: state.get(f"{name}.{key}".lstrip(".")) for key in buffers_of(layer)})
        if fault:
            faults[name] = fault
            layer.reset_running_stats()
        for key, value in named_buffers(model, layer).items():
            if fault:
                state[key] = value
            elif key.endswith(COUNTER):
                # older files, and those of other libraries, have none
                state.setdefault(key, value)
    try:
        model.load_state_dict(state)
    except Exception as error:
        raise DataError(f"{checkpoint.path} does not fit the model: {clean(str(error))}") from error
    return faults, prefix


def tell_faults(faults: Mapping[str, str]) -> None:
    """What is to be repaired, one line for each kind of fault."""
    for fault in dict.fromkeys(faults.values()):
        names = [name for name, other in faults.items() if other == fault]
        click.echo(f"running statistics {fault}: {listing(names)}", err=True)


def fault_of(layer: nn.Module, given: Mapping[str, Tensor | None]) -> str | None:
    """What is wrong with the running statistics that a checkpoint has for a layer."""
    wanted = {key: value for key, value in buffers_of(layer).items() if key != COUNTER}
    found = {key: given[key] for key in wanted}
    if any(value is None for value in found.values()):
        return "missing"
    tensors = {key: value.to("cpu", dtype=torch.float64) for key, value in found.items() if value is not None}
    if any(tensors[key].shape != value.shape for key, value in wanted.items()):
        return "of another size"
    mean, var = by_channel(tensors)
    if not (mean.isfinite().all() and var.isfinite().all()):
        return "inf or NaN"
    if (var < 0).any():
        return "a negative variance"
    return NEVER_UPDATED if (mean == 0).all() and (var == 1).all() else None


def mean_and_variance(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Running mean and variance of each channel in float64, of a whitening layer too."""
    return by_channel(buffers_of(layer))


def by_channel(buffers: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    covariance = buffers.get("running_cov")
    var = buffers["running_var"] if covariance is None else covariance.diagonal(dim1=-2, dim2=-1).flatten()
    return buffers["running_mean"].double(), var.double()


def buffers_of(layer: nn.Module) -> dict[str, Tensor]:
    """The running statistics and the counter of a layer."""
    buffers = {key: getattr(layer, key, None) for key in STATISTICS}
    return {key: value for key, value in buffers.items() if value is not None}


def named_buffers(model: nn.Module, layer: nn.Module) -> dict[str, Tensor]:
    """The same by their names in the model's state_dict, where a layer that is used twice has several."""
    names = [name for name, module in model.named_modules(remove_duplicate=False) if module is layer]
    return {f"{name}.{key}".lstrip("."): value for name in names for key, value in buffers_of(layer).items()}


def put_statistics(model: nn.Module, names: Iterable[str], checkpoint: Checkpoint, prefix: str) -> None:
    """Make the running statistics of these layers those of the checkpoint; nothing else of it changes."""
    for name in names:
        for key, value in named_buffers(model, model.get_submodule(name)).items():
            checkpoint.state[prefix + key] = value.detach().cpu().clone()
