"""What a reader collects, and how the normal form is made of it."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn

from batchnorm.doctor.checkpoint import Checkpoint, StoredTensor
from batchnorm.doctor.read.faults import Faults
from batchnorm.doctor.read.layers import LONGEST_NAME, Found, ModuleState, recognise
from batchnorm.doctor.read.source import shown
from batchnorm.errors import DataError

MOST_TENSORS = 100_000
# characters of all names together; a tensor takes about 2 KB in all
MOST_CHARACTERS = 20_000_000
# names of real layers have up to 150 characters
HUGE_NAME = 256
MARKUP = re.compile(r"<[A-Za-z/!?]|\]\(|&#|javascript:")
NOTED = 100


@dataclass
class Table:
    """The tensors of a file.

    Attributes:
        source: the path, as it was given.
        tensors: by name.
        unreadable: why the values of a tensor cannot be had, by name.
        versions: what torch's ``_metadata`` says about modules, by path.
        modules: what a model that was saved whole says about its normalization layers, by path.
        faults: of the container.
        facts: for the checkpoint.
    """

    source: str
    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)
    versions: dict[str, int] = field(default_factory=dict)
    modules: dict[str, ModuleState] = field(default_factory=dict)
    faults: Faults = field(default_factory=Faults)
    facts: dict[str, Any] = field(default_factory=dict)
    characters: int = 0

    def add(self, tensor: StoredTensor, problem: str = "") -> None:
        """Take a tensor; if there is a problem with its values, loading it raises :class:`DataError`."""
        name = tensor.name
        if len(name) > LONGEST_NAME:
            self.faults.add("BN005", name, "a name too long to be listed", characters=len(name))
            return
        if name in self.tensors:
            self.faults.add("BN003", name, "two tensors have this name; the first one counts")
            return
        self.characters += len(name)
        if len(self.tensors) >= MOST_TENSORS or self.characters > MOST_CHARACTERS:
            raise DataError(f"{self.source}: more than {len(self.tensors)} tensors, or names larger than any model has")
        if (unfit := unfitness(name)) is not None:
            self.faults.add("BN005", name, unfit, grave=False, characters=len(name))
        if problem:
            tensor = StoredTensor(name, tensor.shape, tensor.dtype, refusal(f"{self.source}: {shown(name)} {problem}"))
            self.unreadable[name] = problem
        self.tensors[name] = tensor

    def checkpoint(self, format: str) -> Checkpoint:
        """The normal form, with the layers of torch."""
        found = recognise(self.tensors, frozenset(self.unreadable), self.versions, self.modules)
        return self.normal_form(format, found)

    def normal_form(self, format: str, found: Found) -> Checkpoint:
        """The same with layers that another way has found."""
        facts = dict(self.facts)
        for name, values in (
            ("left_out", found.left_out),
            ("relatives", found.relatives),
            ("not_read", self.unreadable),
        ):
            if values:
                facts[name] = dict(list(values.items())[:NOTED])
        if self.versions:
            facts["versions"] = self.versions
        return Checkpoint(self.source, format, self.tensors, found.layers, self.faults, facts)


def unfitness(name: str) -> str | None:
    """Why a name should not be shown as it is."""
    if not name.isprintable():
        return "a name with characters that do not print"
    if MARKUP.search(name):
        return "a name with markup"
    return "a name of unusual length" if len(name) > HUGE_NAME else None


def refusal(message: str) -> Callable[[], NoReturn]:
    def load() -> NoReturn:
        raise DataError(message)

    return load
