"""BN layers of a live model, and of a state dict in memory, in the normal form that rules read."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from batchnorm.doctor.checkpoint import ROLES, STATISTICS, Checkpoint, Layer, StoredTensor
from batchnorm.doctor.read.table import Table

VECTORS = ("weight", "bias", *STATISTICS)


def live_layers(model: nn.Module) -> list[Layer]:
    """The BN layers of a model in the order of ``named_modules()``, a layer in several places once.

    Layers of ``torch.nn`` and ``batchnorm.nn``, and what is none of them but has their running statistics, such as the
    frozen layers of other libraries. Values are read when a rule asks for them.

    Args:
        model: a model, or a layer, whose path is "".

    Raises:
        ValueError: a layer is lazy or on the meta device, so that it has no values.

    Example:
        >>> [layer] = live_layers(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3, eps=1e-3)))
        >>> layer.path, layer.num_features, layer.eps, layer.momentum
        ('1', 3, 0.001, 0.1)
    """
    return [live_layer(path, module) for path, module in model.named_modules() if normalizes(module)]


def normalizes(module: nn.Module) -> bool:
    """Whether this is batch normalization, by its class or by its running statistics."""
    if isinstance(module, _BatchNorm):
        return True
    if isinstance(module, _InstanceNorm):
        return False
    vectors = [getattr(module, role, None) for role in STATISTICS]
    return all(isinstance(vector, Tensor) and vector.dim() == 1 for vector in vectors)


def live_layer(path: str, module: Any) -> Layer:
    found = {role: tensor for role in ROLES if isinstance(tensor := getattr(module, role, None), Tensor)}
    for tensor in found.values():
        check_values(path, tensor)
    sizes = [len(tensor) for tensor in found.values() if tensor.dim() == 1]
    features = getattr(module, "num_features", None) or max(sizes, default=0)
    shapes = {role: (features,) if role in VECTORS else () for role in ROLES}
    tensors = {
        role: stored(f"{path}.{role}" if path else role, tensor)
        for role, tensor in found.items()
        if tensor.shape == shapes[role]
    }
    # without any of them it was built to normalize by its batches
    statistics = frozenset(STATISTICS) if tensors.keys() & set(STATISTICS) else frozenset()
    eps, momentum = (number(getattr(module, name, None)) for name in ("eps", "momentum"))
    return Layer(path, "torch", tensors, frozenset(tensors) | statistics, features, eps, momentum)


def check_values(path: str, tensor: Tensor) -> None:
    if nn.parameter.is_lazy(tensor):
        raise ValueError(f"layer {path!r} is lazy and has no values yet: call the model once first")
    if tensor.is_meta:
        raise ValueError(f"layer {path!r} is on the meta device and has no values: load a checkpoint first")


def number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def stored(name: str, tensor: Tensor) -> StoredTensor:
    """A tensor in memory as one of a file; its values are those of the moment when they are read."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    return StoredTensor(name, tuple(tensor.shape), dtype, partial(copied, tensor.detach()))


def copied(tensor: Tensor) -> np.ndarray:
    tensor = tensor.cpu()
    if tensor.dtype == torch.complex32:
        return tensor.to(torch.complex64).numpy()
    # NumPy has no bfloat16 and no float8
    narrow = tensor.is_floating_point() and tensor.dtype not in (torch.float16, torch.float32, torch.float64)
    return np.array(tensor.float().numpy() if narrow else tensor.numpy())


def read_state(state: Mapping[str, Any]) -> Checkpoint:
    """A state dict, or several under the keys of a checkpoint, in the normal form.

    Args:
        state: tensors or arrays by name; mappings inside are walked, everything else is passed over.

    Example:
        >>> [layer.path for layer in read_state({"epoch": 3, "model": nn.BatchNorm1d(2).state_dict()}).layers]
        ['model']
    """
    table = Table("state dict", facts={"state_dicts": []})
    take(table, state, "")
    return table.checkpoint("state dict")


def take(table: Table, state: Mapping[str, Any], path: str) -> None:
    """Put what lies at a path of the state into the table."""
    prefix = f"{path}." if path else ""
    for module, entry in getattr(state, "_metadata", {}).items():
        if isinstance(entry, Mapping) and isinstance(entry.get("version"), int):
            table.versions[f"{prefix}{module}" if module else path] = entry["version"]
    if any(isinstance(value, Tensor | np.ndarray) for value in state.values()):
        table.facts["state_dicts"].append(path)
    for key, value in state.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            take(table, value, name)
        elif isinstance(value, Tensor):
            plain = value.layout == torch.strided and not (value.is_quantized or value.is_meta)
            table.add(stored(name, value), "" if plain else "is sparse, quantized or on the meta device")
        elif isinstance(value, np.ndarray):
            table.add(StoredTensor(name, value.shape, value.dtype.name, partial(np.array, value)))


def tensors_of(model: nn.Module) -> dict[str, StoredTensor]:
    """What the state dict of a model has, apart from extra state."""
    return {name: stored(name, value) for name, value in model.state_dict().items() if isinstance(value, Tensor)}
