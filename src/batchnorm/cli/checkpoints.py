"""Checkpoints as files: a state_dict, alone or inside what a trainer saves, read without running code of the file."""

import copy
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from batchnorm.doctor.write.documents import SAFETENSORS, read_tensors
from batchnorm.errors import DataError
from batchnorm.files import write_atomic
from batchnorm.report.text import clean

# Where trainers keep the state_dict, the usual ones first; it counts where a file holds several
USUAL_KEYS = ("state_dict", "model_state_dict", "model", "net", "network")
# What wrappers put before every name: DataParallel and DistributedDataParallel, torch.compile
WRAPPERS = ("module.", "_orig_mod.")
EXTRA_STATE = "_extra_state"


class Checkpoint(NamedTuple):
    """What a file holds.

    Attributes:
        path: of the file.
        document: all of it; of a safetensors file the tensors.
        state: the state_dict, a part of the document or all of it, with the names of the file.
        metadata: of a safetensors file.
    """

    path: Path
    document: Any
    state: dict[str, Any]
    metadata: dict[str, str] | None


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a ``.safetensors`` file, or whatever ``torch.save`` wrote.

    Raises:
        OSError: there is no such file, or it cannot be read.
        DataError: it is damaged, holds no state_dict, or more than data.
    """
    document, metadata = read_tensors(path)
    return Checkpoint(path, document, state_within(path, document), metadata)


def state_within(path: Path, document: Any) -> dict[str, Any]:
    """The state_dict: the document itself, or one of its values."""
    if is_state_dict(document):
        return document
    found = {key: value for key, value in document.items() if is_state_dict(value)} if is_mapping(document) else {}
    names = [key for key in USUAL_KEYS if key in found] or list(found)
    if not found:
        holds = (
            f"a dict of {listing(document) or 'nothing'}" if is_mapping(document) else f"a {type(document).__name__}"
        )
        raise DataError(f"{path} holds no state_dict, but {holds}")
    if names[0] not in USUAL_KEYS and len(found) > 1:
        raise DataError(f"{path} holds several state_dicts, {listing(found)}: save the one that is meant alone")
    return found[names[0]]


def is_mapping(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)


def is_state_dict(value: Any) -> bool:
    """Names with tensors; a module may add anything under ``_extra_state``."""
    if not is_mapping(value) or not any(isinstance(item, Tensor) for item in value.values()):
        return False
    return all(isinstance(item, Tensor) or name.endswith(EXTRA_STATE) for name, item in value.items())


def listing(names: Iterable[str], limit: int = 5) -> str:
    """The first names of many, in quotes."""
    quoted = [repr(clean(str(name))) for name in names]
    return ", ".join(quoted[:limit]) + (f" and {len(quoted) - limit} more" if len(quoted) > limit else "")


def unwrapped(state: Mapping[str, Any], model: nn.Module) -> tuple[dict[str, Any], str]:
    """The state_dict with the model's names, and what a wrapper had put before them."""
    expected = model.state_dict().keys()
    names = copied(state)
    prefix = ""
    while not any(name in names for name in expected):
        wrapper = next((one for one in WRAPPERS if all(name.startswith(one) for name in names)), None)
        if wrapper is None:
            return copied(state), ""
        consume_prefix_in_state_dict_if_present(names, wrapper)
        prefix += wrapper
    return names, prefix


def copied(state: Mapping[str, Any]) -> dict[str, Any]:
    """A copy that shares the tensors and has metadata of its own, which tells modules the version of their state."""
    names = copy.copy(state)
    assert isinstance(names, dict)
    if hasattr(names, "_metadata"):
        names._metadata = dict(names._metadata)  # pyright: ignore[reportAttributeAccessIssue]
    return names


def write_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write what a checkpoint holds, in the format that its own file has; the new file is whole or absent."""
    if checkpoint.path.suffix == SAFETENSORS:
        write_atomic(path, safetensors.torch.save(checkpoint.state, checkpoint.metadata))
    else:
        write_atomic(path, torch_bytes(checkpoint.document))


def torch_bytes(document: Any) -> bytes:
    """What ``torch.save`` writes."""
    buffer = io.BytesIO()
    torch.save(document, buffer)
    return buffer.getvalue()
