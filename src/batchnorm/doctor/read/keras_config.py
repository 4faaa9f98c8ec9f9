"""BN layers in the configuration that Keras stores with a model: names, epsilon, momentum, which variables there are.

Source: Keras' ``BatchNormalization.get_config`` and ``saving/saving_lib.py`` (where a layer's variables lie).
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from batchnorm.doctor.checkpoint import STATISTICS
from batchnorm.doctor.read.variables import Declared
from batchnorm.errors import DataError

CLASSES = ("BatchNormalization", "SyncBatchNormalization", "BatchNormalizationV1", "BatchNormalizationV2")
DEEPEST = 64


@dataclass(frozen=True)
class Configured:
    """A BN layer of a configuration.

    Attributes:
        name: of the layer.
        group: path of its group in a ``.weights.h5``, without the folder names that depend on the version.
        declared: what is known about it.
    """

    name: str
    group: tuple[str, ...]
    declared: Declared


def read_config(text: str, path: object) -> list[Configured]:
    """The BN layers, in order.

    Args:
        text: JSON.
        path: for messages.

    Raises:
        DataError: it is no JSON object, or nested deeper than any model.
    """
    try:
        config = json.loads(text)
        return list(walk(config, (), 0))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: its Keras configuration cannot be read: {str(error)[:80]}") from None


def walk(item: Any, group: tuple[str, ...], depth: int) -> Iterator[Configured]:
    """A layer or model, and what lies in it."""
    config = item.get("config") if isinstance(item, dict) else None
    if not isinstance(config, dict):
        return
    if depth > DEEPEST:
        raise ValueError(f"models nested deeper than {DEEPEST}")
    if item.get("class_name") in CLASSES:
        yield Configured(str(config.get("name", "")), group, declared(config, item.get("build_config")))
    used: dict[str, int] = {}
    layers = config.get("layers")
    for layer in layers if isinstance(layers, list) else []:
        # Sequential models of Keras 3 list their input, which has no variables and no group of its own
        if isinstance(layer, dict):
            yield from walk(layer, (*group, "layers", unique(str(layer.get("class_name", "")), used)), depth + 1)
    for name in ("layer", "forward_layer", "backward_layer"):
        yield from walk(config.get(name), (*group, name), depth + 1)


def unique(class_name: str, used: dict[str, int]) -> str:
    """The name of a layer's group: its class, and how many of them came before."""
    snake = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", re.sub(r"\W+", "", class_name.rpartition(">")[2]))
    snake = re.sub("([a-z])([A-Z])", r"\1_\2", snake).lower()
    used[snake] = used.get(snake, -1) + 1
    return f"{snake}_{used[snake]}" if used[snake] else snake


def declared(config: dict[str, Any], build: Any) -> Declared:
    """What a BN layer's configuration says. Keras' momentum is the weight of the old average."""
    expected = set(STATISTICS)
    expected |= {role for role, key in (("weight", "scale"), ("bias", "center")) if config.get(key, True)}
    momentum = number(config.get("momentum"))
    return Declared(
        expected=frozenset(expected),
        num_features=features(config.get("axis"), build),
        eps=number(config.get("epsilon")),
        momentum=None if momentum is None else round(1 - momentum, 12),
    )


def features(axis: Any, build: Any) -> int | None:
    """C, from the shape of the input that Keras 3 stores."""
    shape = build.get("input_shape") if isinstance(build, dict) else None
    axis = axis[0] if isinstance(axis, list) and len(axis) == 1 else axis
    if isinstance(shape, list) and type(axis) is int and -len(shape) <= axis < len(shape):
        size = shape[axis]
        return size if type(size) is int and size > 0 else None
    return None


def number(value: Any) -> float | None:
    """A finite number, or nothing."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < 1e30 and math.isfinite(value) else None
