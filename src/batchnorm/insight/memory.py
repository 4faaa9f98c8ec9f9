"""What autograd keeps for the backward pass, module by module, as saved-tensor hooks see it."""

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from batchnorm.insight.saved import Recorder, recording, storages_of, unchanged

NAME_WIDTH = 42
TYPE_WIDTH = 22
UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


class ModuleMemory(NamedTuple):
    """What one module keeps: its saved tensors, and the bytes behind them, a storage that is saved twice once.

    ``alone`` counts the storages that would be free if this module saved nothing: no other module saves them, and
    they are no inputs of the model.
    """

    name: str
    type: str
    tensors: int
    kept: int
    alone: int


class MemoryReport(NamedTuple):
    """What a model keeps for its backward pass, in bytes; ``str`` makes a table of it.

    Attributes:
        rows: one per module that ran, those that keep most first.
        inputs: kept, and an input of the model.
        shared: kept by several modules, and no input of the model.
        own: parameters and buffers among the saved tensors; they exist anyway and count nowhere else.
    """

    rows: tuple[ModuleMemory, ...]
    inputs: int
    shared: int
    own: int

    @property
    def kept(self) -> int:
        """Bytes of everything kept, each storage once."""
        return self.inputs + self.shared + self.alone

    @property
    def alone(self) -> int:
        """Bytes kept by one module alone, over all modules."""
        return sum(row.alone for row in self.rows)

    def __str__(self) -> str:
        cells = [("module", "type", "tensors", "kept", "alone")]
        cells += [row_cells(row) for row in self.rows if row.tensors]
        tensors = sum(row.tensors for row in self.rows)
        cells.append(("total", "", str(tensors), readable(self.kept), readable(self.alone)))
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [
            "  ".join(f"{cell:{'<' if i < 2 else '>'}{widths[i]}}" for i, cell in enumerate(line)) for line in cells
        ]
        idle = sum(not row.tensors for row in self.rows)
        return "\n".join(
            [
                *lines,
                f"Of the total, {readable(self.inputs)} are inputs of the model, {readable(self.shared)} are saved by "
                "several modules.",
                f"Parameters and buffers ({readable(self.own)}) exist anyway and are not counted.",
                f"Modules that ran and keep nothing: {idle}.",
            ]
        )


