"""``normalize_by``: batch statistics, running statistics, or a mix, whatever the mode of a layer is."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from batchnorm.nn.batchnorm import FusedBatchNorm
from batchnorm.nn.modes import bind, replaced_method
from batchnorm.statistics.layers import has_running_statistics, normalizing_layers

# forward passes of which a mix is known; our own one comes with its rule for training
PLAIN_FORWARDS = (nn.modules.batchnorm._BatchNorm.forward, FusedBatchNorm.forward)


def normalize_by(model: nn.Module, by: str | float | None, pattern: str | Iterable[str] = "*") -> list[str]:
    r"""Choose what BN layers normalize by, in training and in evaluation.

    .. math:: \mu = a \mu_B + (1 - a) \mu_{\mathrm{running}}, \quad
        \sigma^2 = a \sigma_B^2 + (1 - a) \sigma^2_{\mathrm{running}}

    with :math:`\sigma_B^2` divided by m. "batch" is a = 1 and "running" is a = 0. The choice says nothing about what
    moves: running statistics and counters move in training mode, unless the layer is frozen (:func:`freeze`), and stay
    in evaluation mode. So:

    - "batch" in evaluation adapts to the data at hand, and the model is as before afterwards;
    - "running" in training normalizes by the running statistics as they were before the batch, to the same output as
      evaluation; then they move. No gradient passes through them.

    Gradients pass through the statistics of the batch, in both modes.

    Args:
        model: holds BN layers of ``torch.nn`` or ``batchnorm.nn``, or whitening layers; changed in place.
        by: "batch", "running", a, the share of the batch, 0 to 1; or None for torch's own rule, batch in training and
            running in evaluation, which leaves the layers exactly as they were before the first choice.
        pattern: which layers, as in :func:`freeze`.

    Returns:
        The names of the layers.

    Raises:
        ValueError: no layer matches; another ``by``; a layer without running statistics, for anything but "batch" and
            None; a layer whose ``forward`` somebody has replaced; a mix for a layer that has a rule of its own for
            training (ghost, renorm, masked, whitening, SyncBatchNorm). The model is as before.

    Limits: "batch" in evaluation is what the layer does in evaluation without running statistics: over the whole batch
    for ghost BN, without correction for renorm, over the samples of this process for SyncBatchNorm. A training pass by
    anything but the batch costs a second forward pass, for the statistics, and needs two values per channel for them. A
    mix is computed by plain operations. ``torch.compile`` and ``torch.export`` follow what they follow of the layer
    without a choice; ``torch.jit.script`` follows none. Blocks that :func:`convert` fused run unfused. As with
    :func:`freeze`, ``copy.copy`` of a layer is not an independent layer, and ``copy.deepcopy`` is.

    Source:
        Schneider et al. 2020 (arXiv:2006.16971), whose a is n / (N + n) for n samples at hand and a weight of N for the
        running statistics; Nado et al. 2020 (arXiv:2006.10963) for a = 1.

    Example:
        >>> import torch
        >>> layer = nn.BatchNorm1d(1, eps=0.0).eval()
        >>> normalize_by(layer, 0.5)
        ['']
        >>> layer(torch.tensor([[2.0], [4.0], [6.0]])).detach().flatten(), layer.running_mean
        (tensor([0.0000, 1.4771, 2.9542]), tensor([0.]))
    """
    layers = normalizing_layers(model, pattern)
    for name, layer in layers.items():
        check_can_normalize(name, layer, by)
    for layer in layers.values():
        set_normalizes_by(layer, by)
    return list(layers)


def check_can_normalize(name: str, layer: nn.Module, by: object) -> None:
    is_share = isinstance(by, (int, float)) and not isinstance(by, bool) and 0 <= by <= 1
    if by not in ("batch", "running", None) and not is_share:
        raise ValueError(f"by should be 'batch', 'running', None or the share of the batch, 0 to 1: got {by!r}")
    if by is None:
        return
    check_unreplaced(name, layer, "forward")
    if by != "batch" and not has_running_statistics(layer):
        raise ValueError(f"layer {name!r} has no running statistics to normalize by: only 'batch' is possible")
    if is_share and not mixes(layer):
        raise ValueError(
            f"layer {name!r} is a {type(layer).__name__}, whose own rule for training has no mix with running "
            f"statistics: choose 'batch' or 'running'"
        )


def mixes(layer: nn.Module) -> bool:
    """Whether a layer normalizes as torch's do, in training too."""
    cls: Any = type(layer)
    own_rule = isinstance(layer, FusedBatchNorm) and cls.train_and_track is not FusedBatchNorm.train_and_track
    return cls.forward in PLAIN_FORWARDS and not own_rule


def check_unreplaced(name: str, layer: nn.Module, method: str) -> None:
    if replaced_method(layer, method):
        raise ValueError(f"layer {name!r} has a {method} of its own, put there by somebody else: take it away first")


def set_normalizes_by(layer: Any, by: str | float | None) -> None:
    vars(layer).pop("normalizes_by", None)
    if by is not None:
        layer.normalizes_by = by if isinstance(by, str) else float(by)
    bind(layer)
