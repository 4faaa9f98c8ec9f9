"""Running statistics that wait: collected over any number of forwards, applied by one update, or dropped."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from batchnorm._ops.choice import Choice
from batchnorm.nn.batchnorm import FusedBatchNorm
from batchnorm.nn.renorm import BatchRenorm
from batchnorm.nn.whitening import Whitening
from batchnorm.reference import values_per_channel
from batchnorm.statistics.layers import has_running_statistics, normalizing_layers, spread_of
from batchnorm.statistics.measuring import group_size_of
from batchnorm.statistics.moments import Moments
from batchnorm.statistics.ranks import is_distributed
from batchnorm.statistics.recording import (
    claimed,
    first_not_finite,
    recorded_by,
    train_with_scratch,
    without_compiled_graphs,
)

STATISTICS = ("running_mean", "running_var", "running_cov", "num_batches_tracked")


class Transaction:
    """What :func:`deferred_stats` yields: the statistics collected since the last commit or rollback.

    Example:
        >>> layer = nn.BatchNorm1d(1, momentum=1.0)
        >>> with deferred_stats(layer) as tx:
        ...     _ = layer(torch.tensor([[0.0], [torch.inf]]))
        ...     tx.rollback()
        ...     _ = layer(torch.tensor([[0.0], [2.0]]))
        ...     tx.counts
        {'': 2}
        >>> layer.running_mean
        tensor([1.])
    """

    def __init__(self, layers: dict[str, Any]) -> None:
        self.layers = layers
        self.pending: dict[str, Moments] = {}
        self.is_open = True

    @property
    def counts(self) -> dict[str, int]:
        """Values per channel that wait for a commit, by layer name."""
        return {name: moments.count for name, moments in self.pending.items()}

    @torch.no_grad()
    def commit(self) -> None:
        """Move the running statistics, once, towards those of all values since the last commit or rollback.

        Raises:
            ValueError: a layer received inf or NaN, or its running statistics hold some already. No layer is
                changed, and what was collected still waits: roll back.
            RuntimeError: the block has ended.
        """
        self.check_open()
        updates = {name: updated(self.layers[name], moments) for name, moments in self.pending.items()}
        bad = first_not_finite((name, *update) for name, update in updates.items())
        if bad is not None:
            raise ValueError(
                f"layer {bad!r} received inf or NaN since the last commit, or its running statistics hold some "
                "already: roll back a step that was skipped, and recalibrate running statistics that are not finite"
            )
        for name, (mean, spread) in updates.items():
            store(self.layers[name], mean, spread)
        self.pending.clear()

    def rollback(self) -> None:
        """Forget what was collected since the last commit.

        Raises:
            RuntimeError: the block has ended.
        """
        self.check_open()
        self.pending.clear()

    def check_open(self) -> None:
        if not self.is_open:
            raise RuntimeError("the block of deferred_stats has ended: commit and roll back inside of it")

    def record(self, name: str, layer: Any, input: Tensor, mean: Tensor, unbiased: Tensor) -> None:
        """Count a batch, unless it was counted before, by the mean and the unbiased spread that a forward gave it."""
        if is_recomputing():
            return
        count = count_of(layer, input)
        if count:
            moments = self.pending.setdefault(name, Moments(group_size_of(layer)))
            moments.merge_squares(count, mean.double(), unbiased.double() * (count - 1))


@contextmanager
def deferred_stats(model: nn.Module, *, layers: str | Iterable[str] = "*") -> Iterator[Transaction]:
    r"""Collect the statistics of training forwards, and apply one update of the running statistics when told to.

    .. math:: \mathrm{running} \leftarrow (1 - \mathrm{momentum}) \, \mathrm{running} + \mathrm{momentum} \cdot
        \mathrm{pooled}

    where *pooled* are mean and unbiased variance (covariance) of all values that a layer normalized since the last
    commit or rollback, as one batch, merged in float64. With ``momentum=None`` the weight is
    ``1 / (num_batches_tracked + 1)``. A commit adds 1 to ``num_batches_tracked``, and to Batch Renorm's
    ``schedule_step``, of every layer that was reached. What the model computes has the same bits as without the
    block, as long as running statistics do not enter it: Batch Renorm corrects towards those of the last commit.

    Inside the block no forward writes buffers of the chosen layers. A forward that runs inside a backward pass, as
    that of an activation checkpoint does, is a recomputation and is not counted. Layers in evaluation mode, and
    batches that are empty, are not counted either.

    Args:
        model: holds BN layers of ``torch.nn`` or ``batchnorm.nn``, or whitening layers, that track running statistics.
        layers: patterns of names, as those of a shell; other layers update at every forward, as ever.

    Yields:
        :class:`Transaction`, whose ``commit()`` applies what was collected and whose ``rollback()`` drops it, any
        number of times inside the block, usually one of them per step of the optimizer. What is left when the block
        ends is committed, and dropped if it ends by an exception.

    Raises:
        ValueError: no BN layer with running statistics, a pattern that matches nothing, or inf or NaN at a commit.
        TypeError: the model is compiled. Graphs that were compiled around it run eagerly inside the block.
        RuntimeError: a layer is in another ``deferred_stats`` or in ``recalibrate`` already.

    Example:
        >>> model = nn.BatchNorm1d(1, momentum=1.0)
        >>> with deferred_stats(model) as tx:
        ...     for x in torch.tensor([[[0.0], [2.0]], [[10.0], [12.0]]]):
        ...         _ = model(x)
        ...     tx.commit()
        >>> model.running_mean, model.running_var, model.num_batches_tracked
        (tensor([6.]), tensor([34.6667]), tensor(1))
    """
    found = normalizing_layers(model, layers)
    chosen = {name: layer for name, layer in found.items() if has_running_statistics(layer)}
    if not chosen:
        raise ValueError("the model has no batch normalization layer with running statistics")
    check_not_compiled(model)
    transaction = Transaction(chosen)
    with ExitStack() as stack:
        stack.callback(transaction.pending.clear)
        stack.callback(setattr, transaction, "is_open", False)
        stack.enter_context(claimed(chosen))
        stack.enter_context(without_compiled_graphs())
        for name, layer in chosen.items():
            stack.enter_context(deferred(name, layer, transaction))
        yield transaction
        transaction.commit()


def check_not_compiled(model: nn.Module) -> None:
    for name, module in model.named_modules():
        # torch.compile(model), and model.compile()
        if "_orig_mod" in module._modules or module._compiled_call_impl is not None:
            raise TypeError(
                f"the {'model' if name == '' else f'module {name!r}'} is compiled, and its graph has the update of the "
                "running statistics built in: train the model as it was before torch.compile inside deferred_stats"
            )


def is_recomputing() -> bool:
    """Whether this forward runs inside a backward pass; torch.utils.checkpoint asks the same."""
    return torch._C._current_graph_task_id() != -1


def deferred(name: str, layer: Any, transaction: Transaction) -> AbstractContextManager[None]:
    if isinstance(layer, FusedBatchNorm):
        return recorded_by(layer, DeferredForward(name, transaction))
    return swapped(layer, DeferredBuffers(name, transaction))


class DeferredForward:
    """The recorder of a layer of ours."""

    def __init__(self, name: str, transaction: Transaction) -> None:
        self.name, self.transaction = name, transaction

    def __call__(
        self,
        layer: FusedBatchNorm,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        choice: Choice,
    ) -> Tensor:
        if not layer.track_running_stats:
            return layer.train_and_track(input, weight, bias, residual, None, None, 0.0, None, choice)
        output, mean, var = train_with_scratch(layer, input, weight, bias, residual, choice)
        self.transaction.record(self.name, layer, input, mean, var)
        return output

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """A copy of the layer is not recorded."""
        return type(None), ()


class DeferredBuffers:
    """Hooks around a forward that is not ours: it writes into other buffers, with momentum 1."""

    def __init__(self, name: str, transaction: Transaction) -> None:
        self.name, self.transaction = name, transaction
        # by module: torch.nn.DataParallel hands these hooks to replicas
        self.own: dict[int, tuple[dict[str, Tensor | None], float | None]] = {}

    def before(self, layer: Any, args: tuple[Any, ...]) -> None:
        if not (layer.training and layer.track_running_stats and has_running_statistics(layer)):
            return
        buffers = {name: layer._buffers[name] for name in STATISTICS if name in layer._buffers}
        self.own[id(layer)] = buffers, layer.momentum
        layer._buffers.update({name: None if b is None else b.clone() for name, b in buffers.items()})
        layer.momentum = 1.0

    def after(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Also called after a forward that raised, without an output."""
        if id(layer) not in self.own:
            return
        scratch = dict(layer._buffers)
        own, layer.momentum = self.own.pop(id(layer))
        layer._buffers.update(own)
        if output is None:
            return
        input = args[0] if args else kwargs["input"]
        mean, spread = scratch["running_mean"], spread_in(scratch)
        if isinstance(layer, Whitening) and input.numel():
            # a batch with inf or NaN, which it lets no buffer see
            mean = mean.where(scratch["num_batches_tracked"] > layer.num_batches_tracked, float("nan"))
        self.transaction.record(self.name, layer, input, mean, spread)


