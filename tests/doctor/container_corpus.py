"""Files that are damaged, hostile or of other frameworks: what rules about containers and readers are measured on.

``make`` of a case writes into a folder and returns the path.
"""

import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from batchnorm.doctor.read.leveldb import read_table
from batchnorm.doctor.write.leveldb import write_table
from doctor.cases import Case, fault, healthy, missed
from doctor.networks import trained
from hostile_files import entry, state_dict, tensor, torch_file, write_safetensors

FILES = Path(__file__).parent / "files"
FOUR = ("archive/data/0", bytes(16))
PLAIN = state_dict(a=tensor("0", 4, [4], [1]))
Make = Callable[[Path], Path]


def saved(contents: Callable[[], Any], **options: Any) -> Make:
    def make(folder: Path) -> Path:
        torch.save(contents(), folder / "model.pt", **options)
        return folder / "model.pt"

    return make


def state() -> dict[str, Any]:
    return trained().state_dict()


def by_hand(pickle: bytes, *others: tuple[str, Any]) -> Make:
    return lambda folder: torch_file(folder / "model.pt", pickle, *others)


def attack(name: str) -> Make:
    """A call of a function, given as its module and name, besides a tensor."""
    call = f"c{name.replace(' ', chr(10), 1)}\n".encode() + b"(X\x04\x00\x00\x00truetR0"
    return by_hand(b"\x80\x02" + call + PLAIN[2:], FOUR)


def with_flipped_bit(storage: int, byte: int, contents: Callable[[], Any] = state) -> Make:
    """0x40 in a byte of the values of a tensor, given by its place in the file."""

    def make(folder: Path) -> Path:
        path = saved(contents)(folder)
        with zipfile.ZipFile(path) as archive:
            (name,) = [name for name in archive.namelist() if name.endswith(f"data/{storage}")]
            offset = archive.getinfo(name).header_offset
        data = bytearray(path.read_bytes())
        # the data of a member begin behind its header, name and padding
        start = offset + 30 + data[offset + 26] + data[offset + 28]
        data[start + byte] ^= 0x40
        path.write_bytes(data)
        return path

    return make


def packed_again(folder: Path, contents: Callable[[], Any] = state) -> Path:
    path = folder / "again.pt"
    with (
        zipfile.ZipFile(saved(contents)(folder)) as archive,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as again,
    ):
        for name in archive.namelist():
            again.writestr(name, archive.read(name))
    return path


def bomb(folder: Path) -> Path:
    """64 MiB in 66 KB."""
    path = folder / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", state_dict(a=tensor("0", 1 << 24, [1 << 24], [1])))
        archive.writestr("archive/data/0", bytes(1 << 26))
    return path


def with_shared_bytes(folder: Path) -> Path:
    path = by_hand(PLAIN, FOUR, ("archive/data/1", b""))(folder)
    data = bytearray(path.read_bytes())
    # the last entry of the directory gets the position of the one before it, and the name of its header
    entries = [at for at in range(len(data)) if data[at : at + 4] == b"PK\x01\x02"]
    data[entries[2] + 42 : entries[2] + 46] = data[entries[1] + 42 : entries[1] + 46]
    path.write_bytes(data)
    return path


def with_short_safetensors(folder: Path) -> Path:
    return write_safetensors(folder / "model.safetensors", {"a": entry("F32", [2], 0, 4)}, bytes(4))


def cut_off(count: int) -> Make:
    def make(folder: Path) -> Path:
        path = saved(state)(folder)
        path.write_bytes(path.read_bytes()[:-count])
        return path

    return make


def other_pickle(folder: Path) -> Path:
    (folder / "other.pkl").write_bytes(b"\x80\x04}.")
    return folder / "other.pkl"


def old_tar(folder: Path) -> Path:
    """As the first versions of torch."""
    path = folder / "model.pth"
    with tarfile.open(path, "w") as archive:
        for name in ("sys_info", "pickle", "tensors", "storages"):
            archive.addfile(tarfile.TarInfo(name))
    return path


def named(name: str) -> Make:
    return by_hand(state_dict(**{name: tensor("0", 4, [4], [1])}), FOUR)


def safetensors_of(contents: Callable[[], dict[str, Any]]) -> Make:
    def make(folder: Path) -> Path:
        safetensors.torch.save_file(contents(), folder / "model.safetensors")
        return folder / "model.safetensors"

    return make


def kept(name: str) -> Make:
    """A file that TensorFlow or Keras wrote."""
    return lambda folder: FILES / name


def without_statistics(name: str, index: str) -> Make:
    """A checkpoint of TensorFlow whose index has no moving statistics."""

    def make(folder: Path) -> Path:
        shutil.copytree(FILES / name, folder / name)
        path = folder / name / index
        records = read_table(path.read_bytes(), path)
        path.write_bytes(write_table([(key, value) for key, value in records if b"moving_" not in key]))
        return folder / name

    return make


