"""Inputs for a model: what the user's code yields, or a file of arrays whose first axis counts samples."""

import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from batchnorm.cli.checkpoints import SAFETENSORS, listing, read_tensors
from batchnorm.cli.user_code import UserCodeError, failures, find
from batchnorm.errors import DataError
from batchnorm.report.text import clean

NUMPY = (".npy", ".npz")
FILES = (*NUMPY, ".pt", ".pth", SAFETENSORS)
SIZE = re.compile(r"\d+(,\d+)*")
EXAMPLE_SAMPLES = 8
# Kinds of NumPy's dtypes that are numbers
NUMBERS = "biufc"


class Samples:
    """An array in batches of nearly the same size: BN cannot normalize by a rest of a single sample."""

    def __init__(self, values: np.ndarray | Tensor, batch_size: int) -> None:
        self.values = values
        self.batches: int | None = -(-len(values) // batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        count = self.batches or 0
        bounds = [len(self.values) * i // max(count, 1) for i in range(count + 1)]
        for start, stop in itertools.pairwise(bounds):
            yield as_tensor(self.values[start:stop])


class Loader:
    """What the user's code yields, each time from the beginning; ``batches`` is known at the first item, if at all."""

    def __init__(self, target: str) -> None:
        self.target = target
        found = find(target)
        is_loader = hasattr(found, "__iter__") and not isinstance(found, type)
        if not is_loader and not callable(found):
            raise UserCodeError(
                f"{target} is of type {type(found).__name__}: expected a loader, or a function that returns one"
            )
        self.make: Callable[[], Any] = (lambda: found) if is_loader else found
        self.batches: int | None = None

    def __iter__(self) -> Iterator[Any]:
        with failures(self.target):
            loader: Any = self.make()
            iterator = iter(loader)
            self.batches = len(loader) if hasattr(loader, "__len__") else None
        end = object()
        while True:
            with failures(self.target):
                item = next(iterator, end)
            if item is end:
                return
            yield item


def open_inputs(source: str, batch_size: int) -> Samples | Loader:
    """``package.module:name``, ``path/to/file.py:name``, or a file, ``FILE:NAME`` if it has several arrays."""
    path, name = split_name(source)
    return Samples(read_array(path, name), batch_size) if path.suffix in FILES else Loader(source)


def first_input(source: str) -> Tensor:
    """One input: random numbers of a size such as "2,3,8,8", or the first batch of a file or loader."""
    if SIZE.fullmatch(source):
        item = torch.randn([int(size) for size in source.split(",")], generator=torch.Generator().manual_seed(0))
    else:
        item = next(iter(open_inputs(source, EXAMPLE_SAMPLES)), None)
    input = item[0] if isinstance(item, (tuple, list)) and item else item
    if not isinstance(input, Tensor) or input.numel() == 0:
        raise DataError(f"{source}: expected a batch of inputs, found {described(input)}")
    return input


def is_file(source: str) -> bool:
    return split_name(source)[0].suffix in FILES


def split_name(source: str) -> tuple[Path, str]:
    """A file, and which of its arrays is meant."""
    head, _, name = source.rpartition(":")
    return (Path(head), name) if Path(head).suffix in FILES else (Path(source), "")


def read_array(path: Path, name: str) -> np.ndarray | Tensor:
    """The array of a file, or the one of this name."""
    content = read_numpy(path) if path.suffix in NUMPY else read_tensors(path)[0]
    if name or isinstance(content, dict):
        content = choose(path, content if isinstance(content, dict) else {}, name)
    if not isinstance(content, (np.ndarray, Tensor)) or content.ndim == 0:
        raise DataError(f"{path}: expected an array whose first axis counts samples, found {described(content)}")
    if isinstance(content, np.ndarray) and content.dtype.kind not in NUMBERS:
        raise DataError(f"{path}: expected numbers, found {content.dtype}")
    return content


def read_numpy(path: Path) -> Any:
    """An array, which stays on the disk until its values are needed, or all arrays of an archive by name."""
    path.open("rb").close()
    try:
        content = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(content, np.ndarray):
            return content
        with content:
            return dict(content)
    except Exception as error:
        raise DataError(f"{path} is no array of numbers, or damaged ({clean(str(error))})") from error


def choose(path: Path, arrays: dict[str, Any], name: str) -> Any:
    if name in arrays:
        return arrays[name]
    if name:
        has = f"it has {listing(arrays)}" if arrays else "it holds one array without a name"
        raise DataError(f"{path} has no array {name!r}: {has}")
    if len(arrays) != 1:
        example = f"{path}:{next(iter(arrays), 'NAME')}"
        raise DataError(f"{path} holds {listing(arrays) or 'nothing'}: name one array, as in {example}")
    return next(iter(arrays.values()))


def described(value: Any) -> str:
    if isinstance(value, (np.ndarray, Tensor)):
        return f"an array of size {tuple(value.shape)}" if value.ndim else "a single number"
    return "nothing" if value is None else f"something of type {type(value).__name__}"


def as_tensor(values: np.ndarray | Tensor) -> Tensor:
    """A tensor of its own memory, in this machine's byte order."""
    if isinstance(values, Tensor):
        return values
    return torch.from_numpy(np.array(values, dtype=values.dtype.newbyteorder("=")))