@contextmanager
def swapped(layer: Any, deferring: DeferredBuffers) -> Iterator[None]:
    # first after the forward and last before it, so that other hooks see the layer's own buffers
    handles = [
        layer.register_forward_pre_hook(Hook(deferring.before)),
        layer.register_forward_hook(Hook(deferring.after), with_kwargs=True, always_call=True, prepend=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Hook:
    """A hook that stays behind, inert, where the layer is copied or pickled."""

    def __init__(self, call: Callable[..., None] | None = None) -> None:
        self.call = call

    def __call__(self, *args: Any) -> None:
        if self.call is not None:
            self.call(*args)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Hook, ()


def spread_in(buffers: dict[str, Any]) -> Tensor:
    return buffers["running_cov" if "running_cov" in buffers else "running_var"]


def count_of(layer: Any, input: Tensor) -> int:
    """The values per channel behind the batch's statistics, which those of SyncBatchNorm share."""
    count = values_per_channel(input)
    if isinstance(layer, nn.SyncBatchNorm) and is_distributed():
        group = layer.process_group or dist.group.WORLD
        if dist.get_world_size(group) > 1:
            total = torch.tensor(count, device=input.device)
            dist.all_reduce(total, group=group)
            return int(total)
    return count


def updated(layer: Any, moments: Moments) -> tuple[Tensor, Tensor]:
    """What the running statistics will be, in float64."""
    mean, spread = moments.pooled()
    running = spread_of(layer)
    assert running is not None
    if layer.momentum == 0:
        return layer.running_mean.double(), running.double()
    weight = layer.momentum
    if weight is None:
        # of a layer without a counter torch keeps the running statistics
        weight = 0.0 if layer.num_batches_tracked is None else 1.0 / (layer.num_batches_tracked + 1).double()
    return layer.running_mean.double().lerp(mean, weight), running.double().lerp(spread, weight)


def store(layer: Any, mean: Tensor, spread: Tensor) -> None:
    layer.running_mean.copy_(mean)
    running = spread_of(layer)
    assert running is not None
    running.copy_(spread)
    if layer.num_batches_tracked is not None:
        layer.num_batches_tracked.add_(1)
    if isinstance(layer, BatchRenorm):
        layer.schedule_step.add_(1)