def without_keras_statistics(name: str) -> Make:
    """A model of Keras 3 without the third and fourth variable of its layers, which are the moving statistics."""

    def make(folder: Path) -> Path:
        path = folder / name
        if name.endswith(".h5"):
            shutil.copy(FILES / name, path)
            remove_statistics(path)
            return path
        with zipfile.ZipFile(FILES / name) as archive, zipfile.ZipFile(path, "w") as changed:
            weights = Path(archive.extract("model.weights.h5", folder))
            remove_statistics(weights)
            for member in archive.namelist():
                changed.writestr(member, weights.read_bytes() if member == weights.name else archive.read(member))
        return path

    return make


def remove_statistics(path: Path) -> None:
    import h5py

    groups: list[Any] = []
    with h5py.File(path, "r+") as file:
        file.visititems(lambda _, item: groups.append(item) if isinstance(item, h5py.Group) else None)
        for group in groups:
            if str(group.name).endswith("/vars") and len(group) == 4:
                del group["2"], group["3"]


UNFIT = {
    "a name with a command to the terminal": "bn\x1b[2J",
    "a name with a line break": "bn\n",
    "a name that is read from right to left": "bn\u202egnp",
    "a name with half a character": "bn\ud800",
    "a name with markup": "<script>alert(1)</script>",
    "a name with a link": "[click](http://x)",
    "a name of 300 characters": "n" * 300,
    "a name of a megabyte": "n" * 1_000_000,
}
ATTACKS = ("os system", "posix system", "builtins eval", "__builtin__ exec", "subprocess Popen", "runpy _run_code")

FAULTS: dict[str, Case] = {
    "a model saved whole": fault(saved(trained), "BN001"),
    **{f"a call of {name.replace(' ', '.')}": fault(attack(name), "BN001") for name in ATTACKS},
    "a flipped bit in a variance": fault(with_flipped_bit(4, 0), "BN002"),
    "a flipped bit in a weight": fault(with_flipped_bit(0, 40), "BN002"),
    "a flipped bit in a bias": fault(with_flipped_bit(2, 1), "BN002"),
    "an archive that was packed again": fault(packed_again, "BN003"),
    "64 MiB in 66 KB": fault(bomb, "BN003"),
    "a member twice": fault(by_hand(PLAIN, FOUR, FOUR), "BN003"),
    "a member outside of the folder": fault(by_hand(PLAIN, FOUR, ("archive/../../x", b"")), "BN003"),
    "a member larger than its tensors": fault(by_hand(PLAIN, ("archive/data/0", bytes(20))), "BN003"),
    "members that share bytes": fault(with_shared_bytes, "BN003"),
    "a safetensors header of another size": fault(with_short_safetensors, "BN003"),
    "the format before torch 1.6": fault(saved(state, _use_new_zipfile_serialization=False), "BN004"),
    "an archive without its end": fault(cut_off(500), "BN004"),
    "half an archive": fault(cut_off(2000), "BN004"),
    "a pickle of another program": fault(other_pickle, "BN004"),
    "the format of the first versions of torch": fault(old_tar, "BN004"),
    **{what: fault(named(name), "BN005") for what, name in UNFIT.items()},
    "TensorFlow's saver of trainable variables": fault(kept("reference_trainable"), "BN100"),
    "TensorFlow, moving statistics taken out": fault(without_statistics("reference_all", "model.ckpt.index"), "BN100"),
    "Keras 3, moving statistics taken out": fault(without_keras_statistics("keras3.keras"), "BN100"),
    # two variables may as well be the statistics of a layer without gamma and beta
    "weights of Keras 3, moving statistics taken out": missed(without_keras_statistics("keras3.weights.h5"), "BN100"),
}

HEALTHY: dict[str, Case] = {
    "torch, a checkpoint with more than tensors": healthy(
        saved(lambda: {"model": state(), "epoch": 3, "name": "a run"})
    ),
    "safetensors": healthy(safetensors_of(state)),
    "TensorFlow, Saver": healthy(kept("reference_all")),
    "TensorFlow, SavedModel": healthy(kept("module")),
    "Keras 2, checkpoint": healthy(kept("keras2")),
    "Keras 2, model in HDF5": healthy(kept("keras2.h5")),
    "Keras 2, .keras": healthy(kept("keras2.keras")),
    "Keras 2, weights": healthy(kept("keras2.weights.h5")),
    "Keras 3, checkpoint": healthy(kept("keras3")),
    "Keras 3, model in HDF5": healthy(kept("keras3.h5")),
    "Keras 3, .keras": healthy(kept("keras3.keras")),
    "Keras 3, weights": healthy(kept("keras3.weights.h5")),
}


def without_tracking() -> dict[str, Any]:
    return trained(layer=lambda channels: nn.BatchNorm2d(channels, track_running_stats=False)).state_dict()


FALSE_POSITIVES: dict[str, Case] = {
    "safetensors of a model that was built without statistics": fault(safetensors_of(without_tracking), "BN100"),
}
