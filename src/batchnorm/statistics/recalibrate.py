"""Algorithm 2: replace running averages by population statistics, measured with frozen weights."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from batchnorm.nn import MaskedBatchNorm1d
from batchnorm.nn.whitening import Whitening
from batchnorm.statistics.layers import has_running_statistics, normalizing_layers, spread_of
from batchnorm.statistics.moments import Moments

ESTIMATORS: dict[str, Callable[[Moments], tuple[Tensor, Tensor]]] = {
    "pooled": Moments.pooled,
    "paper": Moments.averaged,
}


class Recalibration(NamedTuple):
    """What :func:`recalibrate` did: values per channel by layer name, and the layers that no batch reached."""

    counts: dict[str, int]
    not_reached: list[str]


def call_with_input(model: nn.Module, item: Any) -> Any:
    """An item of most loaders is an input, or begins with it."""
    return model(item[0] if isinstance(item, (tuple, list)) else item)


@torch.no_grad()
def recalibrate(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    estimator: str = "pooled",
    call: Callable[[nn.Module, Any], Any] = call_with_input,
) -> Recalibration:
    r"""Measure population statistics on data and store them as the running statistics of every BN layer.

    The weights stay as they are. While measuring, BN layers normalize by their batches (as in training) and every
    other layer evaluates, so dropout is off. Buffers are written at the end, all together, in place.

    Args:
        model: holds BN layers of ``torch.nn`` or ``batchnorm.nn``, or whitening layers, that track running statistics.
        loader: yields inputs, or tuples whose first element is the input, or whatever ``call`` takes.
        estimator: "pooled" takes all values as one population (law of total variance; unequal batches count by
            their size). "paper" is Algorithm 2's: :math:`E[x] = E_B[\mu_B]`,
            :math:`Var[x] = \frac{m}{m-1} E_B[\sigma_B^2]`, every batch counting alike. Covariances of whitening
            layers are estimated likewise.
        call: runs the model on an item, where it takes more than an input, such as a mask, labels or a domain:
            ``lambda model, item: model(item[0], mask=item[1])``.

    Returns:
        :class:`Recalibration`.

    Raises:
        ValueError: an unknown estimator, no BN layer with running statistics, an empty loader, or inf or NaN in the
            input of a layer.

        Whatever is raised, by the loader or the model too, statistics, modes and hooks are as before.

    Source:
        Ioffe & Szegedy 2015, Algorithm 2 lines 8 to 10; Wu & Johnson 2021 (arXiv:2105.07576) for the pooled form.

    Example:
        >>> layer = nn.BatchNorm1d(1)
        >>> recalibrate(layer, [torch.tensor([[0.0], [2.0]]), torch.tensor([[10.0], [12.0]])]).counts
        {'': 4}
        >>> layer.running_mean, layer.running_var
        (tensor([6.]), tensor([34.6667]))
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"unknown estimator {estimator!r}: expected one of {', '.join(ESTIMATORS)}")
    layers = {name: layer for name, layer in normalizing_layers(model).items() if has_running_statistics(layer)}
    if not layers:
        raise ValueError("the model has no batch normalization layer with running statistics")
    with measuring(model, layers) as moments:
        batches = 0
        for item in loader:
            call(model, item)
            batches += 1
    if batches == 0:
        raise ValueError("the loader yielded nothing, so the running statistics stay as they were")
    estimates = {name: ESTIMATORS[estimator](measured) for name, measured in moments.items() if measured.count}
    for name, (mean, var) in estimates.items():
        if not (mean.isfinite().all() and var.isfinite().all()):
            raise ValueError(f"layer {name!r} received inf or NaN, so the running statistics stay as they were")
    for name, (mean, var) in estimates.items():
        store(layers[name], mean, var, moments[name].batches)
    counts = {name: measured.count for name, measured in moments.items() if measured.count}
    return Recalibration(counts, [name for name in layers if name not in counts])


@contextmanager
def measuring(model: nn.Module, layers: dict[str, Any]) -> Iterator[dict[str, Moments]]:
    """Evaluation mode, but with BN layers that normalize by their batches and whose inputs are measured."""
    modes = [(module, module.training) for module in model.modules()]
    tracks = [(layer, layer.track_running_stats) for layer in layers.values()]
    moments = {name: moments_of(layer) for name, layer in layers.items()}
    hooks = []
    try:
        model.eval()
        for name, layer in layers.items():
            layer.train()
            layer.track_running_stats = False
            hooks.append(layer.register_forward_pre_hook(measure(moments[name]), with_kwargs=True))
        yield moments
    finally:
        for hook in hooks:
            hook.remove()
        for layer, track in tracks:
            layer.track_running_stats = track
        for module, training in modes:
            module.training = training


def moments_of(layer: nn.Module) -> Moments:
    return Moments((layer.group_size or layer.num_features) if isinstance(layer, Whitening) else None)


def measure(moments: Moments) -> Callable[..., None]:
    """A hook that adds the input of a layer, given by position or by name; of a masked layer, what is valid."""

    def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if isinstance(layer, MaskedBatchNorm1d):
            moments.add(layer.valid_values(*args, **kwargs))
        else:
            moments.add(args[0] if args else kwargs["input"])

    return hook


def store(layer: Any, mean: Tensor, spread: Tensor, batches: int) -> None:
    layer.running_mean.copy_(mean)
    running = spread_of(layer)
    assert running is not None
    running.copy_(spread)
    if layer.num_batches_tracked is not None:
        layer.num_batches_tracked.fill_(batches)
