"""Reads what ``torch.save`` wrote before torch 1.6: five pickles in a row, and the storages behind them."""

import io
from typing import Any

from batchnorm.doctor.read.dtypes import SIZES
from batchnorm.doctor.read.pickle_machine import Machine
from batchnorm.doctor.read.source import Source, shown
from batchnorm.doctor.read.table import Table
from batchnorm.doctor.read.torch_tensors import CONSTRUCTORS, Storage, to_storage
from batchnorm.doctor.read.torch_zip import LARGEST_PICKLE, fill, interpret, note_globals

# the pickle of 0x1950A86A20F9469CFC6C
MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
TAR_BLOCK, MOST_TAR_MEMBERS = 512, 20


def read_torch_legacy(source: Source) -> Table:
    """The tensors of the file.

    Raises:
        DataError: one of the pickles is damaged.
    """
    table, storages = Table(source.name), Storages()
    stream = io.BytesIO(source.read_up_to(0, LARGEST_PICKLE))
    machine = Machine(CONSTRUCTORS, storages.meet)
    _, _, system, root, keys = (interpret(source, stream, machine) for _ in range(5))
    note_globals(table, list(machine.globals))
    table.faults.add("BN004", "", "is in the format of torch before 1.6: pickles in a row, no archive", grave=False)
    storages.locate(keys, stream.tell(), source.size)
    if storages.lost:
        table.faults.add("BN004", "", "is cut off", bytes=source.size, lost_storages=storages.lost)

    def read(key: str, start: int, count: int) -> bytes:
        return source.read(storages.starts[key] + start, count)

    little = system.get("little_endian") if isinstance(system, dict) else True
    fill(table, root, storages.problem, read, big_endian=little is False)
    return table


def read_pickle(source: Source) -> Table:
    """What a pickle of something else names; its tensors, if it has some, are not read."""
    table, machine = Table(source.name), Machine(CONSTRUCTORS, to_anything)
    interpret(source, io.BytesIO(source.read_up_to(0, LARGEST_PICKLE)), machine)
    note_globals(table, list(machine.globals))
    table.faults.add("BN004", "", "is a pickle that torch.save did not write: its tensors are not listed")
    return table


def to_anything(identity: Any) -> None:
    """Other programs have persistent ids of their own."""


class Storages:
    """Where the bytes of each storage begin."""

    def __init__(self) -> None:
        self.sizes: dict[str, int] = {}
        self.starts: dict[str, int] = {}
        self.lost = 0

    def meet(self, identity: Any) -> Any:
        """What stands for a persistent id; keeps the sizes of storages."""
        storage = to_storage(identity)
        if isinstance(storage, Storage):
            self.sizes[storage.key] = storage.count * SIZES.get(storage.dtype, 1)
        return storage

    def locate(self, keys: Any, start: int, end: int) -> None:
        """They lie one behind the other, in the order of the keys, each behind its size of 8 bytes."""
        for key in keys if isinstance(keys, list) else []:
            size = self.sizes.get(key) if isinstance(key, str) else None
            if size is None or start + 8 + size > end:
                self.lost = len(self.sizes) - len(self.starts)
                return
            self.starts[key] = start + 8
            start += 8 + size

    def problem(self, storage: Storage) -> str:
        if storage.key not in self.starts:
            return "has a storage that is not in the file"
        same = storage.count * SIZES.get(storage.dtype, 1) == self.sizes[storage.key]
        return "" if same else "has a storage that has two sizes"


def read_torch_tar(source: Source) -> Table:
    """The names of the members of what the first versions of torch saved; its tensors are not listed.

    Raises:
        DataError: it is another tar archive.
    """
    names, at = [], 0
    while len(names) < MOST_TAR_MEMBERS and len(header := source.read_up_to(at, TAR_BLOCK)) == TAR_BLOCK:
        name, size = header[:100].rstrip(b"\0"), header[124:136].strip(b"\0 ")
        if not name or not size.isdigit() or size.strip(b"01234567"):
            break
        names.append(name.decode("utf-8", "replace"))
        at += TAR_BLOCK + -(-int(size, 8) // TAR_BLOCK) * TAR_BLOCK
    if not {"storages", "tensors", "pickle"} <= {*names}:
        raise source.error(f"is a tar archive ({', '.join(map(shown, names[:3]))}); unpack it and name the checkpoint")
    table = Table(source.name, facts={"members": names})
    table.faults.add("BN004", "", "is in the tar format of the first versions of torch: its tensors are not listed")
    return table
