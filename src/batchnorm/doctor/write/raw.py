"""The bytes of a tensor as its file stores them, its digest, and tensors of new values."""

import hashlib
import math

import numpy as np

from batchnorm.doctor.checkpoint import StoredTensor
from batchnorm.doctor.read.dtypes import PLAIN, SIZES
from batchnorm.errors import DataError


def raw_bytes(tensor: StoredTensor) -> bytes:
    """Little-endian, in the dtype of the tensor and the order of its elements.

    Raises:
        DataError: the values cannot be read, or are no numbers.

    Example:
        >>> raw_bytes(StoredTensor("one", (2,), "bfloat16", lambda: np.float32([1, -2]))).hex(" ")
        '80 3f 00 c0'
    """
    values = np.ascontiguousarray(tensor.load())
    if tensor.dtype in PLAIN:
        return values.astype("<" + PLAIN[tensor.dtype]).tobytes()
    if tensor.dtype == "bool":
        return values.astype("u1").tobytes()
    if tensor.dtype == "bfloat16":
        # it was widened to float32, so the lower half is 0
        return (values.astype("f4", copy=False).view("u4") >> 16).astype("<u2").tobytes()
    if tensor.dtype not in SIZES:
        raise DataError(f"{tensor.name}: values of type {tensor.dtype} cannot be written")
    import torch

    return torch.from_numpy(values).to(getattr(torch, tensor.dtype)).view(torch.uint8).numpy().tobytes()


def digest(tensor: StoredTensor) -> str | None:
    """SHA-256 of :func:`raw_bytes`; None if the values cannot be read."""
    try:
        return hashlib.sha256(raw_bytes(tensor)).hexdigest()
    except DataError:
        return None


def size_of(tensor: StoredTensor) -> int:
    """Of :func:`raw_bytes`."""
    return math.prod(tensor.shape) * SIZES[tensor.dtype]


def new_tensor(name: str, values: np.ndarray) -> StoredTensor:
    """A tensor with these values and their dtype."""
    kept = np.array(values)
    return StoredTensor(name, kept.shape, kept.dtype.name, lambda: kept)
