"""Normalizing layers that stay float32 in a model of half precision."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.statistics.layers import normalizing_layers

NARROW = (torch.float16, torch.bfloat16)


def keep_float32(model: nn.Module, *, pattern: str | Iterable[str] = "*") -> list[str]:
    """Keep BN layers in float32 whatever happens to the model: ``half()``, ``bfloat16()``, ``to``, assigning loads.

    A running average in bfloat16 has 8 bits: with a momentum of 0.001 it never moves. Whole layers are kept, weight
    and bias too, since torch's do not take statistics of another dtype than their weight; they do take inputs of half
    precision, and their output has the dtype of the input. Values that are in half precision already are widened now,
    and those of a half-precision checkpoint when it is loaded. The setting is part of each layer: copies and pickles
    have it; layers that replace them, as by ``convert_sync_batchnorm`` or :func:`batchnorm.convert`, do not, so convert
    first. float64 stays possible.

    Args:
        model: holds BN layers of ``torch.nn`` or ``batchnorm.nn``, or whitening layers.
        pattern: of the names of layers, as of a shell; one or several.

    Returns:
        The names of the layers.

    Raises:
        ValueError: nothing matches the pattern.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        >>> keep_float32(model)
        ['1']
        >>> model = model.bfloat16()
        >>> model[0].weight.dtype, model[1].running_var.dtype
        (torch.bfloat16, torch.float32)
        >>> model(torch.randn(4, 3, dtype=torch.bfloat16)).dtype
        torch.bfloat16
    """
    layers = normalizing_layers(model, pattern)
    for layer in layers.values():
        layer.__dict__["_apply"] = partial(apply_and_keep, layer)
        if widen not in layer._load_state_dict_post_hooks.values():
            layer.register_load_state_dict_post_hook(widen)
        widen(layer)
    return list(layers)


def apply_and_keep(layer: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
    """``Module._apply``, of which everything else is made; ``fn`` may move tensors, but not narrow them."""

    def kept(tensor: Tensor) -> Tensor:
        done = fn(tensor)
        if done.dtype not in NARROW:
            return done
        return tensor.to(done.device, torch.float32 if tensor.is_floating_point() else tensor.dtype)

    return type(layer)._apply(layer, kept, recurse)


def widen(layer: nn.Module, incompatible_keys: Any = None) -> None:
    """Make what is in half precision float32; also a hook after ``load_state_dict``."""
    layer._apply(lambda tensor: tensor.float() if tensor.dtype in NARROW else tensor)
