"""The graph of a module's forward by torch.fx, taken from a copy, or the reason why a graph would not be the same."""

import operator
import pickle
import random
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node, Proxy, Tracer
from torch.fx.graph import inplace_methods
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from batchnorm.surgery.calls import Argument, Calls, arguments_or_none, copy_structure, usual_arguments
from batchnorm.surgery.code import why_unseen
from batchnorm.surgery.fused import FusedForward

METADATA = {
    "shape",
    "ndim",
    "dtype",
    "dim",
    "size",
    "numel",
    "is_floating_point",
    "getattr",
    "getitem",
    "bool",
    "int",
} | {
    *("eq", "ne", "lt", "le", "gt", "ge", "add", "sub", "mul", "mod", "floordiv", "not_", "and_", "or_"),
}


class CannotTraceError(Exception):
    """Why a graph of the forward would not do what the forward does."""


@dataclass
class Trace:
    """A graph, the modules whose code it replaces, and the branches it took."""

    graph: Graph
    inlined: list[str]
    branches: list[tuple[Node, bool | int]]


class BlockProxy(Proxy):
    """A proxy that is no tensor: a forward that asks whether it is one would take the wrong branch."""

    @property
    def __class__(self) -> type:  # pyright: ignore[reportIncompatibleMethodOverride]
        asking = sys._getframe(1)
        inside_torch = asking.f_globals.get("__name__", "").startswith(("torch.", "batchnorm."))
        if asking.f_code.co_name == "is_tensor" or (not inside_torch and "isinstance" in asking.f_code.co_names):
            raise CannotTraceError("its forward asks for the type of a value")
        return BlockProxy

    def __getattr__(self, name: str) -> Any:
        if not hasattr(Tensor, name):
            raise AttributeError(f"'Tensor' object has no attribute {name!r}")
        return super().__getattr__(name)

    def __int__(self) -> int:
        return self.tracer.to_int(self)  # pyright: ignore[reportAttributeAccessIssue]

    __index__ = __int__


def in_place(name: str) -> Callable[[Proxy, Any], Proxy]:
    """``a += b``, which torch.fx would take for ``a = a + b``, although other names of ``a`` see the difference."""
    function = getattr(operator, name)
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


for name in inplace_methods:
    setattr(BlockProxy, f"__{name}__", in_place(name))


