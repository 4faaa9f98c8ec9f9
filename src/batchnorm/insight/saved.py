"""One forward under saved-tensor hooks: who saves which tensor, and a model that is as before afterwards."""

import sys
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


@contextmanager
def unchanged(model: nn.Module, inputs: list[Tensor]) -> Iterator[None]:
    """Undo what a forward does to buffers, modes, gradients and random numbers."""
    modes = [(module, module.training) for module in model.modules()]
    # a scripted module has a fixed set of buffers, behind a view
    buffers = [(held, dict(held)) for held in (module._buffers for module in model.modules()) if isinstance(held, dict)]
    contents = [(storage, storage.clone()) for storage in storages_of(model.buffers()).values() if has_values(storage)]
    leaves = {id(t): t for t in [*model.parameters(), *inputs] if t.is_leaf and t.requires_grad}.values()
    grads = [(leaf, leaf.grad) for leaf in leaves]
    gpus = {tensor.device.index for tensor in [*model.parameters(), *model.buffers(), *inputs] if tensor.is_cuda}
    try:
        for leaf, _ in grads:
            # a backward inside the forward would add to it in place
            leaf.grad = None
        with torch.random.fork_rng(sorted(gpus)):
            yield
    finally:
        for module, training in modes:
            module.training = training
        for now, before in buffers:
            now.clear()
            now.update(before)
        for storage, copy in contents:
            # by storage: bit for bit, and an earlier graph that saved the buffer sees no new version
            storage.copy_(copy)
        for leaf, grad in grads:
            leaf.grad = grad


def has_values(storage: Any) -> bool:
    return isinstance(storage, torch.UntypedStorage) and storage.device.type != "meta"


class Saved:
    """What autograd holds in place of the tensor; it dies with the node of the graph that holds it."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class Recorder:
    """Who saved what, in the order of a forward. Tensors stay alive here, so no address is used twice."""

    output: Any = None

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        self.modules = modules
        self.ran = {""}
        self.running = [""]
        self.saves: list[tuple[str, Tensor, weakref.ref[Saved]]] = []

    def pack(self, tensor: Tensor) -> Saved:
        saved = Saved(tensor.detach())
        self.saves.append((self.running[-1], saved.tensor, weakref.ref(saved)))
        return saved

    def enter(self, name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            self.running.append(name)
            self.ran.add(name)

        return observing(hook)

    def leave(self, name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            # another hook may have raised before ours entered
            if self.running[-1] == name:
                self.running.pop()

        return observing(hook)

    def kept(self) -> Iterator[tuple[str, Tensor]]:
        """Name of the module and tensor, for every save that the output's graph still holds."""
        return ((name, tensor) for name, tensor, saved in self.saves if saved() is not None)


def observing(hook: Callable[..., None]) -> Callable[..., None]:
    """Mark a hook that changes nothing: a fused block may pass it over, and what is saved is then the block's."""
    hook.observes_only = True  # pyright: ignore[reportFunctionMemberAccess]
    return hook


@contextmanager
def recording(model: nn.Module) -> Iterator[Recorder]:
    """Follow which module runs, and what it saves."""
    modules = modules_entered(model)
    recorder = Recorder({"": model} | modules)
    pack: Any = recorder.pack
    if "torch._dynamo" in sys.modules:
        # a compiled frame would trace and compile the hook
        pack = torch.compiler.disable(pack)
    handles = []
    try:
        for name, module in modules.items():
            handles.append(module.register_forward_pre_hook(recorder.enter(name), prepend=True))
            handles.append(module.register_forward_hook(recorder.leave(name), always_call=True))
        with torch.autograd.graph.saved_tensors_hooks(pack, attrgetter("tensor")):
            yield recorder
    finally:
        for handle in handles:
            handle.remove()
        # the wrapper of a hook can outlive this call, the memory must not
        recorder.saves.clear()
        recorder.output = None


def modules_entered(model: nn.Module) -> dict[str, nn.Module]:
    """Modules inside the model that can have hooks, by name: inside a compiled one, the hook would be compiled too."""
    dynamo = sys.modules.get("torch._dynamo")
    hidden: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule) or module._compiled_call_impl is not None:
            hidden.update(module.modules())
        elif dynamo is not None and isinstance(module, dynamo.OptimizedModule):
            hidden.update(inner for inner in module.modules() if inner is not module)
    return {name: module for name, module in model.named_modules() if name and module not in hidden}


class Opaque(NamedTuple):
    """Stands for the storage of a tensor that shows none."""

    tensor: Tensor

    def nbytes(self) -> int:
        return self.tensor.numel() * self.tensor.element_size()


def storages_of(tensors: Iterable[Tensor]) -> dict[Hashable, Any]:
    """The storages behind tensors by identity, which is theirs as long as a tensor keeps them alive."""
    found: dict[Hashable, Any] = {}
    for tensor in tensors:
        parts = parts_of(tensor)
        if parts:
            found |= storages_of(parts)
            continue
        try:
            storage = tensor.untyped_storage()
            found["storage", storage._cdata] = storage
        except NotImplementedError:
            found["tensor", id(tensor)] = Opaque(tensor)
    return found


def parts_of(tensor: Any) -> list[Tensor]:
    """The plain tensors that a sparse tensor or a wrapper subclass consists of; none for others."""
    if hasattr(tensor, "__tensor_flatten__"):
        return [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
    if tensor.layout is torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return []
