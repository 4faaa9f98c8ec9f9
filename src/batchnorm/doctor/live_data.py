"""What rules measure on data: the first batches of the loader, run once in each way for all rules that read it."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchnorm import functional
from batchnorm.doctor.rule import Subject
from batchnorm.insight import Gap, explain_gap
from batchnorm.insight.saved import unchanged
from batchnorm.nn.batchnorm import FusedBatchNorm
from batchnorm.nn.whitening import Whitening
from batchnorm.reference import batch_norm_train, values_per_channel
from batchnorm.statistics.layers import LAYERS, has_running_statistics
from batchnorm.statistics.measuring import evaluating
from batchnorm.statistics.moments import Moments
from batchnorm.statistics.ranks import gather, is_distributed
from batchnorm.statistics.recalibrate import call_with_input, measure, samples_of
from batchnorm.statistics.recording import is_frozen, without_compiled_graphs
from batchnorm.surgery.tracing import restore_chance, state_of_chance

# mean of a channel within 0.05 standard deviations of the population's; an item is taken whole
SAMPLES = 512
# mean / standard deviation from which the digits that are lost are measured
OFF_CENTRE = 1e3
# batches that tell how outputs differ: two passes over them, and one for each layer if the gap is worth it
GAP_BATCHES = 4


@dataclass
class Use:
    """What one layer was given in evaluation.

    Attributes:
        calls: by item, how often it was called.
        by_call: moments of its first input in a forward, its second, and so on.
        off_centre: the largest |mean| / sqrt(var + eps) of a channel.
        loss: of that channel: the largest error of the layer's kernel, in standard deviations; None below the limit.
    """

    calls: list[int] = field(default_factory=list)
    by_call: list[Moments] = field(default_factory=list)
    off_centre: float = 0.0
    loss: float | None = None


@dataclass
class Sample:
    """The first items of the loader, what each layer was given, and the items that training could normalize."""

    items: list[Any]
    samples: int
    uses: dict[str, Use]
    usable: list[Any]


def norms(model: nn.Module) -> dict[str, Any]:
    """BN and whitening layers by name, each once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LAYERS)}


def follows_its_mode(layer: Any) -> bool:
    """Neither frozen nor told what to normalize by, with running statistics: modes make a difference to it."""
    return has_running_statistics(layer) and not is_frozen(layer) and "normalizes_by" not in vars(layer)


def unwrapped(model: nn.Module) -> nn.Module:
    """Without the wrapper whose forward talks to other processes."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation, after which modes, buffers, gradients and random numbers are as before."""
    chance = state_of_chance()
    try:
        with unchanged(model, []), evaluating(model), without_compiled_graphs(), torch.no_grad():
            yield
    finally:
        restore_chance(chance)


def call_of(subject: Subject) -> Callable[[nn.Module, Any], Any]:
    return call_with_input if subject.call is None else subject.call


def sample_of(subject: Subject) -> Sample:
    """Taken once; every rule reads the same.

    Raises:
        ValueError: the loader yields nothing.
    """
    if "sample" not in subject.kept:
        assert subject.model is not None
        with undisturbed(subject.model), order_kept(subject.loader):
            items, samples = first_items(subject)
            subject.kept["sample"] = watched(subject, items, samples)
    return subject.kept["sample"]


@contextmanager
def order_kept(loader: Any) -> Iterator[None]:
    """A DataLoader that shuffles by a generator of its own gives the next epoch the order it would have had."""
    generator = getattr(loader, "generator", None)
    state = generator.get_state() if isinstance(generator, torch.Generator) else None
    try:
        yield
    finally:
        if generator is not None and state is not None:
            generator.set_state(state)


def first_items(subject: Subject) -> tuple[list[Any], int]:
    items, samples = [], 0
    assert subject.loader is not None
    for item in subject.loader:
        items.append(item)
        samples += samples_of(item)
        if samples >= SAMPLES:
            break
    if not items:
        raise ValueError("the loader yielded nothing: give at least one batch")
    return items, samples


