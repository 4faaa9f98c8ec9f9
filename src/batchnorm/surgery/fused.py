"""The forward of a block whose batch normalizations absorbed what follows them, with the original behind it."""

import inspect
from dataclasses import dataclass, replace
from types import CodeType, FunctionType, ModuleType, NoneType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from batchnorm.reference import ACTIVATIONS
from batchnorm.surgery.calls import CONSTANTS, Argument
from batchnorm.surgery.code import reads_submodules
from batchnorm.surgery.layers import is_batch_norm, is_ours

# what a fused block keeps in the instance
OWN_ATTRIBUTES = ("forward", "_replicate_for_data_parallel")
OF_EVERY_MODULE = {*vars(nn.Module()), *OWN_ATTRIBUTES}
MISSING = object()


def normalize(
    layer: Any, input: Tensor, residual: Tensor | None, activation: str, add_in_place: bool = False
) -> Tensor:
    """``activation(layer(input) + residual)`` in one call of the layer, where the residual has the input's shape."""
    if layer.activation or (residual is not None and not alike(input, residual)):
        z = layer(input)
        if add_in_place:
            z += residual
        elif residual is not None:
            z = z + residual
        return ACTIVATIONS[activation](z)
    view = with_activation(layer, activation)
    output = view.forward(input, residual)
    layer.__dict__["last_choice"] = view.last_choice
    return output


def with_activation(layer: Any, activation: str) -> Any:
    """The layer as it is now, but for the activation, of which its other callers, in other threads too, see nothing."""
    view = object.__new__(type(layer))
    view.__dict__ = layer.__dict__ | {"activation": activation}
    return view


def alike(input: Tensor, residual: Any) -> bool:
    return (
        type(residual) in (Tensor, nn.Parameter)
        and residual.shape == input.shape
        and residual.dtype == input.dtype
        and residual.device == input.device
    )


