"""New running statistics for layers that have none or broken ones: measured with a model, or given."""

import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from glob import escape
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from batchnorm.doctor.checkpoint import STATISTICS, Checkpoint, Layer, StoredTensor
from batchnorm.errors import DataError
from batchnorm.report.text import clean

if TYPE_CHECKING:
    from torch import nn

# what wrappers put before every name: DataParallel and DistributedDataParallel, torch.compile
WRAPPERS = ("", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.")
COUNTER = "num_batches_tracked"
EXTRA_STATE = "_extra_state"
NAMED = 3


class Measured(NamedTuple):
    """By layer of the file: new values by role, and how they came; or why there are none."""

    values: dict[str, dict[str, np.ndarray]]
    how: dict[str, str]
    problems: dict[str, str]


class Loaded(NamedTuple):
    """A copy of a model with the state of a file.

    Attributes:
        model: the copy.
        prefix: what stands before the model's names in the file.
    """

    model: "nn.Module"
    prefix: str


def load_into(model: "nn.Module", checkpoint: Checkpoint, broken: Iterable[str]) -> Loaded:
    """A copy of the model with the state of a file; statistics of broken layers are those of new ones.

    Raises:
        DataError: the file does not fit the model otherwise.
    """
    from batchnorm.doctor.write.torch import as_torch

    expected = model.state_dict()
    prefix = prefix_of(expected, checkpoint)
    own = {name[len(prefix) :]: tensor for name, tensor in checkpoint.tensors.items() if name.startswith(prefix)}
    paths = [path[len(prefix) :] for path in broken if f"{path}.".startswith(prefix)]
    renewed = {f"{path}.{role}".lstrip(".") for path in paths for role in (*STATISTICS, COUNTER)}
    missing = [name for name in expected if name not in own and not may_lack(name, renewed)]
    surplus = [name for name in own if name not in expected]
    if missing or surplus:
        said = [f"{what} {some(names)}" for what, names in (("lacks", missing), ("has also", surplus)) if names]
        raise DataError(f"{checkpoint.source} does not fit the model: it {' and '.join(said)}")
    loaded = copy.deepcopy(model)
    try:
        for path in paths:
            layer: Any = loaded.get_submodule(path)
            layer.reset_running_stats()
        tensors = {name: as_torch(tensor) for name, tensor in own.items() if name not in renewed}
        loaded.load_state_dict(tensors, strict=False)
    except (RuntimeError, AttributeError) as error:
        raise DataError(f"{checkpoint.source} does not fit the model: {clean(str(error))}") from error
    return Loaded(loaded, prefix)


def with_layers_of(model: "nn.Module", checkpoint: Checkpoint) -> Checkpoint:
    """The same with layers that the model has, and that nothing in the file alone shows to be batch normalization."""
    from batchnorm.doctor.live_layers import live_layer, normalizes

    prefix = prefix_of(model.state_dict(), checkpoint)
    known, layers = {layer.path for layer in checkpoint.layers}, list(checkpoint.layers)
    for name, module in model.named_modules(remove_duplicate=False):
        if not normalizes(module):
            continue
        live = live_layer(name, module)
        path = f"{prefix}{live.path}" if live.path else prefix.removesuffix(".")
        names = {role: f"{prefix}{tensor.name}" for role, tensor in live.tensors.items()}
        tensors = {role: checkpoint.tensors[name] for role, name in names.items() if name in checkpoint.tensors}
        fits = all(tensor.shape == live.tensors[role].shape for role, tensor in tensors.items())
        if path not in known and fits and tensors:
            layers.append(dataclasses.replace(live, path=path, tensors=tensors))
    return dataclasses.replace(checkpoint, layers=layers)


def prefix_of(expected: Mapping[str, Any], checkpoint: Checkpoint) -> str:
    """What stands before the names of the model: a path through the file, and a wrapper."""
    paths = ["", *(f"{path}." for path in checkpoint.facts.get("state_dicts", []) if path)]
    prefixes = [f"{path}{wrapper}" for path in paths for wrapper in WRAPPERS]
    found = {prefix: sum(f"{prefix}{name}" in checkpoint.tensors for name in expected) for prefix in prefixes}
    best = max(prefixes, key=lambda prefix: found[prefix])
    if not found[best]:
        raise DataError(f"{checkpoint.source} has none of the model's tensors, such as {some(list(expected))}")
    return best


def may_lack(name: str, renewed: set[str]) -> bool:
    # older files, and those of other libraries, have no counters
    return name in renewed or name.endswith((COUNTER, EXTRA_STATE))


def some(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(repr(clean(name)) for name in names[:NAMED]) + more


def measure(
    loaded: Loaded, paths: Iterable[str], loader: Iterable[Any], call: "Callable[[nn.Module, Any], Any] | None"
) -> Measured:
    """Measure these layers on data, from the first to the last, while all others evaluate as they are.

    Args:
        loaded: its model's statistics are overwritten.
        paths: of the layers in the file.
        loader: iterated once for each layer.
        call: runs the model on an item of the loader.
    """
    from batchnorm.statistics.recalibrate import call_with_input, recalibrate

    every = list(paths)
    names = {path: path[len(loaded.prefix) :] for path in every if f"{path}.".startswith(loaded.prefix)}
    problems = {path: "the model is that of another part of the file" for path in every if path not in names}
    if not names:
        return Measured({}, {}, problems)
    modules = {path: loaded.model.get_submodule(name) for path, name in names.items()}
    # a layer in several places of the model is measured under its first name
    own = {module: name for name, module in loaded.model.named_modules()}
    patterns = [escape(own[module]) for module in modules.values()]
    call = call or call_with_input
    result = recalibrate(loaded.model, loader, layers=patterns, layer_by_layer=True, call=call)
    state = loaded.model.state_dict()
    measured = Measured({}, {}, problems)
    for path, module in modules.items():
        if (first := own[module]) in result.counts:
            keys = {role: f"{names[path]}.{role}".lstrip(".") for role in (*STATISTICS, COUNTER)}
            measured.values[path] = {role: as_stored(state[key]) for role, key in keys.items() if key in state}
            measured.how[path] = f"measured on {result.counts[first]:,} values per channel"
        else:
            frozen = first in result.frozen
            measured.problems[path] = "it is frozen in the model" if frozen else "no batch reached it"
    return measured


def as_stored(tensor: Any) -> np.ndarray:
    """In float32 at least."""
    return (tensor.float() if tensor.is_floating_point() and tensor.itemsize < 4 else tensor).cpu().numpy().copy()


def given(layers: Sequence[Layer], paths: Iterable[str], statistics: Mapping[str, Any]) -> Measured:
    """Statistics that the caller has measured, for these layers: mean and variance by layer.

    Raises:
        ValueError: no such layer, another size, or values that no statistics have.
    """
    by_path = {layer.path: layer for layer in layers}
    unknown = [path for path in statistics if path not in by_path]
    if unknown:
        raise ValueError(f"statistics are given for {some(unknown)}, but the layers are {some(list(by_path))}")
    measured = Measured({}, {}, {})
    for path in paths:
        if path in statistics:
            measured.values[path] = checked(by_path[path], statistics[path])
            measured.how[path] = "as given"
        else:
            measured.problems[path] = "no statistics are given for it"
    return measured


def checked(layer: Layer, pair: Any) -> dict[str, np.ndarray]:
    """Mean and variance in the dtype of the layer."""
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise ValueError(f"statistics of {clean(layer.path)!r}: expected (mean, variance), got a {type(pair).__name__}")
    mean, var = (np.asarray(values, np.float64) for values in pair)
    for role, values in zip(STATISTICS, (mean, var), strict=True):
        if values.shape != (layer.num_features,):
            raise ValueError(
                f"{role} of {clean(layer.path)!r}: expected {layer.num_features} values, got {values.shape}"
            )
        if not np.isfinite(values).all() or (role == "running_var" and (values < 0).any()):
            raise ValueError(f"{role} of {clean(layer.path)!r} has NaN, infinite or negative values")
    return {role: values.astype(dtype_of(layer)) for role, values in zip(STATISTICS, (mean, var), strict=True)}


def dtype_of(layer: Layer) -> type[np.floating]:
    wide = any(tensor.dtype == "float64" for tensor in layer.tensors.values() if is_vector(tensor))
    return np.float64 if wide else np.float32


def is_vector(tensor: StoredTensor) -> bool:
    return len(tensor.shape) == 1
