"""``explain_gap``: how far evaluation is from training, which BN layers make the difference, and why."""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from batchnorm.insight.gap_causes import AT_FAULT, FEW_VALUES, REMEDIES, Batches, Cause, cause_of, evidence_of, stacked
from batchnorm.insight.outputs import disagreement, distance, floats_in
from batchnorm.insight.saved import unchanged
from batchnorm.reference import batch_mean, batch_var, values_per_channel

Call = Callable[[nn.Module, Any], Any]
HEADINGS = ("layer", "change", "gap left", "cause", "because")


class LayerGap(NamedTuple):
    """What one layer adds to the gap.

    Attributes:
        name: as in ``model.named_modules()``.
        change: of the outputs of evaluation if this layer alone normalizes by its batches, in their standard
            deviations.
        gap_left: the gap that remains then.
        cause: "not finite", "initial values left over", "stale average", "other data", "inherited", "few values" or
            "sampling noise".
        reason: in words, with the numbers.
        remedy: what to do.
        mean_off: distance of the running mean from the measured one, in standard deviations, over the channels the
            root of the mean square.
        var_off: the same of the variance, as a share of the measured one.
        noise: the distance that sampling explains, the larger of the two.
        count: values per channel in the smallest batch.
    """

    name: str
    change: float
    gap_left: float
    cause: str
    reason: str
    remedy: str
    mean_off: float
    var_off: float
    noise: float
    count: int  # pyright: ignore[reportIncompatibleMethodOverride]


class Gap(NamedTuple):
    """What :func:`explain_gap` found; ``str`` makes a table of it.

    Attributes:
        gap: how far the outputs of evaluation are from those with BN by batches, the root of the mean square over the
            standard deviation of the latter; of several outputs the largest. Infinite if evaluation alone gives inf or
            NaN, NaN if nothing can be compared.
        disagreement: share of samples whose largest score is another one; None if no output is (N, K).
        layers: first the one without which the least of the gap is left; empty if the gap is below ``worth``.
        batches: items that were looked at, and
        samples: how many samples the first layer saw in them.
    """

    gap: float
    disagreement: float | None
    layers: tuple[LayerGap, ...]
    batches: int
    samples: int

    def __str__(self) -> str:
        head = f"{self.gap:.2g} standard deviations of the output between training and evaluation"
        if self.disagreement is not None:
            head += f", another largest score in {self.disagreement:.1%} of the samples"
        lines = [f"{head} ({self.samples} samples, {self.batches} batches)"]
        rows = [HEADINGS] + [
            (one.name or "(the model)", f"{one.change:.2g}", f"{one.gap_left:.2g}", one.cause, one.reason)
            for one in self.layers
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(len(HEADINGS) - 1)]
        if self.layers:
            lines += ["  ".join([*map(str.ljust, row, widths), row[-1]]).rstrip() for row in rows]
        return "\n".join(lines)


def call_with_input(model: nn.Module, item: Any) -> Any:
    return model(item[0] if isinstance(item, (tuple, list)) else item)


@torch.no_grad()
def explain_gap(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    call: Call = call_with_input,
    max_batches: int = 4,
    worth: float = 0.0,
) -> Gap:
    """Say how far evaluation is from training, and which BN layers cause it, and why.

    Everything evaluates, dropout is off, but BN layers normalize by their batches (training) or by their running
    statistics (evaluation). Then evaluation runs once for each layer with that layer alone by its batches. The cause
    comes from what the running statistics are, held against what the batches have and how much these differ.

    Args:
        model: holds BN layers of ``torch.nn`` or ``batchnorm.nn``, or whitening layers. Those that are frozen or told
            what to normalize by do the same in both modes and are left out.
        loader: yields inputs, or tuples whose first element is the input, or whatever ``call`` takes; training data
            in batches as large as those of training. Two batches or more tell how much batches differ.
        call: runs the model on an item.
        max_batches: items to look at. They are held in memory together.
        worth: the gap from which the layers are looked at. Each costs a pass over the items.

    Returns:
        :class:`Gap`.

    Raises:
        ValueError: no BN layer with running statistics, a lazy model, an empty loader, or a batch with one value per
            channel.

        Whatever is raised, modes, buffers, hooks, gradients and torch's random numbers are as before.

    What tells the causes apart: with "initial values left over", (1 - momentum)^batches of mean 0 and variance 1
    explains the difference. "stale average" is any other difference of at least three times the sampling noise; data
    that were prepared in another way look the same, except to a layer that no weights precede ("other data"). An
    "inherited" difference is that of layers before. "few values" and "sampling noise" belong to the batches: there
    evaluation is the better mode. In distributed training each process explains its own data.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2), nn.BatchNorm1d(2))
        >>> batches = [torch.randn(64, 2) + 5 for _ in range(3)]
        >>> for batch in 40 * batches:
        ...     _ = model(batch)
        >>> _ = model[1].weight.data.mul_(3)
        >>> for layer in explain_gap(model, batches).layers:
        ...     print(layer.name, layer.cause)
        2 stale average
        0 sampling noise
    """
    layers = layers_with_a_gap(model)
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    with unchanged(model, []), evaluating(model), without_compiled_graphs():
        items = list(islice(loader, max_batches))
        if not items:
            raise ValueError("the loader yielded nothing")
        runner = Runner(inner, layers, items, call)
        by_running = runner.outputs_and_batches(())
        by_batch = runner.outputs_and_batches(layers)
        gap = distance(by_running.outputs, by_batch.outputs, by_batch.outputs)
        ranked = [
            layer_gap(name, runner, by_running, by_batch)
            for name in (layers if not gap < worth else ())
            if name in by_batch.batches and name in by_running.batches
        ]
    if not any(one.cause in AT_FAULT for one in ranked):
        ranked = [noise_adds_up(one) if one.cause == "inherited" else one for one in ranked]
    ranked.sort(key=lambda one: (one.gap_left, -one.change))
    samples = int(next(iter(by_batch.batches.values())).samples.sum()) if by_batch.batches else 0
    return Gap(gap, disagreement(by_running.outputs, by_batch.outputs), tuple(ranked), len(items), samples)


