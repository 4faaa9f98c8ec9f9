"""Which layers of a model have running statistics, and which of them a pattern names."""

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.nn.whitening import Whitening

LAYERS = (torch.nn.modules.batchnorm._BatchNorm, Whitening)


def normalizing_layers(model: nn.Module, pattern: str | Iterable[str] = "*") -> dict[str, Any]:
    """The BN and whitening layers whose names, as in ``named_modules()``, match one of the patterns.

    Args:
        model: a model, or a layer, whose name is "".
        pattern: as of a shell: ``*`` for anything, ``?`` for a character, ``[ab]``; one or several.

    Raises:
        ValueError: nothing matches one of the patterns.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LAYERS)}
    if not layers:
        raise ValueError("the model has no batch normalization layer")
    patterns = [pattern] if isinstance(pattern, str) else list(pattern)
    for one in patterns:
        if not any(fnmatchcase(name, one) for name in layers):
            some = ", ".join(repr(name) for name in list(layers)[:3])
            raise ValueError(
                f"no batch normalization layer matches {one!r}; the model has {some}{', ...' * (len(layers) > 3)}"
            )
    return {name: layer for name, layer in layers.items() if any(fnmatchcase(name, one) for one in patterns)}


def has_running_statistics(layer: Any) -> bool:
    return layer.running_mean is not None and spread_of(layer) is not None


def spread_of(layer: Any) -> Tensor | None:
    """The running variance, or of a whitening layer the running covariance."""
    return layer.running_cov if isinstance(layer, Whitening) else layer.running_var