def watched(subject: Subject, items: list[Any], samples: int) -> Sample:
    """Run the items in evaluation and note what each layer is given."""
    assert subject.model is not None
    layers = norms(subject.model)
    uses = {name: Use() for name in layers}
    numbers = dict.fromkeys(layers, 0)
    fewest: list[int] = []

    def before(name: str) -> Callable[..., None]:
        def hook(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            input = args[0] if args else kwargs["input"]
            note(uses[name], numbers[name], layer, input)
            numbers[name] += 1
            fewest[-1] = min(fewest[-1], values_per_channel(input))

        return hook

    handles = [layer.register_forward_pre_hook(before(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        for item in items:
            numbers |= dict.fromkeys(layers, 0)
            fewest.append(2)
            call_of(subject)(unwrapped(subject.model), item)
            for name, use in uses.items():
                use.calls.append(numbers[name])
    finally:
        for handle in handles:
            handle.remove()
    return Sample(items, samples, uses, [item for item, few in zip(items, fewest, strict=True) if few > 1])


def note(use: Use, number: int, layer: Any, input: Tensor) -> None:
    if number == len(use.by_call):
        use.by_call.append(Moments())
    batch = Moments()
    batch.add(input)
    use.by_call[number].join(batch)
    if not batch.count or isinstance(layer, Whitening):
        return
    mean, var = batch.mean, batch.squares / batch.count
    ratio = (mean.abs() / (var + layer.eps).sqrt()).nan_to_num(0.0, 0.0)
    worst = int(ratio.argmax()) if len(ratio) else 0
    if len(ratio) and ratio[worst] > use.off_centre:
        use.off_centre = ratio[worst].item()
        if use.off_centre > OFF_CENTRE and values_per_channel(input) > 1:
            use.loss = loss_of_digits(layer, input, worst)


def loss_of_digits(layer: Any, input: Tensor, channel: int) -> float:
    """The largest difference between what the layer's kernel makes of a channel and float64, in standard deviations."""
    exact = batch_norm_train(input[:, channel : channel + 1].double(), None, None, eps=layer.eps).output
    if isinstance(layer, FusedBatchNorm):
        output = functional.batch_norm_train(input, None, None, eps=layer.eps).output
    else:
        output = F.batch_norm(input, None, None, training=True, eps=layer.eps)
    return (output[:, channel : channel + 1].double() - exact).abs().max().item()


def moments_of(subject: Subject) -> dict[str, Moments]:
    """As recalibrate would measure them, of the layers that are not frozen; under torch.distributed of all processes.

    Empty if no batch has two values per channel in every layer.
    """
    if "moments" not in subject.kept:
        assert subject.model is not None
        items = sample_of(subject).usable
        free = any(follows_its_mode(layer) for layer in norms(subject.model).values())
        found = {}
        if free and on_any_process(subject.model, bool(items)):
            with undisturbed(subject.model):
                found = measure(subject.model, items, call=call_of(subject))
        subject.kept["moments"] = found
    return subject.kept["moments"]


def on_any_process(model: nn.Module, here: bool) -> bool:
    if not is_distributed():
        return here
    return bool(gather(torch.tensor([here], dtype=torch.uint8, device=device_of(model))).any())


def device_of(model: nn.Module) -> torch.device:
    """Where messages to other processes are made."""
    return next(itertools.chain(model.parameters(), model.buffers()), torch.empty(0)).device


def gap_of(subject: Subject, worth: float) -> Gap | None:
    """Of this process; None if no layer does anything else in training, or no batch can be normalized."""
    assert subject.model is not None
    items = sample_of(subject).usable[:GAP_BATCHES]
    if not items or not any(follows_its_mode(layer) for layer in norms(subject.model).values()):
        return None
    with undisturbed(subject.model):
        return explain_gap(subject.model, items, call=call_of(subject), max_batches=GAP_BATCHES, worth=worth)
