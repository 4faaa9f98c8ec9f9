"""The normal form of what readers find: tensors by name, BN layers, and what is wrong with the container."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

# as torch calls them; TensorFlow's and Keras' gamma, beta, moving_mean, moving_variance are put here by their readers
ROLES = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
STATISTICS = ("running_mean", "running_var")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file: its header, and its values once somebody asks.

    Attributes:
        name: in the file.
        shape: of it.
        dtype: "float32", "bfloat16", "int64", ...
        load: reads the values: bfloat16 as float32, everything else as it is stored.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    load: Callable[[], np.ndarray]

    def values(self) -> np.ndarray:
        """In float64."""
        # signalling NaN are "invalid" to the processor: they are values of a file like others
        with np.errstate(invalid="ignore"):
            return self.load().astype(np.float64)


@dataclass(frozen=True)
class Layer:
    """A batch normalization layer.

    Attributes:
        path: name of the layer, such as "features.1"; "" if the file holds one layer alone.
        framework: "torch", "tensorflow" or "keras"; decides what the variance and the momentum mean.
        tensors: by role, those of :data:`ROLES` that there are.
        expected: roles that the file itself, its graph or configuration, says there should be.
        num_features: C.
        eps: where known.
        momentum: weight of the new batch, where known.
        sure: whether this is known to be batch normalization: False where only names and shapes suggest it.
    """

    path: str
    framework: str
    tensors: dict[str, StoredTensor]
    expected: frozenset[str]
    num_features: int
    eps: float | None = None
    momentum: float | None = None
    sure: bool = True

    def has(self, *roles: str) -> bool:
        return all(role in self.tensors for role in roles)

    def values(self, role: str) -> np.ndarray:
        """Float64, shape (C,), or () for the counter."""
        return self.tensors[role].values()


@dataclass
class Checkpoint:
    """A file that was read, or a state dict in memory.

    Attributes:
        source: the path, as it was given, or "state dict".
        format: "torch", "safetensors", "tensorflow", "saved_model", "keras", "keras weights" or "state dict".
        tensors: all, by name, in the order of the file.
        layers: BN layers, in the order of the file.
        faults: what is wrong with the container itself, by kind: see the rules BN001 to BN005.
        facts: what else the file tells, plain JSON.
    """

    source: str
    format: str
    tensors: dict[str, StoredTensor]
    layers: list[Layer]
    faults: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
