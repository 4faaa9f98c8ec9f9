"""What an example shows about a model: how its modules are called, and what it gives."""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from batchnorm.surgery.calls import Argument, arguments_or_none, as_call, without_hooks
from batchnorm.surgery.tracing import first_line


@dataclass
class Seen:
    """The calls of one module; ``arguments`` is None where they differ in kind, or no graph takes them."""

    count: int = 0
    arguments: tuple[Argument, ...] | None = None
    # numbers of dimensions of the first argument
    dims: set[int] = field(default_factory=set)

    def note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments = arguments_or_none(module, args, kwargs)
        if self.count and kinds(arguments) != kinds(self.arguments):
            self.arguments = None
        elif not self.count:
            self.arguments = arguments
        self.count += 1
        self.dims |= {value.dim() for value in [*args, *kwargs.values()][:1] if isinstance(value, Tensor)}


def kinds(arguments: tuple[Argument, ...] | None) -> list[Any] | None:
    return arguments and [(a.name, a.is_tensor, type(a.value), a.value) for a in arguments]  # pyright: ignore[reportReturnType]


def bare_copy(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode without hooks: whatever runs on it, nobody observes."""
    return copied(model, without_hooks(model)).eval()


def copied(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise ValueError(f"the model cannot be copied ({first_line(error)}): fold changes a copy only") from error


def observe(bare: nn.Module, example: Any) -> dict[str, Seen]:
    """Run a model that is nobody else's on an example and note every call of its modules, by name.

    Raises:
        ValueError: the model does not run on the example.
    """
    seen = {name: Seen() for name, _ in bare.named_modules()}
    handles = [
        module.register_forward_pre_hook(partial(note_call, seen[name]), with_kwargs=True)
        for name, module in bare.named_modules()
    ]
    try:
        run(bare, example)
    except Exception as error:
        raise ValueError(
            f"the model does not run on the example ({first_line(error)}): "
            f"give what model(...) takes, as a tensor, a tuple or a dict of keyword arguments"
        ) from error
    for handle in handles:
        handle.remove()
    return seen


def note_call(seen: Seen, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    seen.note(module, args, kwargs)


def run(model: nn.Module, example: Any) -> list[Tensor]:
    """The floating point tensors that a model gives."""
    args, kwargs = as_call(example)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        return [tensor.detach().clone() for tensor in tensors_in(model(*args, **kwargs)) if tensor.is_floating_point()]


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
    elif is_dataclass(value):
        yield from tensors_in([getattr(value, one.name) for one in fields(value)])


def in_double(example: Any) -> Any:
    """The example with its floating point tensors in float64."""
    return tree_map(lambda v: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v, example)
