"""Opens a checkpoint of any known format: what a file is, its contents decide, not its name."""

import re
from collections.abc import Callable
from pathlib import Path

from batchnorm.doctor.checkpoint import Checkpoint
from batchnorm.doctor.read.faults import Faults
from batchnorm.doctor.read.keras import read_keras
from batchnorm.doctor.read.safetensors import read_safetensors
from batchnorm.doctor.read.saved_model import read_saved_model
from batchnorm.doctor.read.shards import read_index
from batchnorm.doctor.read.source import Source, shown
from batchnorm.doctor.read.table import Table
from batchnorm.doctor.read.tensorflow import read_tensorflow
from batchnorm.doctor.read.torch_legacy import MAGIC, read_pickle, read_torch_legacy, read_torch_tar
from batchnorm.doctor.read.torch_zip import read_torch_zip
from batchnorm.doctor.read.zip_directory import read_directory
from batchnorm.errors import DataError

HEAD = 4096
EXPECTED = "expected a checkpoint: torch (.pt, .pth, .ckpt, .bin), .safetensors, TensorFlow or Keras"
IN_FOLDERS = (
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
    "diffusion_pytorch_model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin",
    "diffusion_pytorch_model.safetensors",
)
KERAS_MEMBERS = {"config.json", "model.weights.h5"}
# the last bytes of a table of LevelDB, which TensorFlow's .index files are
LEVELDB = b"\x57\xfb\x80\x8b\x24\x75\x47\xdb"
TENSORFLOW_PART = re.compile(r"\.(meta|data-\d{5}-of-\d{5})$")
HTML = (b"<!doctype html", b"<html", b"<?xml")
REFUSED = (
    (b"\x1f\x8b", "is compressed with gzip; unpack it first, for example with gunzip"),
    (b"BZh", "is compressed with bzip2; unpack it first"),
    (b"\xfd7zXZ", "is compressed with xz; unpack it first"),
    (b"\x28\xb5\x2f\xfd", "is compressed with zstd; unpack it first"),
    (b"7z\xbc\xaf", "is a 7z archive; unpack it first"),
    (b"GGUF", f"is a GGUF file; {EXPECTED}"),
    (b"\x93NUMPY", f"is a NumPy array; {EXPECTED}"),
)
FORMATS: dict[str, tuple[str, Callable[[Source], Table]]] = {
    "torch archive": ("torch", read_torch_zip),
    "legacy torch": ("torch", read_torch_legacy),
    "torch tar": ("torch", read_torch_tar),
    "pickle": ("torch", read_pickle),
    "safetensors": ("safetensors", read_safetensors),
}


def read(path: str | Path) -> Checkpoint:
    """Read a checkpoint without running anything that it contains.

    Tensors are named by their path through the file, "state_dict.layer1.0.bn1.weight"; ``facts["state_dicts"]`` has
    the paths of the state dicts, here "state_dict". Values are read when somebody asks for them.

    Args:
        path: a file, the index of a checkpoint in several files, or a folder with one.

    Returns:
        Its tensors, BN layers, and what is wrong with the container.

    Raises:
        DataError: it cannot be read at all; the message says what it is, what was expected and what to try.

    Example:
        >>> import tempfile, torch
        >>> path = tempfile.mkdtemp() + "/model.pth"
        >>> torch.save(torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3)).state_dict(), path)
        >>> [(layer.path, layer.num_features) for layer in read(path).layers]
        [('1', 3)]
    """
    place = Path(path)
    if place.is_dir():
        return read_folder(place)
    if not place.exists() and place.with_name(f"{place.name}.index").is_file():
        return read_elsewhere("TensorFlow checkpoint", path)
    if place.name == "saved_model.pb":
        return read_elsewhere("SavedModel", path)
    source = Source(path)
    kind = kind_of(source)
    if kind == "index":
        return read_shards(source)
    if kind in FORMATS:
        format, reader = FORMATS[kind]
        return reader(source).checkpoint(format)
    return read_elsewhere(kind, path)


