"""Algorithm 2: replace running averages by population statistics, measured with frozen weights."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from batchnorm.statistics.layers import has_running_statistics, normalizing_layers, spread_of
from batchnorm.statistics.measuring import group_size_of, measuring
from batchnorm.statistics.moments import Moments
from batchnorm.statistics.ranks import agree, gather, is_distributed
from batchnorm.statistics.recording import first_not_finite, is_frozen

ESTIMATORS: dict[str, Callable[[Moments], tuple[Tensor, Tensor]]] = {
    "pooled": Moments.pooled,
    "paper": Moments.averaged,
}


class Recalibration(NamedTuple):
    """What :func:`recalibrate` did; ``str`` makes a table of it.

    Attributes:
        counts: values per channel by layer name, in the order in which the layers were reached.
        standard_errors: of the same layers the largest of the channels' standard errors of the mean, in standard
            deviations of the channel; NaN after one batch.
        not_reached: layers that no batch reached, left as they were.
        frozen: layers whose statistics are frozen, left as they were.
        batches: items of the loader, and
        samples: their samples, of all processes; with ``layer_by_layer`` of all passes.
    """

    counts: dict[str, int]
    standard_errors: dict[str, float]
    not_reached: list[str]
    frozen: list[str]
    batches: int
    samples: int

    def __str__(self) -> str:
        table = [("layer", "values", "standard error")]
        for name, count in self.counts.items():
            table.append((name or "(the model)", f"{count:,}", f"{self.standard_errors[name]:.2g}"))
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}" for row in table]
        lines.append(f"{self.samples:,} samples in {self.batches:,} batches")
        for what, names in (("not reached", self.not_reached), ("frozen", self.frozen)):
            if names:
                lines.append(f"left alone, {what}: {', '.join(names)}")
        return "\n".join(lines)


def call_with_input(model: nn.Module, item: Any) -> Any:
    """An item of most loaders is an input, or begins with it."""
    return model(item[0] if isinstance(item, (tuple, list)) else item)


@torch.no_grad()
def recalibrate(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    estimator: str = "pooled",
    layers: str | Iterable[str] = "*",
    call: Callable[[nn.Module, Any], Any] = call_with_input,
    layer_by_layer: bool = False,
    tolerance: float | None = None,
    max_samples: int | None = None,
    process_group: dist.ProcessGroup | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Recalibration:
    r"""Measure population statistics on data and store them as the running statistics of BN layers.

    The weights stay as they are. While measuring, the chosen layers normalize by their batches (as in training) and
    everything else evaluates: other BN layers by their running statistics, and dropout is off. Buffers are written in
    place, all together, at the end.

    Args:
        model: holds BN layers of ``torch.nn`` or ``batchnorm.nn``, or whitening layers, that track running statistics.
        loader: yields inputs, or tuples whose first element is the input, or whatever ``call`` takes.
        estimator: "pooled" takes all values as one population (law of total variance; unequal batches count by
            their size). "paper" is Algorithm 2's: :math:`E[x] = E_B[\mu_B]`,
            :math:`Var[x] = \frac{m}{m-1} E_B[\sigma_B^2]`, every batch counting alike. Covariances of whitening
            layers are estimated likewise.
        layers: patterns of names, as those of a shell. Layers with ``frozen_statistics`` are left alone in any case.
        call: runs the model on an item, where it takes more than an input, such as a mask, labels or a domain:
            ``lambda model, item: model(item[0], mask=item[1])``.
        layer_by_layer: measure each layer with those before it evaluating by their new statistics, in the order of
            execution. That is what evaluation will do, and matters where weights changed much (pruned, quantized,
            averaged) or batches are small. It costs one pass over the loader per layer.
        tolerance: stop when every chosen layer has been reached and the mean of each of its channels has a standard
            error of at most so many standard deviations of the channel, such as 0.01. Batches are what is drawn, so
            the error comes from how much their means differ, and needs two of them, shuffled. Each process stops by
            its own data.
        max_samples: stop after the batch with which a process has seen so many samples; per pass.
        process_group: under ``torch.distributed``, whose statistics are merged; None for all processes. All of them
            must call, with as many batches as each has, if any.
        on_progress: called after each batch with the numbers of batches and of samples so far, of this process.

    Returns:
        :class:`Recalibration`.

    Raises:
        ValueError: an option out of its range, no BN layer with running statistics or none that is not frozen, a
            pattern that matches nothing, an empty loader, a loader that can be iterated only once with
            ``layer_by_layer``, or inf or NaN in the input of a layer.
        RuntimeError: the model is inside ``deferred_stats`` or another recalibration; another process failed.

        Whatever is raised, by the loader or the model too, statistics, modes and hooks are as before, on all
        processes.

    A model that is wrapped in DistributedDataParallel or compiled runs without its wrapper. A SyncBatchNorm
    normalizes by the batch of its own process.

    Source:
        Ioffe & Szegedy 2015, Algorithm 2 lines 8 to 10; Wu & Johnson 2021 (arXiv:2105.07576) for the pooled form.

    Example:
        >>> layer = nn.BatchNorm1d(1)
        >>> recalibrate(layer, [torch.tensor([[0.0], [2.0]]), torch.tensor([[10.0], [12.0]])]).counts
        {'': 4}
        >>> layer.running_mean, layer.running_var
        (tensor([6.]), tensor([34.6667]))
    """
    check_options(loader, estimator, layer_by_layer, tolerance, max_samples)
    chosen, frozen = layers_to_measure(model, layers)
    feed = Feed(loader, call, max_samples, on_progress)
    remaining, done = dict(chosen), dict[str, Moments]()
    with restored_after_an_error(chosen):
        while remaining:
            reached = measure_once(model, remaining, feed, tolerance, layer_by_layer, process_group)
            wanted = list(reached)[: 1 if layer_by_layer else None]
            store_all({name: remaining.pop(name) for name in wanted}, reached, ESTIMATORS[estimator])
            done |= {name: reached[name] for name in wanted}
            if not layer_by_layer or not reached:
                break
    return Recalibration(
        {name: measured.count for name, measured in done.items()},
        {name: measured.standard_error() for name, measured in done.items()},
        list(remaining), frozen, feed.all_batches, feed.all_samples,
    )  # fmt: skip


@torch.no_grad()
def measure(
    model: nn.Module, loader: Iterable[Any], *, call: Callable[[nn.Module, Any], Any] = call_with_input
) -> dict[str, Moments]:
    """What :func:`recalibrate` would measure, without storing it: by layer, in the order of execution.

    Frozen layers are left out. Under ``torch.distributed`` all processes must call it.
    """
    chosen, _ = layers_to_measure(model, "*")
    return measure_once(model, chosen, Feed(loader, call, None, None), None, False, None)


def check_options(
    loader: Iterable[Any], estimator: str, layer_by_layer: bool, tolerance: float | None, max_samples: int | None
) -> None:
    if estimator not in ESTIMATORS:
        raise ValueError(f"unknown estimator {estimator!r}: expected one of {', '.join(ESTIMATORS)}")
    if tolerance is not None and not tolerance > 0:
        raise ValueError(f"tolerance should be above 0 standard deviations, got {tolerance}: 0.01 is a usual one")
    if max_samples is not None and max_samples < 1:
        raise ValueError(f"max_samples should be at least 1, got {max_samples}")
    if layer_by_layer and isinstance(loader, Iterator):
        raise ValueError(
            f"layer_by_layer iterates the loader once per layer, which a {type(loader).__name__} cannot do twice: "
            "give a list or a DataLoader"
        )


def layers_to_measure(model: nn.Module, patterns: str | Iterable[str]) -> tuple[dict[str, Any], list[str]]:
    """The chosen layers with running statistics, and the names of those among them that are frozen."""
    found = normalizing_layers(model, patterns)
    tracking = {name: layer for name, layer in found.items() if has_running_statistics(layer)}
    if not tracking:
        raise ValueError("the model has no batch normalization layer with running statistics")
    chosen = {name: layer for name, layer in tracking.items() if not is_frozen(layer)}
    if not chosen:
        raise ValueError(f"all {len(tracking)} batch normalization layers are frozen: unfreeze those to recalibrate")
    return chosen, [name for name in tracking if name not in chosen]


class Feed:
    """What the loader yields goes through the model, until it ends or is enough."""

    def __init__(
        self,
        loader: Iterable[Any],
        call: Callable[[nn.Module, Any], Any],
        max_samples: int | None,
        on_progress: Callable[[int, int], None] | None,
    ) -> None:
        self.loader, self.call, self.max_samples, self.on_progress = loader, call, max_samples, on_progress
        # of this process, and of all
        self.batches = self.samples = self.all_batches = self.all_samples = 0

    def run(self, model: nn.Module, is_enough: Callable[[], bool]) -> tuple[int, int]:
        """Batches and samples of one pass."""
        batches = samples = 0
        for item in self.loader:
            self.call(model, item)
            batches, samples = batches + 1, samples + samples_of(item)
            if self.on_progress is not None:
                self.on_progress(self.batches + batches, self.samples + samples)
            if (self.max_samples is not None and samples >= self.max_samples) or is_enough():
                break
        self.batches += batches
        self.samples += samples
        return batches, samples


def samples_of(item: Any) -> int:
    """The length of the first tensor, or list, of an item; 1 where there is none."""
    first = item
    if isinstance(item, Mapping):
        first = next(iter(item.values()), None)
    elif isinstance(item, (tuple, list)):
        first = item[0] if item else None
    if isinstance(first, Tensor):
        return len(first) if first.dim() else 1
    return len(first) if isinstance(first, (tuple, list)) else 1


def measure_once(
    model: nn.Module,
    layers: dict[str, Any],
    feed: Feed,
    tolerance: float | None,
    first_only: bool,
    group: dist.ProcessGroup | None,
) -> dict[str, Moments]:
    """One pass: the moments, of all processes, of the layers that were reached, in the order of execution."""

    def is_enough() -> bool:
        wanted = 1 if first_only else len(layers)
        if tolerance is None or len(moments) < wanted:
            return False
        return all(measured.standard_error() <= tolerance for measured in list(moments.values())[:wanted])

    # the wrapper's forward talks to other processes, which may have fewer batches
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    error, passed = None, (0, 0)
    with measuring(inner, layers) as moments:
        try:
            passed = feed.run(inner, is_enough)
        except Exception as caught:
            error = caught
    device = next(iter(layers.values())).running_mean.device
    agree(error, device, group)
    batches, samples, merged = merged_over_processes(passed, moments, layers, device, group)
    if batches == 0:
        raise ValueError("the loader yielded nothing, so the running statistics stay as they were")
    feed.all_batches += batches
    feed.all_samples += samples
    return merged


def merged_over_processes(
    passed: tuple[int, int],
    moments: dict[str, Moments],
    layers: dict[str, Any],
    device: torch.device,
    group: dist.ProcessGroup | None,
) -> tuple[int, int, dict[str, Moments]]:
    """Batches, samples and moments of all processes, by one message; in the order of the first that reached any."""
    if not is_distributed():
        return *passed, {name: measured for name, measured in moments.items() if measured.count}
    # (batches, samples), the place of each layer in the order of execution, and its moments
    order = [list(moments).index(name) if name in moments else len(layers) for name in layers]
    message = [torch.tensor([*passed, *order], dtype=torch.float64)]
    fields = [(layer.num_features, group_size_of(layer)) for layer in layers.values()]
    for name, (num_features, group_size) in zip(layers, fields, strict=True):
        message.append(moments.get(name, Moments(group_size)).packed(num_features))
    rows = gather(torch.cat([part.to(device) for part in message]), group)
    sizes = [len(part) for part in message]
    merged: dict[str, Moments] = {}
    for row in rows:
        head, *vectors = row.split(sizes)
        received = {
            name: Moments.unpacked(vector, *field) for name, vector, field in zip(layers, vectors, fields, strict=True)
        }
        for _, name in sorted(zip(head[2:].tolist(), layers, strict=True)):
            if received[name].count:
                merged.setdefault(name, Moments(received[name].group_size)).join(received[name])
    batches, samples = (int(number) for number in rows[:, :2].sum(0).tolist())
    return batches, samples, merged


@contextmanager
def restored_after_an_error(layers: dict[str, Any]) -> Iterator[None]:
    """What was stored for some layers is taken back if another fails."""
    kept = [(buffer, buffer.clone()) for layer in layers.values() for buffer in layer.buffers(recurse=False)]
    try:
        yield
    except BaseException:
        for buffer, before in kept:
            if not torch.equal(buffer, before):
                buffer.copy_(before)
        raise


def store_all(
    layers: dict[str, Any], moments: dict[str, Moments], estimate: Callable[[Moments], tuple[Tensor, Tensor]]
) -> None:
    estimates = {name: estimate(moments[name]) for name in layers}
    bad = first_not_finite((name, *values) for name, values in estimates.items())
    if bad is not None:
        raise ValueError(f"layer {bad!r} received inf or NaN, so the running statistics stay as they were")
    for name, (mean, spread) in estimates.items():
        store(layers[name], mean, spread, moments[name].batches)


def store(layer: Any, mean: Tensor, spread: Tensor, batches: int) -> None:
    layer.running_mean.copy_(mean)
    running = spread_of(layer)
    assert running is not None
    running.copy_(spread)
    if layer.num_batches_tracked is not None:
        layer.num_batches_tracked.fill_(batches)
