"""Running statistics of several models, of shards of data or of processes, merged into those of all data."""

import hashlib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from batchnorm.statistics.buffers import NAMES, statistics_of, tracking_layers, variances
from batchnorm.statistics.ranks import agree, gather

State = Mapping[str, Any]
Count = int | Mapping[str, int]
# the statistics of one source: buffers by name, by layer
Part = dict[str, dict[str, Tensor]]


@torch.no_grad()
def merge_running_stats(
    sources: Iterable[nn.Module | State],
    *,
    counts: Sequence[Count] | None = None,
    weights: Sequence[float] | None = None,
) -> dict[str, Tensor]:
    r"""Merge the running statistics of replicas, federated clients or shards of data.

    .. math:: \mu = \sum_i w_i \mu_i, \quad \sigma^2 = \sum_i w_i \big(\sigma_i^2 + (\mu_i - \mu)^2\big), \quad
        \sum_i w_i = 1

    The average of the variances alone forgets how far the means are apart. Covariances of whitening layers are merged
    likewise. ``num_batches_tracked`` becomes the largest: replicas that go in step, and those that are merged again
    after every round, have made so many steps; a sum would count their common past once for each of them.

    Args:
        sources: models, or state dicts, with the same BN layers.
        counts: values per channel behind each source, as a number for all layers or by layer name, as
            ``recalibrate(...).counts`` is. Then :math:`w_i = n_i / n`, and the variances are unbiased before and after:
            the result is exact for statistics of the population or of a single batch.
        weights: relative weights, such as samples or steps, where counts are not known; None for equal ones.

    Returns:
        The statistics and counters alone, by the keys of the state dicts:
        ``model.load_state_dict(merged, strict=False)`` takes them. Computed in float64, in the dtypes of the first
        source and on its device.

    Raises:
        ValueError: no source, sources with different layers or shapes, inf, NaN or a negative variance in one of them,
            counts below 1, weights that are not positive, not one for each source, or both of them.

    Source:
        Chan, Golub & LeVeque 1979 (STAN-CS-79-773), for the sums of squares of samples that are put together.

    Example:
        >>> clients = [nn.BatchNorm1d(1, momentum=1.0) for _ in range(2)]
        >>> for client, low in zip(clients, (0.0, 10.0)):
        ...     _ = client(torch.tensor([[low], [low + 2]]))
        >>> merge_running_stats(clients, counts=[2, 2])["running_var"]
        tensor([34.6667])
        >>> torch.tensor([[0.0], [2.0], [10.0], [12.0]]).var()
        tensor(34.6667)
    """
    parts = [part_of(source) for source in sources]
    if counts is not None and weights is not None:
        raise ValueError("expected counts or weights, not both")
    given = weights if counts is None else counts
    each = [1.0] * len(parts) if given is None else list(given)
    if not parts or len(each) != len(parts):
        raise ValueError(f"expected one source or more, and as many counts: got {len(parts)} and {len(each)}")
    by_layer = {name: [number_for(name, count, counts is not None) for count in each] for name in parts[0]}
    merged = merge(parts, by_layer, counts is not None, "source")
    return {f"{name}.{key}" if name else key: value for name, new in merged.items() for key, value in new.items()}