def read_elsewhere(kind: str, path: str | Path) -> Checkpoint:
    """The formats of TensorFlow and Keras: a "TensorFlow checkpoint", a "SavedModel" or a "Keras file"."""
    readers = {"TensorFlow checkpoint": read_tensorflow, "SavedModel": read_saved_model, "Keras file": read_keras}
    return readers[kind](path)


def read_folder(folder: Path) -> Checkpoint:
    """The checkpoint that a folder is known to hold by the names of its files."""
    names = {entry.name for entry in folder.iterdir()}
    if "saved_model.pb" in names:
        return read_elsewhere("SavedModel", folder)
    if known := [name for name in IN_FOLDERS if name in names]:
        return read(folder / known[0])
    if "checkpoint" in names or any(name.endswith(".index") for name in names):
        return read_elsewhere("TensorFlow checkpoint", folder)
    if ".metadata" in names:
        raise DataError(
            f"{folder}: is a distributed checkpoint of torch; join it to one file with "
            "python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE"
        )
    raise DataError(f"{folder}: is a folder without a checkpoint whose name is known; name the file itself")


def read_shards(source: Source) -> Checkpoint:
    kinds: list[str] = []

    def read_one(shard: Source) -> Table:
        kind = kind_of(shard)
        if kind not in FORMATS:
            raise shard.error(f"is a part of a checkpoint, but neither of torch nor safetensors: {kind}")
        format, reader = FORMATS[kind]
        kinds.append(format)
        return reader(shard)

    return read_index(source, read_one).checkpoint(kinds[0] if kinds else "torch")


def kind_of(source: Source) -> str:
    """A name in :data:`FORMATS`, "index", or what is read elsewhere.

    Raises:
        DataError: the file is none of these.
    """
    if source.size == 0:
        raise source.error(f"is empty; {EXPECTED}")
    head = source.read_up_to(0, HEAD)
    for signature, problem in REFUSED:
        if head.startswith(signature):
            raise source.error(problem)
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return "Keras file" if (read_directory(source, Faults()) or {}).keys() >= KERAS_MEMBERS else "torch archive"
    if head.startswith(MAGIC):
        return "legacy torch"
    if head.startswith(b"\x89HDF\r\n\x1a\n"):
        return "Keras file"
    if head[257:262] == b"ustar":
        return "torch tar"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 40:
        return "safetensors"
    if source.read(max(0, source.size - 8), min(8, source.size)) == LEVELDB or TENSORFLOW_PART.search(source.name):
        return "TensorFlow checkpoint"
    if head[0] == 0x80 and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "pickle"
    return kind_of_text(source, head)


def kind_of_text(source: Source, head: bytes) -> str:
    """For what is no binary file of a known format."""
    start = head.lstrip()
    if head.startswith(b"version https://git-lfs"):
        size = re.search(rb"size (\d{1,20})", head)
        wanted = f" of {size[1].decode()} bytes" if size else ""
        raise source.error(f"is a git-lfs pointer to a file{wanted}, not that file; fetch it with git lfs pull")
    if start[:20].lower().startswith(HTML):
        raise source.error(
            "is a web page, not a checkpoint: the download answered with a message; open it in a browser"
        )
    if start.startswith(b"{"):
        return "index"
    if head.startswith(b"model_checkpoint_path:"):
        return "TensorFlow checkpoint"
    if not head.strip(b"\0"):
        raise source.error(f"begins with {len(head)} zero bytes: it was not written whole; {EXPECTED}")
    if all(byte >= 32 or byte in b"\t\n\r\f" for byte in head):
        raise source.error(f"is a text that begins {shown(head[:40].decode('utf-8', 'replace'))}; {EXPECTED}")
    raise source.error(f"begins with the bytes {head[:8].hex(' ')}, which no known format does; {EXPECTED}")
