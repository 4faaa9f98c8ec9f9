"""Writes what ``torch.load`` reads: a copy of a file, with some tensors replaced or added."""

import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from batchnorm.doctor.checkpoint import StoredTensor
from batchnorm.doctor.read.source import shown
from batchnorm.doctor.write.raw import raw_bytes
from batchnorm.errors import DataError
from batchnorm.files import write_atomic


def write_torch(path: Path, document: Any, changed: Mapping[str, StoredTensor]) -> None:
    """Write a document, which is changed on the way, whole or not at all.

    Args:
        path: of the file; one that exists is replaced.
        document: what the source holds, as ``torch.load`` returns it.
        changed: tensors by their path through the document, such as "state_dict.bn1.running_mean".

    Raises:
        DataError: there is nothing at a path, nor anything that it could be put into.
        OSError: the disk is full or the folder cannot be written.
    """
    places = list(mappings(document, ""))
    for name, tensor in changed.items():
        holder, key = place_of(places, name)
        holder[key] = as_torch(tensor)
    buffer = io.BytesIO()
    torch.save(document, buffer)
    write_atomic(path, buffer.getvalue())


def mappings(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """All dicts of a document by their paths, outer ones first."""
    if isinstance(value, dict):
        yield path, value
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    for key, part in parts:
        yield from mappings(part, f"{path}.{key}" if path else str(key))


def place_of(places: list[tuple[str, Any]], name: str) -> tuple[dict[str, Any], str]:
    """The dict that has a tensor, or has one of the same layer, and its key there."""
    for path, mapping in places:
        key = name[len(path) + 1 :] if path else name
        if (not path or name.startswith(f"{path}.")) and isinstance(mapping.get(key), Tensor):
            return mapping, key
    for path, mapping in places:
        key = name[len(path) + 1 :] if path else name
        layer = key.rpartition(".")[0]
        inside = not path or name.startswith(f"{path}.")
        if inside and any(isinstance(other, str) and other.rpartition(".")[0] == layer for other in mapping):
            return mapping, key
    raise DataError(f"there is no place for {shown(name)} in this file: write .safetensors instead")


def as_torch(tensor: StoredTensor) -> Tensor:
    """The same bytes in a tensor of its own memory."""
    dtype = getattr(torch, tensor.dtype)
    raw = raw_bytes(tensor)
    if not raw:
        return torch.empty(tensor.shape, dtype=dtype)
    return torch.frombuffer(np.frombuffer(raw, "u1").copy(), dtype=dtype).reshape(tensor.shape)
