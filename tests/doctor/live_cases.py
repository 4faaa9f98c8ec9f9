"""How models are made for the live corpus, with what ``examine`` is given beside them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import batchnorm
from doctor.live_networks import Around
from doctor.networks import Network, as_it_is, examples, monai_unet_3d, of_a_library, seeded, train
from doctor.networks import trained as trained_by_steps
from every_layer import KINDS
from examined import batches, trained


class Live(NamedTuple):
    """What ``examine`` is given."""

    model: Any
    loader: list[Any] | None = None
    optimizer: torch.optim.Optimizer | None = None


def changed(change: Callable[[Any], object], norm: Any = nn, data: Callable[[], list[Any]] = batches) -> Any:
    """A model whose statistics fit, after a change."""

    def make() -> Live:
        model = trained(norm)
        with torch.no_grad():
            change(model)
        return Live(model, data())

    return make


def alone(make: Callable[[], nn.Module]) -> Callable[[], Live]:
    """Without data."""
    return lambda: Live(make())


def on(make: Callable[[], nn.Module], *shape: int, mean: float = 0.0, std: float = 1.0) -> Callable[[], Live]:
    """With data of normal distribution, and statistics that fit them."""

    def build() -> Live:
        data = [torch.randn(shape) * std + mean for _ in range(4)]
        model = make().eval()
        batchnorm.recalibrate(model, data)
        return Live(model, data)

    return build


def scaled(index: int, factor: float) -> Callable[[Any], object]:
    return lambda model: model[index].weight.mul_(factor)


def after_slow_averages() -> Live:
    model = seeded(lambda: Network(lambda channels: nn.BatchNorm2d(channels, momentum=0.01)))
    return Live(train(model).eval(), [x for x, _ in examples(4, 32, 6)])


def with_one_stale_channel(model: Any) -> None:
    model[9].running_var[0] *= 100


def with_momentum(momentum: float | None, norm: Any = nn) -> Callable[[], Live]:
    def make() -> Live:
        model = trained(norm)
        for index in (1, 4, 9):
            model[index].momentum = momentum
        return Live(model, batches())

    return make


def compiled() -> Live:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3, momentum=None))
    model.compile(backend="eager")
    return Live(model)


def without_tracking(norm: Any, data: Callable[[], list[Any]] | None) -> Callable[[], Live]:
    def make() -> Live:
        model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), norm.BatchNorm2d(4, track_running_stats=False)).eval()
        return Live(model, data and data())

    return make


def dropping(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), *layers)


def with_modes(training: bool, others: list[int]) -> Callable[[], Live]:
    """A model in one mode, some of whose layers are in the other."""

    def make() -> Live:
        model = trained().train(training)
        for index in others:
            model[index].train(not training)
        return Live(model)

    return make


def with_frozen_parameters(end: int | None, norm: Any = nn) -> Callable[[], Live]:
    def make() -> Live:
        model = trained(norm).train()
        model[:end].requires_grad_(False)
        return Live(model)

    return make


def optimized(make: Callable[[Any], torch.optim.Optimizer]) -> Callable[[], Live]:
    def build() -> Live:
        model = trained()
        return Live(model, None, make(model))

    return build


def grouped(model: nn.Module) -> torch.optim.Optimizer:
    """Weights of more than one dimension decay, the others do not."""
    wide, narrow = ([p for p in model.parameters() if (p.dim() > 1) is one] for one in (True, False))
    return torch.optim.AdamW([{"params": wide, "weight_decay": 0.1}, {"params": narrow, "weight_decay": 0.0}])


def average(*, reset: bool) -> AveragedModel:
    model = trained()
    result = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    result.update_parameters(model)
    if reset:
        batchnorm.reset_running_stats(result)
    return result.eval()


def exported(prepare: Callable[[Any], object]) -> Any:
    model = trained()
    prepare(model)
    return torch.export.export(model, (batches(1)[0],))


def normalizing_by_a_function() -> Live:
    def forward(x: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(x, None, None, training=True)

    return Live(torch.fx.GraphModule(nn.Module(), torch.fx.Tracer().trace(forward)))


def with_tiny_variance(model: Any) -> None:
    model[1].running_var[0] = 1e-12
    model[1].eps = 1e-13


def with_wide_channel(index: int, weight: float) -> Callable[[Any], object]:
    def change(model: Any) -> None:
        model[index].weight[3] = weight
        batchnorm.recalibrate(model, batches())

    return change


def small_batches() -> list[Any]:
    return [x[:4] for x in batches()]


def images() -> list[Any]:
    return [x for x, _ in examples(2, 24, 32)]


def prepared(make: Callable[[], nn.Module], convert: bool = False) -> Callable[[], Live]:
    """A network of another library, trained for a few steps and recalibrated."""

    def build() -> Live:
        model = of_a_library(make, steps=4)
        if convert:
            batchnorm.convert(model)
        batchnorm.recalibrate(model.eval(), data := images())
        return Live(model, data, grouped(model))

    return build


def volumes() -> Live:
    model = of_a_library(monai_unet_3d, steps=0).eval()
    batchnorm.recalibrate(model, data := [torch.randn(24, 1, 8, 8, 8) for _ in range(2)])
    return Live(model, data, grouped(model))


def residual(layer: Callable[..., nn.Module] = nn.BatchNorm2d, prepare: Callable[[Any], object] = as_it_is) -> Any:
    """The residual network of the corpus of checkpoints, after training and with statistics of its data."""

    def build() -> Live:
        model = trained_by_steps(layer=layer)
        prepare(model)
        batchnorm.recalibrate(model.eval(), data := [x for x, _ in examples(4, 32, 6)])
        return Live(model, data, grouped(model))

    return build


def around(name: str) -> Callable[[], Live]:
    """A convolution, a layer of this kind, and an activation."""

    def build() -> Live:
        model = Around(KINDS[name])
        data = [torch.randn(64, 3, *KINDS[name].positions) * 2 + 1 for _ in range(4)]
        for x in data:
            model(x)
        batchnorm.recalibrate(model.eval(), data)
        return Live(model, data, grouped(model))

    return build


def fine_tuned() -> Live:
    """A backbone that is frozen as it should be."""
    model = trained().train()
    model[:5].requires_grad_(False)
    batchnorm.freeze(model, ["1", "4"])
    return Live(model, batches(), grouped(model))


def plain(norm: Any, *, training: bool = False) -> Callable[[], Live]:
    def build() -> Live:
        model = trained(norm).train(training)
        return Live(model, batches(), grouped(model))

    return build