@dataclass
class Program:
    """The source of a graph; its functions are compiled at first use, and again in a copy."""

    source: str
    names: dict[str, Any]
    expected: tuple[bool | int, ...]

    def __post_init__(self) -> None:
        self.functions: dict[str, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        names = {key: value.__name__ if isinstance(value, ModuleType) else value for key, value in self.names.items()}
        modules = [key for key, value in self.names.items() if isinstance(value, ModuleType)]
        return {"source": self.source, "names": names, "modules": modules, "expected": self.expected}

    def __setstate__(self, state: dict[str, Any]) -> None:
        names = dict(state["names"])
        for key in state["modules"]:
            names[key] = __import__(names[key], fromlist=["_"])
        self.__init__(state["source"], names, state["expected"])

    def takes_its_branches(self, block: nn.Module, tensors: list[Tensor]) -> bool:
        """Whether the conditions that the graph was traced under are as they were."""
        if not self.expected:
            return True
        try:
            return self.compiled()["branches"](block, *tensors) == self.expected
        # the forward asks for the last dimension only after the number of dimensions was right
        except (IndexError, TypeError, RuntimeError):
            return False

    def compiled(self) -> dict[str, Any]:
        if not self.functions:
            scope = dict(self.names)
            exec(compile(self.source, "<a block of batchnorm.convert>", "exec"), scope)
            self.functions = {key: value for key, value in scope.items() if isinstance(value, FunctionType)}
        return self.functions


class Snapshot:
    """What a graph took for granted about a module: its submodules, its plain attributes, and the block's mode."""

    def __init__(self, module: nn.Module, *, any_mode: bool = False) -> None:
        self.module = module
        self.any_mode = any_mode
        self.submodules = dict(module._modules)
        self.attributes = {key: value for key, value in vars(module).items() if key not in OF_EVERY_MODULE}
        self.number = len(vars(module).keys() - OWN_ATTRIBUTES)

    def holds(self, training: bool) -> bool:
        now = self.module.__dict__
        return (
            (self.any_mode or self.module.training == training)
            and now["_modules"] == self.submodules
            and type(now.get("forward")) in (NoneType, FusedForward)
            and len(now) - ("forward" in now) - ("_replicate_for_data_parallel" in now) == self.number
            and (
                not self.attributes or all(same(now.get(key, MISSING), value) for key, value in self.attributes.items())
            )
        )


def same(now: Any, then: Any) -> bool:
    return now is then or (type(now) is type(then) and isinstance(now, CONSTANTS) and now == then)


class FusedForward:
    """Takes the place of a block's ``forward``.

    Runs the fused graph where everything is as it was when the graph was made: the kind of the arguments, the mode,
    submodules and attributes of the modules whose code the graph replaces, and no hook that would be passed over.
    Otherwise, and for compilers and exporters, it runs the block's own forward, in which nothing is fused.
    """

    def __init__(
        self,
        block: nn.Module,
        arguments: tuple[Argument, ...],
        programs: dict[bool, Program],
        inlined: list[nn.Module],
        unseen: list[nn.Module],
        absorbed: dict[str, str],
    ) -> None:
        """``absorbed`` says what each layer absorbs, by its name in the block."""
        self.block = block
        self.arguments = [replace(argument, shape=None) for argument in arguments]
        self.positional = sum(argument.is_positional for argument in arguments)
        self.programs = programs
        self.layers = [block.get_submodule(name) for name in absorbed]
        self.unseen = unseen
        self.snapshots = [Snapshot(module) for module in inlined]
        # a layer is asked for its attributes at every call; what it absorbed is not
        passed_over = [module for module in unseen if module not in inlined and module not in self.layers]
        read = [child for module in inlined if reads_submodules(module) for child in module.children()]
        others = dict.fromkeys([*passed_over, *(m for m in read if m not in inlined and not is_batch_norm(m))])
        self.snapshots += [Snapshot(module, any_mode=True) for module in others]
        self.absorbed = list(absorbed.values())

    def install(self) -> None:
        self.block.__dict__.update(dict(zip(OWN_ATTRIBUTES, (self, self.replica), strict=True)))

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(type(self.block).forward.__get__(self.block))

    @property
    def __code__(self) -> CodeType:
        """For torch.export, which wants to know where a forward stands."""
        return type(self.block).forward.__code__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling() and torch._C._get_tracing_state() is None:
            tensors = self.tensors(args, kwargs)
            training = self.block.training
            if tensors is not None and self.is_unwatched() and all(s.holds(training) for s in self.snapshots):
                program = self.programs[training]
                if program.takes_its_branches(self.block, tensors):
                    return program.compiled()["forward"](self.block, *tensors)
        return type(self.block).forward(self.block, *args, **kwargs)

    def tensors(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor] | None:
        """The tensors among the arguments, or None if the call is of another kind."""
        if len(args) > self.positional:
            return None
        tensors, used = [], 0
        for position, argument in enumerate(self.arguments):
            if position < len(args):
                value = args[position]
            else:
                value = kwargs.get(argument.name, argument.default)
                used += argument.name in kwargs
            if argument.is_tensor:
                if type(value) is not Tensor and type(value) is not nn.Parameter:
                    return None
                tensors.append(value)
            elif not same(value, argument.value):
                return None
        return tensors if used == len(kwargs) else None

    def replica(self) -> nn.Module:
        """For torch.nn.DataParallel, whose replicas run the block's own forward: this one knows one block."""
        replica = type(self.block)._replicate_for_data_parallel(self.block)
        for name in OWN_ATTRIBUTES:
            del replica.__dict__[name]
        return replica

    def is_unwatched(self) -> bool:
        """No hook would be passed over, and the layers still are layers of ours with our forward."""
        return (
            not torch_module._has_any_global_hook()
            and not any(has_hooks(module) for module in self.unseen)
            and all(is_ours(m) and "forward" not in m.__dict__ for m in self.layers)
        )


def has_hooks(module: nn.Module) -> bool:
    """Whether a hook would miss a call; those that only observe may."""
    own = module.__dict__
    # spelled out: it runs for several modules in every call
    if not (own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]):
        return False
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(not getattr(hook, "observes_only", False) for kind in kinds for hook in own[kind].values())
