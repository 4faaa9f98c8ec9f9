"""How a module is called: which of its arguments are tensors, and what the others are."""

import copy
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

CONSTANTS = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Argument:
    """One parameter of a forward; ``value`` is a tensor's stand-in where ``is_tensor``, or the constant itself."""

    name: str
    default: Any
    is_tensor: bool
    value: Any


class UnusualCallError(Exception):
    """A forward takes, or is given, what no graph can be made for."""


def arguments_of_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Argument, ...]:
    """The arguments of ``module(*args, **kwargs)``; whatever is no constant must be a tensor."""
    bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs)
    return arguments(module, dict(list(bound.arguments.items())[1:]))


def usual_arguments(module: nn.Module) -> tuple[Argument, ...]:
    """Tensors for the parameters without a default, defaults for the others."""
    return arguments(module, None)


def arguments(module: nn.Module, given: dict[str, Any] | None) -> tuple[Argument, ...]:
    result = []
    for parameter in list(inspect.signature(type(module).forward).parameters.values())[1:]:
        name, default = parameter.name, parameter.default
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            if given and given.get(name):
                raise UnusualCallError(f"its forward is called with *{name}")
            continue
        if given is None:
            value = default
            is_tensor = default is parameter.empty
        else:
            value = given.get(name, default)
            is_tensor = issubclass(type(value), (Tensor, torch.fx.Proxy))
        if not is_tensor and not isinstance(value, CONSTANTS):
            raise UnusualCallError(f"the argument {name!r} of its forward is a {type(value).__name__}")
        result.append(Argument(name, default, is_tensor, stand_in(value) if is_tensor else value))
    return tuple(result)


def stand_in(value: Any) -> Tensor | None:
    """A tensor of the same shape and dtype without memory; None where the shape is not known."""
    return torch.empty_like(value, device="meta", requires_grad=False) if type(value) is Tensor else None


def copy_structure(model: nn.Module, *, copy_buffers: bool = False) -> nn.Module:
    """A copy whose parameters are the model's own, and the buffers too unless a run could change them."""
    kept = [*model.parameters(), *(() if copy_buffers else model.buffers())]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in kept})


def calls_of_example(model: nn.Module, example: Any) -> dict[str, tuple[Argument, ...]]:
    """Run a copy of the model on an example, in evaluation mode, and see how each module is first called."""
    args, kwargs = as_call(example)
    again = copy_structure(model, copy_buffers=True).eval()
    calls: dict[str, tuple[Argument, ...]] = {"": arguments_or_none(again, args, kwargs)}
    for name, module in again.named_modules():
        if name:
            module.register_forward_pre_hook(
                lambda module, args, kwargs, name=name: note_call(calls, name, module, args, kwargs), with_kwargs=True
            )
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        again(*args, **kwargs)
    return {name: call for name, call in calls.items() if call}


def note_call(calls: dict[str, Any], name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
    calls.setdefault(name, arguments_or_none(module, args, kwargs))


def arguments_or_none(module: nn.Module, args: Any, kwargs: Any) -> Any:
    try:
        return arguments_of_call(module, args, kwargs)
    except (UnusualCallError, TypeError, ValueError):
        return None


def as_call(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example, dict):
        return (), example
    return (tuple(example), {}) if isinstance(example, (tuple, list)) else ((example,), {})
