"""How a module is called: which of its arguments are tensors, and what the others are."""

import copy
import inspect
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks"),
    *("_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks"),
)
CONSTANTS = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Argument:
    """One parameter of a forward: a tensor, or the constant ``value``; ``shape`` is a tensor's stand-in, if known."""

    name: str
    default: Any
    is_positional: bool
    is_tensor: bool
    value: Any = None
    shape: Tensor | None = None


# by the name of the module; None where a call cannot be described so
Calls = dict[str, tuple[Argument, ...] | None]


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
        name, default, kind = parameter.name, parameter.default, parameter.kind
        if kind is parameter.VAR_KEYWORD and not (given and given.get(name)):
            continue
        if kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise UnusualCallError(f"its forward takes {parameter}")
        value = default if given is None else given.get(name, default)
        is_tensor = value is parameter.empty if given is None else issubclass(type(value), (Tensor, torch.fx.Proxy))
        if not is_tensor and not isinstance(value, CONSTANTS):
            raise UnusualCallError(f"the argument {name!r} of its forward is a {type(value).__name__}")
        is_positional = kind is parameter.POSITIONAL_OR_KEYWORD
        if is_tensor:
            result.append(Argument(name, default, is_positional, is_tensor, shape=stand_in(value)))
        else:
            result.append(Argument(name, default, is_positional, is_tensor, value))
    return tuple(result)


def stand_in(value: Any) -> Tensor | None:
    """A tensor of the same shape and dtype without memory; None where the shape is not known."""
    return torch.empty_like(value, device="meta", requires_grad=False) if type(value) is Tensor else None


def copy_structure(model: nn.Module) -> nn.Module:
    """A copy without values and hooks, so that whatever runs on it reaches neither the model nor its observers."""
    memo = without_hooks(model)
    for parameter in model.parameters():
        if not is_lazy(parameter):
            memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
    others = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    for tensor in [*model.buffers(), *others]:
        memo.setdefault(id(tensor), tensor if is_lazy(tensor) else torch.empty_like(tensor.detach(), device="meta"))
    return copy.deepcopy(model, memo)


def without_hooks(model: nn.Module) -> dict[int, Any]:
    """What to tell ``deepcopy`` so that it leaves the hooks of modules out."""
    return {id(vars(m)[name]): OrderedDict() for m in model.modules() for name in HOOKS if name in vars(m)}


def calls_of_example(model: nn.Module, example: Any) -> Calls:
    """Run a copy of the model on an example, in evaluation mode, and see how each module is first called."""
    args, kwargs = as_call(example)
    again = copy.deepcopy(model, without_hooks(model)).eval()
    calls: Calls = {"": arguments_or_none(again, args, kwargs)}
    for name, module in again.named_modules():
        if name:
            note = partial(note_call, calls, name)
            module.register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        again(*args, **kwargs)
    return calls


def note_call(calls: Calls, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
    calls.setdefault(name, arguments_or_none(module, args, kwargs))


def arguments_or_none(module: nn.Module, args: Any, kwargs: Any) -> Any:
    try:
        return arguments_of_call(module, args, kwargs)
    except (UnusualCallError, TypeError, ValueError):
        return None


def as_call(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example, Mapping):
        return (), dict(example)
    return (example, {}) if isinstance(example, tuple) else ((example,), {})
