"""Which batch normalization layers become ours, and how they do and do not any more."""

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

import batchnorm.nn
from batchnorm.nn.batchnorm import FusedBatchNorm
from batchnorm.nn.modes import replaced_method

OURS: dict[type, type] = {
    nn.BatchNorm1d: batchnorm.nn.BatchNorm1d,
    nn.BatchNorm2d: batchnorm.nn.BatchNorm2d,
    nn.BatchNorm3d: batchnorm.nn.BatchNorm3d,
}
HARMLESS = {"__init__", "__module__", "__qualname__", "__doc__", "__annotations__", "__firstlineno__"} | {
    "__static_attributes__",
    "__parameters__",
}
# what our class keeps in an instance, and torch's does not
OWN_ATTRIBUTES = ("activation", "implementation", "last_choice")


def is_batch_norm(module: nn.Module) -> bool:
    """Whether a module belongs in the list of changes: by class, or by name as ``FrozenBatchNorm2d``."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return True
    name = getattr(module, "original_name", type(module).__name__)
    return "BatchNorm" in name and not any(is_batch_norm(inner) for inner in module.modules() if inner is not module)


def class_of_ours(layer: nn.Module) -> type | None:
    """Our class for an exact layer of torch.nn, or a subclass that adds nothing but a constructor."""
    for cls in type(layer).__mro__:
        if cls in OURS:
            return OURS[cls]
        if not set(vars(cls)) <= HARMLESS:
            return None
    return None


def why_left_alone(layer: nn.Module) -> str:
    """Why a layer cannot become ours; "" if it can."""
    cls = type(layer)
    if isinstance(layer, torch.jit.ScriptModule):
        return "it is scripted: convert before torch.jit.script"
    if isinstance(layer, LazyModuleMixin):
        return "it has no parameters yet: call the model once, then convert"
    if isinstance(layer, nn.SyncBatchNorm):
        return "it is a SyncBatchNorm, whose statistics come from all processes"
    if nn.utils.parametrize.is_parametrized(layer):
        return "it is parametrized: convert before registering the parametrization"
    if class_of_ours(layer) is None:
        return f"its class {cls.__module__}.{cls.__qualname__} is not, or changes, a layer of torch.nn"
    taken = [name for name in (*OWN_ATTRIBUTES, "converted_from") if hasattr(layer, name)]
    if taken:
        return f"it has an attribute {taken[0]!r} of its own, which means something else in our layers"
    # what freeze and normalize_by put there calls the class, whichever it is
    replaced = replaced_method(
        layer, *(n for n in vars(layer) if hasattr(nn.BatchNorm2d, n) and callable(getattr(cls, n)))
    )
    if replaced:
        return f"its method {replaced} is replaced on the instance"
    return ""


def is_ours(layer: nn.Module) -> bool:
    return isinstance(layer, FusedBatchNorm)


def swap(layer: nn.Module) -> None:
    """Make a torch layer ours in place: the same object, parameters, buffers, hooks and mode."""
    ours, original = class_of_ours(layer), type(layer)
    assert ours is not None
    layer.__dict__["converted_from"] = original
    layer.__class__ = ours


def restore(layer: nn.Module) -> None:
    """Undo :func:`swap`."""
    if "converted_from" in layer.__dict__:
        layer.__class__ = layer.__dict__.pop("converted_from")
    for name in OWN_ATTRIBUTES:
        layer.__dict__.pop(name, None)