@torch.no_grad()
def synchronize_running_stats(
    model: nn.Module,
    *,
    pattern: str | Iterable[str] = "*",
    count: Count | None = None,
    weight: float | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> None:
    """Give all processes the running statistics of the data of all, as :func:`merge_running_stats` merges them.

    For training without SyncBatchNorm: DistributedDataParallel keeps those of process 0, or with
    ``broadcast_buffers=False`` lets them differ. Call it before evaluation or saving, on every process. All layers
    travel in one message of float64, on the device of the model, and every process computes the same bits. Layers
    whose ``frozen_statistics`` is True are left out. Without torch.distributed there is one process, and nothing
    changes.

    Args:
        model: on every process the same BN layers.
        pattern: of the names of layers, as of a shell; one or several.
        count: values per channel behind the statistics of this process, one number or by layer name.
        weight: relative weight of this process, where counts are not known; None for equal ones.
        process_group: as in :func:`torch.distributed.all_gather`.

    Raises:
        ValueError: as :func:`merge_running_stats`, on every process.
        RuntimeError: another process failed.

        Then nothing is changed on any of them.

    Example:
        >>> model = nn.Sequential(nn.BatchNorm1d(2))
        >>> synchronize_running_stats(model, count=64)
    """
    error, layers, numbers = None, {}, []
    device = next(itertools.chain(model.parameters(), model.buffers()), torch.empty(0)).device
    try:
        if count is not None and weight is not None:
            raise ValueError("expected count or weight, not both")
        layers = {
            name: statistics_of(layer)
            for name, layer in tracking_layers(model, pattern).items()
            if not getattr(layer, "frozen_statistics", False)
        }
        share = count if count is not None else 1.0 if weight is None else weight
        numbers = [number_for(name, share, count is not None) for name in layers]
    except ValueError as failed:
        error = failed
    agree(error, device, process_group)
    check_same_layout(layers, count is not None, device, process_group)
    if not layers:
        return
    flat = [torch.tensor(numbers, dtype=torch.float64, device=device)]
    flat += [buffer.to(device, torch.float64).flatten() for buffers in layers.values() for buffer in buffers.values()]
    rows = gather(torch.cat(flat), process_group)
    by_layer = {name: rows[:, i].tolist() for i, name in enumerate(layers)}
    parts = [unpack(row[len(layers) :], layers) for row in rows]
    for name, new in merge(parts, by_layer, count is not None, "process").items():
        for key, value in new.items():
            layers[name][key].copy_(value)


def part_of(source: nn.Module | State) -> Part:
    """The running statistics in a model or a state dict."""
    found: Part = {}
    for key, value in (source.state_dict() if isinstance(source, nn.Module) else source).items():
        name, _, last = key.rpartition(".")
        if last in NAMES:
            found.setdefault(name, {})[last] = value
    return {
        name: buffers
        for name, buffers in found.items()
        if "running_mean" in buffers and buffers.keys() & {"running_var", "running_cov"}
    }


def number_for(name: str, count: float | Mapping[str, int], counted: bool) -> float:
    """The count or the weight of one source for one layer."""
    number = count.get(name) if isinstance(count, Mapping) else count
    if number is None:
        raise ValueError(f"there is no count for layer {name!r}")
    if not 0 < number < float("inf") or (counted and number < 1):
        raise ValueError(f"expected {'counts of at least 1' if counted else 'positive weights'}, got {number}")
    return float(number)


def check_same_layout(
    layers: Part, counted: bool, device: torch.device, process_group: dist.ProcessGroup | None
) -> None:
    """Raise on all processes if one has other layers, before a message of another length is sent."""
    shapes = [(name, key, tuple(b.shape)) for name, buffers in layers.items() for key, b in buffers.items()]
    digest = hashlib.sha256(repr((counted, shapes)).encode()).digest()
    seen = gather(torch.tensor(list(digest), dtype=torch.uint8, device=device), process_group)
    others = (seen != seen[0]).any(1).nonzero()
    if len(others):
        raise ValueError(
            f"nothing was changed: process {int(others[0])} has other layers than process 0, or only one of them gives "
            "a count"
        )


def unpack(row: Tensor, like: Part) -> Part:
    """Undo the packing of one process."""
    shapes = [buffer.shape for buffers in like.values() for buffer in buffers.values()]
    pieces = iter(row.split([shape.numel() for shape in shapes]))
    return {
        name: {key: next(pieces).view(buffer.shape) for key, buffer in buffers.items()}
        for name, buffers in like.items()
    }


def merge(parts: list[Part], by_layer: dict[str, list[float]], counted: bool, what: str) -> Part:
    """All layers merged; ``what`` the parts are is for messages."""
    for number, part in enumerate(parts):
        check_part(part, parts[0], f"{what} {number}", what)
    return {name: merge_layer([part[name] for part in parts], by_layer[name], counted) for name in parts[0]}


def check_part(part: Part, first: Part, who: str, what: str) -> None:
    if not part:
        raise ValueError(f"{who} has no running statistics")
    for name in {**first, **part}:
        sizes = [{key: tuple(b.shape) for key, b in layers.get(name, {}).items()} for layers in (first, part)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"{who} differs in layer {name!r}: it has {sizes[1] or 'none'}, {what} 0 has {sizes[0] or 'none'}"
            )
        buffers = part[name]
        if not all(buffer.isfinite().all() for buffer in buffers.values()):
            raise ValueError(f"{who} has inf or NaN in the running statistics of layer {name!r}")
        if (variances(buffers) < 0).any():
            raise ValueError(f"{who} has a negative running variance in layer {name!r}")


def merge_layer(parts: list[dict[str, Tensor]], numbers: list[float], counted: bool) -> dict[str, Tensor]:
    """The buffers of one layer, merged; counters become the largest."""
    like = parts[0]
    spread = "running_var" if "running_var" in like else "running_cov"
    means, spreads = (
        torch.stack([part[key].to(like[key].device, torch.float64) for part in parts])
        for key in ("running_mean", spread)
    )
    mean, total = pool(means, spreads, torch.tensor(numbers, dtype=torch.float64, device=means.device), counted)
    merged = {"running_mean": mean, spread: total}
    for key in like.keys() - merged.keys():
        merged[key] = torch.stack([part[key].to(like[key].device) for part in parts]).amax(0)
    return {key: merged[key].to(like[key].dtype) for key in like}


def pool(means: Tensor, spreads: Tensor, numbers: Tensor, counted: bool) -> tuple[Tensor, Tensor]:
    """Mean and variance of all: (W, C) and (W, C), or (W, C / d, d, d) for covariances.

    Counts undo Bessel's correction in each part, and make it once for all.
    """
    share = numbers / numbers.sum()
    mean = torch.tensordot(share, means, 1)
    delta = means - mean
    if spreads.dim() == 2:
        between = delta.square()
    else:
        by_group = delta.view(len(delta), -1, spreads.shape[-1], 1)
        between = by_group @ by_group.mT
    within, apart = share, share
    if counted:
        within, apart = ((n / (numbers.sum() - 1).clamp(min=1)) for n in (numbers - 1, numbers))
    return mean, torch.tensordot(within, spreads, 1) + torch.tensordot(apart, between, 1)