def memory_report(model: nn.Module, example: Tensor | tuple[Any, ...] | Mapping[str, Any]) -> MemoryReport:
    """Run one forward and say which tensors autograd keeps for the backward pass, and which module keeps them.

    A tensor belongs to the innermost module that was running when it was saved, and counts if the output still
    depends on it. Bytes are those of storages: a view keeps all of its storage, and a storage counts once.

    Args:
        model: any module, in the mode that is asked about (training, evaluation, frozen).
        example: a tensor, a tuple of arguments, or keyword arguments by name. What a layer keeps depends on whether
            its input needs a gradient, as it does inside a network: ``requires_grad_()`` for a layer by itself.

    Returns:
        :class:`MemoryReport`. It costs one forward, and memory for what is kept and a copy of the buffers.

    Raises:
        TypeError: the model is no module, or the example none of the three.
        ValueError: the model has parameters that its first forward initializes.

        What the model raises passes through. Whatever happens, hooks, buffers, gradients, modes and torch's random
        numbers are as before; parameters that the forward itself overwrites are not restored.

    A compiled module counts as one; what was scripted, or compiled in place (``module.compile()``), counts to its
    caller. Hooks see what operations save: not what an ``autograd.Function`` keeps as an attribute of ``ctx``, nor
    what hooks of the model itself put elsewhere. So a checkpointed part shows its inputs only, and that is what it
    keeps.

    Source:
        ``torch.autograd.graph.saved_tensors_hooks``.

    Example:
        A layer that applies the activation itself keeps no more than two layers do.

        >>> import torch
        >>> import batchnorm.nn
        >>> x = torch.randn(8, 3, 18, 18)
        >>> apart = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 4, 1))
        >>> print(memory_report(apart, x))
        module  type         tensors       kept      alone
        1       BatchNorm2d        3  128.1 KiB  128.1 KiB
        2       ReLU               1  128.0 KiB        0 B
        3       Conv2d             1  128.0 KiB        0 B
        0       Conv2d             1   30.4 KiB        0 B
        total                      6  286.5 KiB  128.1 KiB
        Of the total, 30.4 KiB are inputs of the model, 128.0 KiB are saved by several modules.
        Parameters and buffers (2.1 KiB) exist anyway and are not counted.
        Modules that ran and keep nothing: 1.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    args, kwargs = arguments(example)
    own = [*model.parameters(), *model.buffers()]
    if any(is_lazy(tensor) for tensor in own):
        raise ValueError("the model has uninitialized parameters: run it once first")
    inputs = list(tensors_in([args, kwargs]))
    with unchanged(model, inputs), recording(model) as recorder:
        # the graph, and with it what is kept, lives as long as the output
        recorder.output = model(*args, **kwargs)
        own += [*model.parameters(), *model.buffers()]
        return account(recorder, set(storages_of(own)), set(storages_of(inputs)))


def arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example, Tensor):
        return (example,), {}
    if type(example) is tuple:
        return example, {}
    if isinstance(example, Mapping):
        return (), dict(example)
    raise TypeError(
        f"example must be a tensor, a tuple of arguments or a dict of keyword arguments, not {type(example).__name__}; "
        "for any other single argument, give (argument,)"
    )


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)


def account(recorder: Recorder, own: set[Hashable], inputs: set[Hashable]) -> MemoryReport:
    """The report of what a recorder saw, while the graph is alive."""
    sizes: dict[Hashable, int] = {}
    savers: dict[Hashable, set[str]] = defaultdict(set)
    tensors: Counter[str] = Counter()
    for name, tensor in recorder.kept():
        found = {key: storage.nbytes() for key, storage in storages_of([tensor]).items() if storage.nbytes()}
        sizes |= found
        tensors[name] += not found.keys() <= own
        for key in found.keys() - own:
            savers[key].add(name)
    kept, alone = Counter(), Counter()
    for key, names in savers.items():
        kept.update(dict.fromkeys(names, sizes[key]))
        if len(names) == 1 and key not in inputs:
            alone.update(dict.fromkeys(names, sizes[key]))
    rows = [
        ModuleMemory(name, type(module).__name__, tensors[name], kept[name], alone[name])
        for name, module in recorder.modules.items()
        if name in recorder.ran
    ]
    return MemoryReport(
        tuple(sorted(rows, key=lambda row: -row.kept)),
        inputs=sum(sizes[key] for key in savers if key in inputs),
        shared=sum(sizes[key] for key, names in savers.items() if len(names) > 1 and key not in inputs),
        own=sum(size for key, size in sizes.items() if key in own),
    )


def row_cells(row: ModuleMemory) -> tuple[str, str, str, str, str]:
    name = printable(row.name) or "(model)"
    kind = printable(row.type)
    return (
        name if len(name) <= NAME_WIDTH else f"...{name[3 - NAME_WIDTH :]}",
        kind if len(kind) <= TYPE_WIDTH else f"{kind[: TYPE_WIDTH - 3]}...",
        str(row.tensors),
        readable(row.kept),
        readable(row.alone),
    )


def printable(name: str) -> str:
    """ASCII on one line: a name can neither steer a terminal nor move the columns."""
    return name.encode("unicode_escape").decode()


def readable(size: int) -> str:
    """A number of bytes in the unit that leaves one to four digits before the point."""
    power = min(max(size.bit_length() - 1, 0) // 10, len(UNITS) - 1)
    return f"{size} B" if power == 0 else f"{size / 1024**power:.1f} {UNITS[power]}"
