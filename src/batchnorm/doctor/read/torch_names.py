"""Names of the tensors in what was pickled: state dicts wherever they lie, and models that were saved whole."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from batchnorm.doctor.read.layers import LONGEST_NAME, ModuleState
from batchnorm.doctor.read.pickle_machine import Attributed, Object
from batchnorm.doctor.read.torch_tensors import TensorRecord
from batchnorm.errors import DataError

# state dicts of optimizers of checkpoints of trainers lie 5 deep; modules nest up to 20 deep
DEEPEST = 64
# values that are looked at, ten for each of the most tensors, and characters that are kept of paths
MOST_STEPS, MOST_CHARACTERS = 1_000_000, 20_000_000
MOST_STATE_DICTS = 100
END = object()


@dataclass
class Notes:
    """What a file says about its modules, by their path through the file; ``source`` is its name."""

    source: str
    state_dicts: list[str] = field(default_factory=list)
    versions: dict[str, int] = field(default_factory=dict)
    modules: dict[str, ModuleState] = field(default_factory=dict)
    too_deep: int = 0
    steps: int = 0
    characters: int = 0

    def spend(self, characters: int = 0) -> None:
        self.steps += 1
        self.characters += characters
        if self.steps > MOST_STEPS or self.characters > MOST_CHARACTERS:
            raise DataError(f"{self.source}: has more values than any checkpoint, or longer names")


def named_tensors(root: Any, notes: Notes) -> Iterator[tuple[str, TensorRecord]]:
    """Tensors by their path through the file, in its order. Containers are walked once, however often they are there.

    Raises:
        DataError: more values than any checkpoint has.
    """
    seen: set[int] = set()
    open_containers: list[tuple[str, Iterator[tuple[Any, Any]]]] = [("", iter([("", root)]))]
    while open_containers:
        path, rest = open_containers[-1]
        name, value = next(rest, (END, None))
        if name is END:
            open_containers.pop()
            continue
        notes.spend()
        if isinstance(value, TensorRecord):
            yield join(path, name), value
        elif isinstance(value, dict | list | tuple | Object) and id(value) not in seen:
            seen.add(id(value))
            if len(open_containers) > DEEPEST:
                notes.too_deep += 1
                continue
            inner = join(path, name)
            note(notes, inner, value)
            open_containers.append((inner, children(value, notes)))


def join(path: str, name: Any) -> str:
    """Cut where it is too long to be listed anyway."""
    name = name if isinstance(name, str | bytes) else str(name)
    name = name[: LONGEST_NAME + 1]
    name = name.decode("latin-1") if isinstance(name, bytes) else name
    return (f"{path}.{name}" if path and name else path or name)[: LONGEST_NAME + 1]


def children(value: Any, notes: Notes) -> Iterator[tuple[Any, Any]]:
    """Names and values."""
    if isinstance(value, list | tuple):
        yield from enumerate(value)
    elif isinstance(value, dict):
        yield from value.items()
    elif is_module(value):
        yield from dictionary(value.state["_parameters"]).items()
        yield from persistent_buffers(value.state, notes)
        yield from dictionary(value.state.get("_modules")).items()
    else:
        yield from dictionary(value.items).items()
        yield from enumerate(value.elements or [])
        # of classes with slots the state is two dicts
        for part in value.state[:2] if isinstance(value.state, tuple) else (value.state,):
            yield from dictionary(part).items()


def persistent_buffers(state: dict[Any, Any], notes: Notes) -> Iterator[tuple[Any, Any]]:
    skipped = state.get("_non_persistent_buffers_set")
    skipped = skipped if isinstance(skipped, list) else []
    notes.steps += len(skipped)
    names = {name for name in skipped if isinstance(name, str)}
    for name, child in dictionary(state.get("_buffers")).items():
        notes.spend()
        if name not in names:
            yield name, child


def is_module(value: Any) -> bool:
    return isinstance(value, Object) and isinstance(value.state, dict) and "_parameters" in value.state


def dictionary(value: Any) -> dict[Any, Any]:
    return value if isinstance(value, dict) else {}


def note(notes: Notes, path: str, value: Any) -> None:
    """Keep what a container says about modules."""
    if isinstance(value, Attributed) and (metadata := dictionary(dictionary(value.attributes).get("_metadata"))):
        for name, entry in metadata.items():
            notes.spend(len(path) + len(name) if isinstance(name, str) else 0)
            version = dictionary(entry).get("version")
            if isinstance(name, str) and isinstance(version, int):
                notes.versions[join(path, name)] = version
        note_state_dict(notes, path)
    elif isinstance(value, dict) and is_state_dict(value, path):
        note_state_dict(notes, path)
    elif isinstance(value, Object) and isinstance(value.state, dict) and "training" in value.state:
        if not any(not known or path.startswith(f"{known}.") for known in notes.state_dicts):
            note_state_dict(notes, path)
        note_module(notes, path, value)


def note_state_dict(notes: Notes, path: str) -> None:
    if len(notes.state_dicts) < MOST_STATE_DICTS:
        notes.state_dicts.append(path)


def is_state_dict(value: dict[Any, Any], path: str) -> bool:
    names = [name for name, child in value.items() if isinstance(name, str) and isinstance(child, TensorRecord)]
    return any("." in name[:LONGEST_NAME] for name in names) or bool(names and not path)


def note_module(notes: Notes, path: str, value: Object) -> None:
    state = value.state
    eps, momentum = (number(state.get(name)) for name in ("eps", "momentum"))
    if "norm" in value.kind.lower() or eps is not None:
        notes.spend(len(path))
        training, tracked = state.get("training"), state.get("track_running_stats")
        notes.modules[path] = ModuleState(value.kind, eps, momentum, bool(training), tracked is not False)


def number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and abs(value) < 1e300 else None
