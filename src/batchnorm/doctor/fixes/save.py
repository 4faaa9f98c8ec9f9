"""Writes what was repaired: as safetensors, or in the format of the source."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors

from batchnorm.doctor.checkpoint import Checkpoint, StoredTensor
from batchnorm.doctor.read.source import shown
from batchnorm.doctor.write.documents import SAFETENSORS, read_tensors
from batchnorm.doctor.write.safetensors import unfit, write_safetensors
from batchnorm.doctor.write.tensorflow import write_tensorflow
from batchnorm.doctor.write.torch import write_torch
from batchnorm.errors import DataError

if TYPE_CHECKING:
    from batchnorm.doctor.fixes.result import Repair

# formats that can be written again with everything else that the source holds
REWRITTEN = ("torch", "tensorflow")
TF_ENDINGS = (".index", ".meta")


def save(repaired: "Repair", path: Path, *, force: bool) -> list[Path]:
    """See :meth:`batchnorm.doctor.fixes.result.Repair.save`."""
    if repaired.checkpoint is None:
        raise DataError(f"{path}: a live model is saved with torch.save(repaired.model.state_dict(), path)")
    check_path(repaired.checkpoint, path, force)
    source = Path(repaired.source)
    if path.suffix == SAFETENSORS:
        write_safetensors(path, fitting(repaired)[0], metadata_of(repaired.checkpoint))
        return [path]
    changed = {change.name: repaired.tensors[change.name] for change in repaired.comparison.changed}
    if repaired.format == "tensorflow":
        return write_tensorflow(source, prefix_of(path), {name: tensor.load() for name, tensor in changed.items()})
    write_torch(path, read_tensors(source)[0], changed)
    return [path]


def check_path(checkpoint: Checkpoint, path: Path, force: bool) -> None:
    """Refuse to write where, or in a format in which, nothing can be written.

    Raises:
        DataError: the path is the source or a folder, or there is no folder for it; a format that is neither
            safetensors nor that of the source.
        FileExistsError: there is such a file.
    """
    source = Path(checkpoint.source)
    if path.suffix != SAFETENSORS and (checkpoint.format not in REWRITTEN or "shards" in whole_facts(checkpoint)):
        raise DataError(f"{path}: what comes from {checkpoint.format} in this form is written as {SAFETENSORS} alone")
    if path.exists() and source.exists() and path.samefile(source):
        raise DataError(f"{path} is the source itself, which stays as it is: choose another name")
    if path.is_dir() or not path.parent.is_dir():
        raise DataError(f"{path} is a folder" if path.is_dir() else f"there is no folder {path.parent} for {path.name}")
    if checkpoint.format == "tensorflow" and path.suffix != SAFETENSORS:
        if Path(f"{prefix_of(path)}.index").exists():
            raise FileExistsError(f"{path} exists already, and a TensorFlow checkpoint is never overwritten")
        return
    if path.exists() and not force:
        raise FileExistsError(f"{path} exists already: choose another name, or overwrite it with --force (force=True)")


def whole_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """What makes a file of torch one of several; TensorFlow's checkpoints are in several anyway."""
    return checkpoint.facts if checkpoint.format == "torch" else {}


def prefix_of(path: Path) -> Path:
    """Of a TensorFlow checkpoint, where one of its files may be named."""
    return path.with_suffix("") if path.suffix in TF_ENDINGS else path


def fitting(repaired: "Repair") -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors that safetensors can hold, and why others are left out, by name."""
    assert repaired.checkpoint is not None
    tensors = of_the_model(repaired.checkpoint)
    unread = {id(repaired.tensors[name]) for name, each in repaired.comparison.unchanged.items() if each is None}
    out = {name: why for name, tensor in tensors.items() if (why := unfit(name, tensor))}
    out |= {name: "its values cannot be read" for name, tensor in tensors.items() if id(tensor) in unread}
    return {name: tensor for name, tensor in tensors.items() if name not in out}, out


def of_the_model(checkpoint: Checkpoint) -> dict[str, StoredTensor]:
    """The tensors of the state dict that has the BN layers, by their names there; all of them if several have."""
    layers = [layer.path for layer in checkpoint.layers]
    for path in checkpoint.facts.get("state_dicts", []):
        if path and layers and all(f"{layer}.".startswith(f"{path}.") for layer in layers):
            start = len(path) + 1
            return {name[start:]: value for name, value in checkpoint.tensors.items() if name.startswith(f"{path}.")}
    return checkpoint.tensors


def metadata_of(checkpoint: Checkpoint) -> dict[str, str]:
    """What the source has; else what transformers expects of a file of torch."""
    if checkpoint.format == "safetensors" and "shards" not in checkpoint.facts:
        with safetensors.safe_open(checkpoint.source, "np") as file:
            return file.metadata() or {}
    return {"format": "pt"} if checkpoint.format in ("torch", "state dict", "safetensors") else {}


def left_out(repaired: "Repair") -> dict[str, str]:
    """Why a safetensors file has no tensor of these names."""
    assert repaired.checkpoint is not None
    kept = {tensor.name for tensor in of_the_model(repaired.checkpoint).values()}
    others = {name: "they are none of the model" for name in repaired.tensors if name not in kept}
    return {shown(name): why for name, why in (fitting(repaired)[1] | others).items()}
