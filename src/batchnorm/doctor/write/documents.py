"""Whole files of torch and safetensors, to be written again with everything else that they hold."""

import argparse
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch

from batchnorm.errors import DataError
from batchnorm.report.text import clean

SAFETENSORS = ".safetensors"
SCALAR = np.float64(0).__reduce__()[0]
# Plain values besides torch's that trainers save: options, and numbers of NumPy, under its new name and its old one
PLAIN = [
    argparse.Namespace,
    np.dtype,
    *(type(np.dtype(kind)) for kind in "?bhilqBHILQefd"),
    *((SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]
UNSAFE = re.compile(r"GLOBAL (\S+) was not an allowed global|unsupported GLOBAL (\S+) whose module")


def read_tensors(path: Path) -> tuple[Any, dict[str, str] | None]:
    """All that a file holds, on the CPU, and the metadata of a safetensors file."""
    path.open("rb").close()
    try:
        if path.suffix == SAFETENSORS:
            with safetensors.safe_open(path, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
        with warnings.catch_warnings(), torch.serialization.safe_globals(PLAIN):
            # about files that it then cannot read
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True), None
    except Exception as error:
        unsafe = UNSAFE.search(str(error))
        if unsafe:
            raise DataError(
                f"{path} holds an object of {unsafe[1] or unsafe[2]}, and to read it would run code that the file "
                "names: save model.state_dict() alone, or with plain numbers and strings"
            ) from error
        raise DataError(f"{path} is no checkpoint, or damaged ({reason(error)})") from error


def reason(error: Exception) -> str:
    """What torch found, in its first sentence: then comes advice, such as to trust the file."""
    text = str(error).split("WeightsUnpickler error: ")[-1].strip()
    return clean(text.splitlines()[0].split(". ")[0] if text else type(error).__name__)