class NothingComputed(TorchDispatchMode):
    """While tracing, only proxies are computed with: what happens to real tensors would happen once and never again."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise CannotTraceError("its forward computes with tensors that are not computed from its input")


class BlockTracer(Tracer):
    """Follows the forward of one module, and of the modules in it that are not leaves."""

    proxy_buffer_attributes = True

    def __init__(self, arguments: tuple[Argument, ...], is_leaf: Callable[[str, nn.Module], bool]) -> None:
        super().__init__()
        self.arguments = arguments
        self.is_leaf = is_leaf
        self.inlined: list[str] = [""]
        self.branches: list[tuple[Node, bool | int]] = []
        self.calls: Calls = {}
        self.modes = modes_of_the_caller()

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        values = {
            a.name: self.create_proxy("placeholder", a.name, (), {}) if a.is_tensor else a.value for a in self.arguments
        }
        return lambda: root_fn(self.root, **values), []

    def proxy(self, node: Node) -> Proxy:
        return BlockProxy(node, self)

    def create_arg(self, a: Any) -> Any:
        return a.node if issubclass(type(a), Proxy) else super().create_arg(a)

    def create_node(self, *args: Any, **kwargs: Any) -> Node:
        if modes_of_the_caller() != self.modes:
            raise CannotTraceError("its forward switches gradients or autocast on or off")
        return super().create_node(*args, **kwargs)

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = self.path_of_module(m)
        if not self.is_leaf(name, m) and name not in self.inlined:
            self.inlined.append(name)
        self.calls.setdefault(name, arguments_or_none(m, args, kwargs))
        return super().call_module(m, forward, args, kwargs)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return self.is_leaf(module_qualified_name, m)

    def to_bool(self, obj: Proxy) -> bool:
        """A branch on the shape or the dtype of an argument is taken as the example goes."""
        return self.follow(bool, obj.node)

    def to_int(self, obj: Proxy) -> int:
        return self.follow(int, obj.node)

    def follow(self, kind: type, node: Node) -> Any:
        value = kind(self.value_of(node))
        self.branches.append((self.create_node("call_function", kind, (node,), {}), value))
        return value

    def value_of(self, node: Any) -> Any:
        if not isinstance(node, Node):
            return node
        name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
        if node.op == "placeholder":
            value = next(a.shape for a in self.arguments if a.name == node.target)
            if value is None:
                raise CannotTraceError("its forward branches on its input, whose shape only an example can tell")
            return value
        if node.op not in ("call_method", "call_function") or name not in METADATA:
            raise CannotTraceError("its forward branches on values that it computes")
        if name == "getattr" and node.args[1] not in METADATA:
            raise CannotTraceError(f"its forward branches on .{node.args[1]} of a tensor")
        args = [self.value_of(arg) for arg in node.args]
        return getattr(args[0], name)(*args[1:]) if node.op == "call_method" else node.target(*args)  # pyright: ignore[reportCallIssue]


def modes_of_the_caller() -> tuple[bool, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
    )


def trace(
    module: nn.Module, arguments: tuple[Argument, ...], is_leaf: Callable[[str, nn.Module], bool], *, training: bool
) -> Trace:
    """The graph of a module's forward in one mode.

    Raises:
        CannotTraceError: torch.fx cannot follow it, or the graph would not do the same.
    """
    check_calls(module)
    try:
        again = copy_structure(module)
    except Exception as error:
        raise CannotTraceError(f"it cannot be copied ({first_line(error)})") from None
    tracer = BlockTracer(arguments, is_leaf)
    for m in again.modules():
        m.training = training
    before, chance = contents(again), state_of_chance()
    try:
        with warnings.catch_warnings(), NothingComputed():
            warnings.simplefilter("ignore")
            graph = tracer.trace(again)
            used_chance = state_of_chance() != chance
    except CannotTraceError:
        raise
    except Exception as error:
        raise CannotTraceError(f"torch.fx cannot follow its forward ({first_line(error)})") from None
    finally:
        restore_chance(chance)
    if used_chance:
        raise CannotTraceError("its forward draws random numbers")
    inlined = [again.get_submodule(name) for name in tracer.inlined]
    check_code(inlined)
    after = contents(again)
    check_graph(graph, module)
    if any(before[id(m)] != after[id(m)] for m in inlined):
        raise CannotTraceError("its forward changes attributes of the module")
    return Trace(graph, tracer.inlined, tracer.branches)


def calls_of_trace(model: nn.Module, is_leaf: Callable[[str, nn.Module], bool]) -> Calls:
    """How the modules of a model are called, as far as torch.fx can follow it."""
    try:
        again = copy_structure(model).eval()
        tracer = BlockTracer(usual_arguments(again), is_leaf)
    except Exception:
        return {}
    chance = state_of_chance()
    try:
        with warnings.catch_warnings(), NothingComputed():
            warnings.simplefilter("ignore")
            tracer.trace(again)
    # whatever was seen before it failed is true
    except Exception:
        pass
    finally:
        restore_chance(chance)
    return tracer.calls


def state_of_chance() -> tuple[Any, ...]:
    numpy = sys.modules.get("numpy")
    return random.getstate(), torch.get_rng_state().tolist(), numpy and pickle.dumps(numpy.random.get_state())


def restore_chance(state: tuple[Any, ...]) -> None:
    random.setstate(state[0])
    if state[2]:
        sys.modules["numpy"].random.set_state(pickle.loads(state[2]))


def contents(module: nn.Module) -> dict[int, dict[str, Any]]:
    """What the attributes of every module hold, by identity, one level deep."""
    return {id(m): {name: held(value) for name, value in vars(m).items()} for m in module.modules()}


def held(value: Any) -> Any:
    if isinstance(value, dict):
        return id(value), [(id(k), id(v)) for k, v in value.items()]
    if isinstance(value, (list, tuple, set)):
        return id(value), [id(item) for item in value]
    return id(value), [(k, id(v)) for k, v in getattr(value, "__dict__", {}).items()]


def check_code(modules: list[nn.Module]) -> None:
    for module in modules:
        if not isinstance(vars(module).get("forward"), (NoneType, FusedForward)):
            raise CannotTraceError("its forward is replaced on the instance")
        reason = why_unseen(module)
        if reason:
            raise CannotTraceError(reason)


def check_calls(module: nn.Module) -> None:
    """What a class adds to ``__call__`` would be in the graph and in the module that the graph calls."""
    for name, m in module.named_modules():
        if name and type(m).__call__ is not nn.Module.__call__ and not isinstance(m, GraphModule):
            raise CannotTraceError(f"the class of {name!r} has a __call__ of its own")


def check_graph(graph: Graph, module: nn.Module) -> None:
    """No tensor made while tracing, and no device or dtype, which may be those of the parameters at this time."""
    for node in graph.nodes:
        if node.op == "get_attr":
            holder, _, name = str(node.target).rpartition(".")
            if not hasattr(module.get_submodule(holder), name):
                raise CannotTraceError("its forward creates tensors that would be the same in every call")
        if any(isinstance(a, (torch.device, torch.dtype)) for a in tree_leaves((node.args, node.kwargs))):
            raise CannotTraceError("its forward names a device or a dtype")


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120]
