"""Reads what ``torch.save`` writes since torch 1.6: a zip archive of a pickle and the storages that it names."""

import io
from collections.abc import Callable
from typing import Any

from batchnorm.doctor.read.dtypes import SIZES
from batchnorm.doctor.read.faults import Faults
from batchnorm.doctor.read.pickle_machine import Machine
from batchnorm.doctor.read.source import Source, shown
from batchnorm.doctor.read.table import Table, unfitness
from batchnorm.doctor.read.torch_globals import ALLOWED, is_known_to_run
from batchnorm.doctor.read.torch_names import Notes, named_tensors
from batchnorm.doctor.read.torch_tensors import CONSTRUCTORS, Storage, stored, to_storage
from batchnorm.doctor.read.zip_directory import Member, check_sums, read_directory, read_member
from batchnorm.doctor.read.zip_recovery import recover

PICKLE = "data.pkl"
# pickles of models of 10^4 layers have 5 MB
LARGEST_PICKLE = 32 << 20
TORCHSCRIPT = ("__torch__.", "torch.jit._pickle.")


def read_torch_zip(source: Source) -> Table:
    """The tensors of an archive.

    Raises:
        DataError: it has no table of tensors, or that table is damaged.
    """
    table = Table(source.name)
    members = read_directory(source, table.faults)
    if cut := members is None:
        members = recover(source)
        if not any(name.endswith(f"/{PICKLE}") for name in members):
            raise source.error(f"is an archive cut off after {source.size} bytes, before its tensors; fetch it again")
    folder = find_folder(source, members)
    for name in members:
        if (problem := unfitness(name)) is not None:
            table.faults.add("BN005", name, f"a member has {problem}", grave=False, characters=len(name))
    table.facts["checksums"] = check_sums(source, members, table.faults)
    order = small(source, members, f"{folder}/byteorder")
    if script := f"{folder}/constants.pkl" in members:
        table.facts["torchscript"] = True
    data = members[f"{folder}/{PICKLE}"]
    if data.size > LARGEST_PICKLE:
        raise source.error(f"its table of tensors has {data.size} bytes; expected at most {LARGEST_PICKLE}")
    machine = Machine(CONSTRUCTORS, to_storage)
    root = interpret(source, io.BytesIO(read_member(source, data, 0, data.size)), machine)
    note_globals(table, [name for name in machine.globals if not (script and name.startswith(TORCHSCRIPT))])

    def read(key: str, start: int, count: int) -> bytes:
        return read_member(source, members[f"{folder}/data/{key}"], start, count)

    storages = StorageCheck(members, f"{folder}/data/", Faults() if cut else table.faults)
    fill(table, root, storages.problem, read, big_endian=order == b"big")
    if cut:
        lost = sum(map(bool, storages.problems.values()))
        table.faults.add("BN004", "", "is cut off: its directory is missing", bytes=source.size, lost_storages=lost)
    return table


def find_folder(source: Source, members: dict[str, Member]) -> str:
    """The folder in the archive, which is the first one of it."""
    folders = [name.rpartition("/")[0] for name in members if name.endswith(f"/{PICKLE}") and name.count("/") == 1]
    if folders:
        return folders[0]
    if any(name.endswith(".npy") for name in members):
        raise source.error("is a NumPy archive (.npz); expected a checkpoint of torch, TensorFlow or Keras")
    names = ", ".join(shown(name) for name in list(members)[:3])
    raise source.error(
        f"is a zip archive of {len(members)} members ({names}), none of which is the table of tensors that torch.save "
        "writes; if it holds a checkpoint, unpack it first"
    )


def small(source: Source, members: dict[str, Member], name: str) -> bytes:
    member = members.get(name)
    return read_member(source, member, 0, min(member.size, 16)) if member is not None and member.readable else b""


def interpret(source: Source, stream: io.BytesIO, machine: Machine) -> Any:
    """What the next pickle says, without doing it."""
    try:
        return machine.run(stream)
    except ValueError as error:
        where = stream.tell()
        raise source.error(f"its pickled table of tensors is damaged before byte {where}: {error}") from None


def note_globals(table: Table, globals: list[str]) -> None:
    """Note those that torch.load(weights_only=True) refuses."""
    for name in globals:
        if name not in ALLOWED:
            table.faults.add("BN001", name, "torch.load(weights_only=True) refuses it", grave=is_known_to_run(name))


def fill(
    table: Table,
    root: Any,
    check: Callable[[Storage], str],
    read: Callable[[str, int, int], bytes],
    *,
    big_endian: bool,
) -> None:
    """Put the tensors of a pickle into the table."""
    notes = Notes(table.source)
    for name, record in named_tensors(root, notes):
        problem = record.problem or (check(record.storage) if record.storage is not None else "")
        if record.problem.startswith("reaches"):
            table.faults.add("BN003", name, record.problem)
        table.add(stored(name, record, read, big_endian), problem)
    table.versions, table.modules = notes.versions, notes.modules
    table.facts["state_dicts"] = notes.state_dicts
    if notes.modules:
        table.facts["training"] = sorted({module.training for module in notes.modules.values()})
    if notes.too_deep:
        table.facts["too_deep"] = notes.too_deep


class StorageCheck:
    """Compares storages with the members that hold them, each once."""

    def __init__(self, members: dict[str, Member], folder: str, faults: Faults) -> None:
        self.members, self.folder, self.faults = members, folder, faults
        self.problems: dict[tuple[str, str, int], str] = {}

    def problem(self, storage: Storage) -> str:
        """Why it cannot be read, or ""."""
        key = (storage.key, storage.dtype, storage.count)
        if key not in self.problems:
            self.problems[key] = self.find_problem(storage)
        return self.problems[key]

    def find_problem(self, storage: Storage) -> str:
        name = f"{self.folder}{storage.key}"
        member = self.members.get(name)
        if member is None:
            self.faults.add("BN003", name, "is named by a tensor, but is not in the archive")
            return "has a storage that is not in the file"
        expected = storage.count * SIZES.get(storage.dtype, 1)
        if storage.dtype in SIZES and member.size != expected:
            self.faults.add("BN003", name, "has another size than its tensors", bytes=member.size, expected=expected)
        if not member.plain:
            return "has a storage that is compressed or encrypted; unpack the archive and save it with torch.save"
        return "has a storage that is too small" if member.size < expected else ""