def layers_with_a_gap(model: nn.Module) -> dict[str, Any]:
    """Layers that normalize by other statistics in evaluation than in training."""
    found = {name: module for name, module in model.named_modules() if has_a_gap(module)}
    if any(nn.parameter.is_lazy(tensor) for tensor in [*model.parameters(), *model.buffers()]):
        raise ValueError("the model has uninitialized parameters: run it once first")
    if not found:
        raise ValueError("the model has no batch normalization layer that evaluates by running statistics")
    return found


def has_a_gap(module: Any) -> bool:
    buffers = module._buffers
    spread = buffers.get("running_var") if isinstance(module, nn.modules.batchnorm._BatchNorm) else None
    if spread is None:
        # a whitening layer, which this package's insight knows by what it has
        spread = buffers.get("running_cov")
    told = getattr(module, "frozen_statistics", False) or "normalizes_by" in vars(module)
    return spread is not None and buffers.get("running_mean") is not None and not told


class Pass(NamedTuple):
    """One pass over the items."""

    outputs: list[list[Tensor]]
    batches: dict[str, Batches]
    first: str | None


class Runner:
    """Runs the items through the model, with some layers normalizing by their batches."""

    def __init__(self, model: nn.Module, layers: dict[str, Any], items: list[Any], call: Call) -> None:
        self.model, self.layers, self.items, self.call = model, layers, items, call

    def outputs(self, chosen: Iterable[str]) -> list[list[Tensor]]:
        """Of each item; random numbers, if the model draws any, are the same in every pass."""
        same_random_numbers(self.model)
        with ExitStack() as stack:
            for name in chosen:
                stack.enter_context(normalizing_by_batch(self.layers[name]))
            # a copy, since a module may give the same memory in the next call
            return [[t.clone() for t in floats_in(self.call(self.model, item))] for item in self.items]

    def outputs_and_batches(self, chosen: Iterable[str]) -> Pass:
        """Also what each layer saw, and the first layer if no weights precede it."""
        rows: dict[str, list[Any]] = {}
        order: list[str | None] = []

        def before(name: str) -> Callable[..., None]:
            def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                order.append(name)
                row = moments_of(args[0] if args else kwargs["input"])
                rows.setdefault(name, []).extend([row] if row else [])

            return hook

        owners = [m for m in self.model.modules() if m._parameters and not any(m is x for x in self.layers.values())]
        handles = [x.register_forward_pre_hook(before(name), with_kwargs=True) for name, x in self.layers.items()]
        handles += [module.register_forward_pre_hook(lambda *_: order.append(None)) for module in owners]
        try:
            outputs = self.outputs(chosen)
        finally:
            for handle in handles:
                handle.remove()
        batches = {name: stacked(row) for name, row in rows.items() if row}
        return Pass(outputs, batches, order[0] if order else None)


def same_random_numbers(model: nn.Module) -> None:
    """On the devices whose generators :func:`unchanged` restores; torch.manual_seed would reach all."""
    torch.default_generator.manual_seed(0)
    for device in {tensor.device for tensor in [*model.parameters(), *model.buffers()] if tensor.is_cuda}:
        with torch.cuda.device(device):
            torch.cuda.manual_seed(0)


def noise_adds_up(one: LayerGap) -> LayerGap:
    """What is inherited from layers of which none is at fault."""
    cause = "few values" if one.count < FEW_VALUES else "sampling noise"
    reason = "its own statistics fit, and so do those before it, but their noise adds up"
    return one._replace(cause=cause, reason=reason, remedy=REMEDIES[cause])


def moments_of(input: Tensor) -> tuple[int, int, Tensor, Tensor] | None:
    """Samples, values per channel, mean and biased variance; None of an empty batch."""
    if not input.numel():
        return None
    wide = input.detach().double()
    mean = batch_mean(wide)
    return len(input), values_per_channel(input), mean, batch_var(wide, mean)


def layer_gap(name: str, runner: Runner, by_running: Pass, by_batch: Pass) -> LayerGap:
    swapped = runner.outputs([name])
    evidence = evidence_of(
        runner.layers[name],
        by_batch.batches[name],
        by_running.batches[name],
        sees_data=by_batch.first == name,
    )
    cause: Cause = cause_of(evidence)
    return LayerGap(
        name,
        distance(swapped, by_running.outputs, by_batch.outputs),
        distance(swapped, by_batch.outputs, by_batch.outputs),
        cause.name,
        cause.reason,
        REMEDIES[cause.name],
        cause.mean_off,
        cause.var_off,
        cause.noise,
        int(evidence.by_batch.counts.min()),
    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Only the flags, which :func:`unchanged` restores."""
    for module in model.modules():
        module.training = False
    yield


@contextmanager
def normalizing_by_batch(layer: Any) -> Iterator[None]:
    """A layer normalizes by its batches and tracks nothing."""
    track, buffers = layer.track_running_stats, dict(layer._buffers)
    try:
        # without buffers it normalizes by the batch of its own process
        if isinstance(layer, nn.SyncBatchNorm):
            layer._buffers.update(dict.fromkeys(buffers))
        else:
            layer.training, layer.track_running_stats = True, False
        yield
    finally:
        layer.training, layer.track_running_stats = False, track
        layer._buffers.update(buffers)


def without_compiled_graphs() -> Any:
    """Compiled graphs run as the Python that they were made of."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
