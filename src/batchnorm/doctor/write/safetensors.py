"""Writes safetensors files."""

import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from batchnorm.doctor.checkpoint import StoredTensor
from batchnorm.doctor.read.dtypes import SIZES
from batchnorm.doctor.read.safetensors import DTYPES
from batchnorm.doctor.write.raw import raw_bytes, size_of
from batchnorm.errors import DataError
from batchnorm.files import write_atomic

CODES = {dtype: code for code, dtype in DTYPES.items()}
# the format wants the values to begin at a multiple of it
ALIGNMENT = 8
METADATA = "__metadata__"


def write_safetensors(path: Path, tensors: Mapping[str, StoredTensor], metadata: Mapping[str, str]) -> None:
    """Write tensors by their names, whole or not at all; identical input gives identical bytes.

    Args:
        path: of the file; one that exists is replaced.
        tensors: by name; :func:`unfit` says which cannot be written.
        metadata: of the file.

    Raises:
        DataError: the values of a tensor cannot be read.
        OSError: the disk is full or the folder cannot be written.

    Source:
        The format's README, https://github.com/huggingface/safetensors.
    """
    # as the reference implementation has them, so that every tensor is aligned
    order = sorted(tensors, key=lambda name: (-SIZES[tensors[name].dtype], name))
    header: dict[str, object] = {METADATA: dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        begin, end = end, end + size_of(tensors[name])
        dtype, shape = CODES[tensors[name].dtype], list(tensors[name].shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    write_atomic(path, chunks(struct.pack("<Q", len(text)) + text, (tensors[name] for name in order)))


def chunks(head: bytes, tensors: Iterable[StoredTensor]) -> Iterator[bytes]:
    yield head
    for tensor in tensors:
        raw = raw_bytes(tensor)
        if len(raw) != size_of(tensor):
            raise DataError(f"{tensor.name}: has {len(raw)} bytes, expected {size_of(tensor)}")
        yield raw


def unfit(name: str, tensor: StoredTensor) -> str:
    """Why a tensor cannot be in such a file, or ""."""
    if tensor.dtype not in CODES:
        return f"safetensors has no type {tensor.dtype}"
    if name == METADATA or any("\ud800" <= character <= "\udfff" for character in name):
        return "safetensors does not allow its name"
    return ""
