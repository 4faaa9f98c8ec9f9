"""``convert`` makes the batch normalization layers of a model ours and fuses them with what follows; ``revert``."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from batchnorm.surgery.blocks import Search
from batchnorm.surgery.calls import Calls, calls_of_example
from batchnorm.surgery.changes import Change, Changes
from batchnorm.surgery.fused import OWN_ATTRIBUTES, FusedForward
from batchnorm.surgery.layers import is_batch_norm, is_ours, restore, swap, why_left_alone
from batchnorm.surgery.tracing import calls_of_trace, first_line

ALREADY = "already converted"


def convert(model: nn.Module, example: Any = None, *, fuse: bool = True) -> tuple[nn.Module, Changes]:
    """Make the BN layers of a model ours, in place, and let them absorb a following activation or add + activation.

    A layer changes its class and nothing else: it stays the same object, with its parameters, buffers, hooks, mode
    and name. What can be absorbed is found by following the data flow with :mod:`torch.fx`, block by block, from the
    innermost to the model. The smallest block that holds a layer and what it absorbs gets a fused ``forward``; all
    modules stay where and what they are, so state_dict, names, optimizers and checkpoints do not notice.

    A fused forward runs only where it is the same as the block's own: same kind of arguments, one mode, submodules
    and plain attributes as they were, no hook on anything that it would pass over. Otherwise the block's own forward
    runs, and under torch.compile, torch.export and other tracers too. So a hook added later sees what it always saw.

    Args:
        model: changed in place. Convert before ``torch.compile``.
        example: what the model is called with: a tensor, a tuple of arguments or a dict of keyword arguments. A copy
            of the model runs on it once, in evaluation mode. It tells how blocks are called, where torch.fx cannot
            follow the whole model, and which way branches on the shape of an input go; such a branch is checked in
            every call. Without it, blocks are taken to be called with tensors for the arguments without a default.
        fuse: absorb what follows; False only changes classes.

    Returns:
        ``(model, changes)``: the same model, and a :class:`Change` per layer, which prints as a table.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: the model is compiled, or does not run on the example.

        Whatever is raised, the model is as before.

    Limits: what a forward does besides computing its outputs from arguments and attributes (writing to globals or
    files) and changes inside mutable attributes (lists, configurations) are not seen. An activation module that is not
    torch's is recognized by its values and gradients at many points. ``copy.copy`` of a fused block runs the original.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2), nn.BatchNorm1d(2))
        >>> model, changes = convert(model)
        >>> print(changes)
        layer  what           reason
        1      absorbed relu
        4      converted      its output is the model's
    """
    check(model)
    layers = {name: module for name, module in model.named_modules() if is_batch_norm(module)}
    done = fused_layers(model)
    why = {name: why_left_alone(layer) for name, layer in layers.items() if not is_ours(layer)}
    usable = {name: layer for name, layer in layers.items() if not why.get(name)}
    fused = {name for name, layer in usable.items() if id(layer) in done}
    search = Search(model, usable, fused)
    if fuse and usable:
        # as a model is trained, wherever convert is called
        with torch.inference_mode(False), torch.enable_grad():
            search.run(known_calls(model, example, layers))
    changes = Changes(describe(name, layer, why, done, search) for name, layer in layers.items())
    with all_or_nothing() as undo:
        for layer in usable.values():
            if not is_ours(layer):
                undo.callback(restore, layer)
                swap(layer)
        for forward in search.forwards:
            undo.callback(forward.block.__dict__.update, own_attributes(forward.block))
            undo.callback(remove, forward.block)
            forward.install()
    return model, changes


def revert(model: nn.Module, changes: Iterable[Change] | None = None) -> nn.Module:
    """Undo :func:`convert`: classes and forwards are the original ones again.

    Parameters and statistics stay as they are now. Works on a copy, and on a model that was pickled, too.

    Args:
        model: changed in place.
        changes: what ``convert`` returned, or some of it, to undo only these layers; a block that fused one of them
            gets its own forward back. None for all.

    Returns:
        The same model.

    Raises:
        TypeError: ``model`` is not a module.

    Example:
        >>> model, changes = convert(nn.Sequential(nn.BatchNorm1d(2), nn.ReLU()))
        >>> type(revert(model)[0])
        <class 'torch.nn.modules.batchnorm.BatchNorm1d'>
    """
    check_module(model)
    names = None if changes is None else {change.name for change in changes}
    chosen = {id(layer): layer for name, layer in model.named_modules() if names is None or name in names}
    for block in list(model.modules()):
        forward = block.__dict__.get("forward")
        if isinstance(forward, FusedForward) and any(id(layer) in chosen for layer in forward.layers):
            remove(block)
    for layer in chosen.values():
        if "converted_from" in layer.__dict__:
            restore(layer)
    return model


def check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__module__}.{type(model).__qualname__}")


def check(model: object, verb: str = "convert") -> None:
    check_module(model)
    assert isinstance(model, nn.Module)
    for name, module in model.named_modules():
        # by name, because importing torch._dynamo takes seconds
        if type(module).__name__ == "OptimizedModule" and type(module).__module__.startswith("torch._dynamo"):
            what = f"its module {name!r}" if name else "the model"
            raise ValueError(f"{what} is compiled: {verb} the original, then call torch.compile on the result")


def known_calls(model: nn.Module, example: Any, layers: dict[str, nn.Module]) -> Calls:
    """How the modules of the model are called: seen on the example, or in a graph of the whole model."""
    if example is not None:
        try:
            return calls_of_example(model, example)
        except Exception as error:
            raise ValueError(
                f"the model does not run on the example ({first_line(error)}): "
                f"give what model(...) takes, as a tensor, a tuple or a dict of keyword arguments"
            ) from error
    followed = {id(layer) for layer in layers.values()}
    inner = {
        name
        for name, module in model.named_modules()
        if id(module) not in followed and any(id(m) in followed for m in module.modules())
    }
    return calls_of_trace(model, lambda name, module: name not in inner)


def fused_layers(model: nn.Module) -> dict[int, str]:
    """What the layers of fused blocks absorb already."""
    forwards = [m.__dict__["forward"] for m in model.modules() if isinstance(m.__dict__.get("forward"), FusedForward)]
    return {
        id(layer): what for forward in forwards for layer, what in zip(forward.layers, forward.absorbed, strict=True)
    }


def describe(name: str, layer: nn.Module, why: dict[str, str], done: dict[int, str], search: Search) -> Change:
    reason = search.reasons.get(name, "")
    if why.get(name):
        return Change(name, "left alone", why[name])
    if id(layer) in done:
        return Change(name, "left alone", f"{ALREADY}: {done[id(layer)]}")
    if name in search.what:
        return Change(name, search.what[name], reason)
    if is_ours(layer):
        return Change(name, "left alone", f"{ALREADY}{reason and ': ' + reason}")
    return Change(name, "converted", reason)


@contextmanager
def all_or_nothing() -> Iterator[ExitStack]:
    """Runs the callbacks that are registered, last one first, if the body is left by an exception."""
    with ExitStack() as undo:
        yield undo
        undo.pop_all()


def own_attributes(block: nn.Module) -> dict[str, Any]:
    return {name: block.__dict__[name] for name in OWN_ATTRIBUTES if name in block.__dict__}


def remove(block: nn.Module) -> None:
    for name in OWN_ATTRIBUTES:
        block.__dict__.pop(name, None)
