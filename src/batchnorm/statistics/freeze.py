"""``freeze``: layers whose running statistics stay what they are, whatever is called; ``unfreeze``."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from batchnorm.nn.conditional import ConditionalBatchNorm
from batchnorm.nn.modes import METADATA, bind
from batchnorm.statistics.layers import LAYERS, has_running_statistics, normalizing_layers
from batchnorm.statistics.normalize_by import check_can_normalize, check_unreplaced, set_normalizes_by


def freeze(
    model: nn.Module, pattern: str | Iterable[str] = "*", *, statistics: bool = True, affine: bool = False
) -> list[str]:
    """Keep the running statistics of BN layers as they are: ``model.train()`` does not reach these layers any more.

    A frozen layer is in evaluation mode: it normalizes by its running statistics and moves neither them nor
    ``num_batches_tracked``, whatever mode is asked for; ``reset_running_stats`` does nothing. It stays the same object,
    of its class, with its parameters, buffers, hooks, momentum and name; its keys in a state_dict stay too. That it is
    frozen shows in ``repr``, as ``layer.frozen_statistics``, and in the metadata of a state_dict, which every other
    loader ignores.

    Args:
        model: holds BN layers of ``torch.nn`` or ``batchnorm.nn``, or whitening layers; changed in place.
        pattern: which of them, by their names as in ``named_modules()``, with the wildcards of a shell; one or
            several. The layers inside of conditional, domain and per-activation ones have names of their own, such
            as "norm".
        statistics: freeze the running statistics.
        affine: freeze gamma and beta: they require no gradient, and the gradient that they have is dropped, since an
            optimizer with momentum or weight decay would still move them by it.

    Returns:
        The names of the layers.

    Raises:
        ValueError: no layer matches; a layer without running statistics; one whose ``train`` somebody else has
            replaced; nothing to freeze. The model is as before.

    Limits: ``layer.training = True``, assigned, is not seen (:func:`assert_unchanged` sees it). Functions that build
    new layers, such as ``SyncBatchNorm.convert_sync_batchnorm``, know nothing of frozen ones. A ``copy.copy`` of a
    frozen layer is frozen, but its ``train()`` returns, and its ``repr`` shows, the layer that it was copied from;
    ``copy.deepcopy`` has no such limit.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        >>> freeze(model)
        ['1']
        >>> model.train()[1].training, model[1]
        (False, BatchNorm1d(3, ..., track_running_stats=True, frozen_statistics=True))
    """
    if not (statistics or affine):
        raise ValueError("nothing to freeze: statistics and affine are both False")
    layers = normalizing_layers(model, pattern)
    if statistics:
        for name, layer in layers.items():
            check_can_freeze(name, layer)
        freeze_statistics(list(layers.values()))
    if affine:
        freeze_affine(model, list(layers.values()))
    return list(layers)


def unfreeze(
    model: nn.Module, pattern: str | Iterable[str] = "*", *, statistics: bool = True, affine: bool = True
) -> list[str]:
    """Undo :func:`freeze`: a layer takes the mode of the module that holds it, gamma and beta require what they did.

    Args:
        model: changed in place.
        pattern: as in :func:`freeze`.
        statistics: unfreeze running statistics.
        affine: let gamma and beta require a gradient again, where they did before they were frozen.

    Returns:
        The names of the layers that were frozen in what was asked for.

    Raises:
        ValueError: no layer matches. A layer that is not frozen is left alone.

    Example:
        >>> layer = nn.BatchNorm1d(3)
        >>> freeze(layer, affine=True), unfreeze(layer), unfreeze(layer)
        ([''], [''], [])
        >>> layer.training, layer.weight.requires_grad
        (True, True)
    """
    parents = {id(child): module for module in model.modules() for child in module.children()}
    holders = affine_holders(model)
    done = []
    for name, layer in normalizing_layers(model, pattern).items():
        own = vars(layer)
        asked = {"frozen_statistics": statistics, "frozen_affine": affine}
        thawed = [key for key in asked if asked[key] and key in own]
        if "frozen_statistics" in thawed:
            mode = own.pop("training_unless_frozen")
            layer.training = parents[id(layer)].training if id(layer) in parents else mode
        if "frozen_affine" in thawed:
            for key, parameter in holders.get(id(layer), layer).named_parameters():
                if own["frozen_affine"].get(key):
                    parameter.requires_grad_(True)
        for key in thawed:
            del own[key]
        if thawed:
            bind(layer)
            done.append(name)
    return done


def restore_modes(model: nn.Module, state_dict: Mapping[str, Any]) -> list[str]:
    """Freeze the layers that were frozen when a state_dict was made, and let them normalize by what they did.

    Args:
        model: changed in place; a layer of which the state_dict says nothing is left alone.
        state_dict: made by ``model.state_dict()``, or loaded by ``torch.load``: its metadata is read, nothing else.

    Returns:
        The names of the layers that were set.

    Raises:
        ValueError: what the metadata says is not possible for the layer of this name. The model is as before.
    """
    metadata = getattr(state_dict, "_metadata", None) or {}
    saved = {
        name: (layer, metadata[name][METADATA])
        for name, layer in model.named_modules()
        if isinstance(layer, LAYERS) and METADATA in metadata.get(name, {})
    }
    for name, (layer, modes) in saved.items():
        if modes.get("frozen_statistics"):
            check_can_freeze(name, layer)
        check_can_normalize(name, layer, modes.get("normalizes_by"))
    freeze_statistics([layer for layer, modes in saved.values() if modes.get("frozen_statistics")])
    freeze_affine(model, [layer for layer, modes in saved.values() if modes.get("frozen_affine")])
    for layer, modes in saved.values():
        if "normalizes_by" in modes:
            set_normalizes_by(layer, modes["normalizes_by"])
    return list(saved)


def check_can_freeze(name: str, layer: nn.Module) -> None:
    if not has_running_statistics(layer):
        raise ValueError(
            f"layer {name!r} has no running statistics to freeze: name others by the pattern, or freeze affine alone"
        )
    check_unreplaced(name, layer, "train")


def freeze_statistics(layers: list[Any]) -> None:
    for layer in layers:
        if "frozen_statistics" not in vars(layer):
            layer.frozen_statistics, layer.training_unless_frozen = True, layer.training
        layer.training = False
        bind(layer)


def freeze_affine(model: nn.Module, layers: list[Any]) -> None:
    holders = affine_holders(model)
    # all of them first: layers may share parameters
    before = [
        {key: parameter.requires_grad for key, parameter in holders.get(id(layer), layer).named_parameters()}
        for layer in layers
    ]
    for layer, requires_grad in zip(layers, before, strict=True):
        if "frozen_affine" not in vars(layer):
            layer.frozen_affine = requires_grad
        for parameter in holders.get(id(layer), layer).parameters():
            parameter.requires_grad_(False).grad = None
        bind(layer)


def affine_holders(model: nn.Module) -> dict[int, Any]:
    """The modules that hold gamma and beta where the layer that normalizes does not, by the id of that layer."""
    return {id(module.norm): module for module in model.modules() if isinstance(module, ConditionalBatchNorm)}
