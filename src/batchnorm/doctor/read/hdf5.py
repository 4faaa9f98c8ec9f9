"""HDF5 files, read in a process of their own: the C library may crash, hang or fill the memory on bytes made for that.

That process has a limit of memory and of time, and sends back names, shapes and short vectors. Whatever happens to it
is one line here.
"""

import importlib.util
import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from batchnorm.doctor.checkpoint import StoredTensor
from batchnorm.doctor.read import hdf5_child
from batchnorm.doctor.read.source import Source, shown
from batchnorm.errors import MissingExtraError

# addresses; of them Python, NumPy and h5py take about 0.3 GB. What is asked for comes on top
CHILD_MEMORY = 2 << 30
CHILD_SECONDS = 10
# a machine with much to do
PATIENCE = 90
LARGEST_TENSOR = 1 << 31
# no filters that a file could ask to be loaded from somewhere; one thread
ENVIRONMENT = {"HDF5_PLUGIN_PRELOAD": "::", "HDF5_USE_FILE_LOCKING": "FALSE", "OPENBLAS_NUM_THREADS": "1"}
KEPT = ("PATH", "LD_LIBRARY_PATH", "SYSTEMROOT", "LANG")


@dataclass(frozen=True)
class Hdf5:
    """What a file holds.

    Attributes:
        tensors: by path.
        names: the attribute "name" of groups, by the path of the group.
        texts: "model_config", "keras_version", "backend" of the root, those that there are.
        unreadable: names of tensors that hold no numbers.
        refused: what was not followed, by path: links, and datasets that lie in other files.
    """

    tensors: dict[str, StoredTensor]
    names: dict[str, str]
    texts: dict[str, str]
    unreadable: set[str]
    refused: dict[str, str]


def read_hdf5(source: Source, start: int = 0, size: int | None = None) -> Hdf5:
    """List a file, with the values of its short vectors; others are read when asked for, in a process each.

    Args:
        source: the file.
        start: where HDF5 begins in it.
        size: of HDF5; all the rest if None.

    Raises:
        MissingExtraError: h5py is not installed.
        DataError: the file is damaged or cannot be read within the limits.
    """
    if importlib.util.find_spec("h5py") is None:
        raise MissingExtraError("reading Keras files needs h5py. Try: pip install 'batchnorm[keras]'")
    size = source.size - start if size is None else size
    header, values = ask(source, start, size)
    tensors, at = {}, 0
    for name, shape, dtype, code, following in header["tensors"]:
        count = math.prod(shape) * (np.dtype(code).itemsize if code else 0)
        load = partial(load_later, source, start, size, name, count)
        if following >= 0:
            load = partial(decoded, values[at : at + following], tuple(shape), dtype, code)
            at += following
        tensors[name] = StoredTensor(name, tuple(shape), dtype, load)
    unreadable = {name for name, _, _, code, _ in header["tensors"] if not code}
    return Hdf5(tensors, header["names"], header["texts"], unreadable, dict(header["refused"]))


def load_later(source: Source, start: int, size: int, name: str, count: int) -> np.ndarray:
    """The values of one dataset of so many bytes."""
    if count > LARGEST_TENSOR:
        raise source.error(f"{shown(name)} has {count:,} bytes, more than is read at once")
    header, values = ask(source, start, size, name, count)
    for found, shape, dtype, code, following in header["tensors"]:
        if found == name and following >= 0:
            return decoded(values, tuple(shape), dtype, code)
    raise source.error(f"{shown(name)} holds no numbers: such datasets are listed, not read")


def decoded(values: bytes, shape: tuple[int, ...], dtype: str, code: str) -> np.ndarray:
    """Numbers as they are, bfloat16 as float32."""
    if dtype == "bfloat16":
        return (np.frombuffer(values, "<u2").astype("u4") << 16).view("f4").reshape(shape)
    return np.frombuffer(values, code).reshape(shape)


def ask(source: Source, start: int, size: int, name: str = "", count: int = 0) -> tuple[dict[str, Any], bytes]:
    """Run the child: its header, and the values that follow."""
    program = [sys.executable, "-I", hdf5_child.__file__, str(CHILD_MEMORY + 3 * count), str(CHILD_SECONDS)]
    environment = {key: os.environ[key] for key in KEPT if key in os.environ} | ENVIRONMENT
    command = [*program, str(source.path.resolve()), str(start), str(size), *([name] if name else [])]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as child:
        try:
            output, errors = child.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            child.kill()
            raise source.error(f"HDF5 could not be read in {PATIENCE} s: damaged, or made to take long") from None
    if child.returncode != 0:
        raise source.error(f"HDF5 cannot be read: {reason(child.returncode, errors)}")
    length = int.from_bytes(output[:8], "little")
    return json.loads(output[8 : 8 + length]), output[8 + length :]


def reason(code: int, errors: bytes) -> str:
    """The child's end in a few words."""
    lines = errors.decode("utf-8", "replace").strip().splitlines()
    if code < 0:
        return f"the HDF5 library died of signal {-code}: damaged, or over the limits of memory and time"
    return shown(lines[-1]) if lines else f"the reading process ended with {code}"
