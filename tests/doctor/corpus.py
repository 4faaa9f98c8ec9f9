"""Checkpoints of torch with faults that are known, and healthy ones: what rules about values are measured on.

``FAULTS``, ``HEALTHY`` and ``FALSE_POSITIVES`` map a name to a :class:`Case`; ``write`` puts what it makes into a file
as users would. Faults are made the way they arise, where that takes no more than a few lines: by training with an
infinite input, under activation checkpointing, by ``half()``.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from doctor.cases import Case, fault, healthy
from doctor.networks import MOBILENETS, MODELS, STEPS, Network, of_a_library, seeded, train, trained

State = dict[str, Any]


def edited(**changes: Callable[[Tensor], Tensor]) -> Callable[[], State]:
    """A trained state in which the tensors of some names, such as ``bn1__weight``, are changed."""

    def make() -> State:
        state = copy.copy(trained().state_dict())
        for name, change in changes.items():
            key = name.replace("__", ".")
            state[key] = change(state[key].clone())
        return state

    return make


def without(*endings: str, metadata: bool = False) -> Callable[[], State]:
    """A trained state without some tensors; plain dicts, as conversions make them, have no metadata."""

    def make() -> State:
        state = trained().state_dict()
        for key in [key for key in state if key.endswith(endings)]:
            del state[key]
        return state if metadata else dict(state)

    return make


def filled(value: float, *channels: int) -> Callable[[Tensor], Tensor]:
    """Some channels, or all of them, become a value."""

    def change(tensor: Tensor) -> Tensor:
        tensor[list(channels) or ...] = value
        return tensor

    return change


def loaded_leniently() -> State:
    """What was lost is lost for good once it was loaded with strict=False and saved again."""
    model = seeded(Network)
    model.load_state_dict(dict(trained().named_parameters()), strict=False)
    return model.state_dict()


def trained_in_evaluation_mode() -> State:
    model = seeded(Network)
    return train(model.eval()).state_dict()


def with_momentum_zero() -> State:
    return trained(lambda model: setattr(model.bn1, "momentum", 0.0)).state_dict()


def never_reached() -> State:
    model = trained()
    model.add_module("auxiliary", nn.BatchNorm2d(4))
    return model.state_dict()


def after_an_infinite_input() -> State:
    model = trained()
    with torch.no_grad():
        model(torch.full((2, 3, 6, 6), torch.inf))
    return model.state_dict()


def zero_initialized() -> State:
    def prepare(model: Network) -> None:
        for block in (model.block1, model.block2):
            nn.init.zeros_(block.bn2.weight).requires_grad_(False)

    return trained(prepare).state_dict()


def frozen_for_a_while() -> State:
    model = trained()
    model.bn1.eval()
    return train(model, 5).state_dict()


def called(times: int) -> Callable[[], State]:
    return lambda: trained(lambda model: setattr(model.block2, "calls", times)).state_dict()


def recomputed() -> State:
    return trained(lambda model: setattr(model.block2, "recomputed", True)).state_dict()


def averaged_counters() -> State:
    first, second = trained().state_dict(), train(trained(), 1).state_dict()
    return {key: (first[key] + second[key]) / 2 for key in first}


def half_of(*endings: str) -> Callable[[], State]:
    def make() -> State:
        state = trained().state_dict()
        return {key: value.half() if key.endswith(endings) else value for key, value in state.items()}

    return make


def with_large_inputs() -> State:
    """Variances that float16 has no number for."""
    model = trained()
    model.conv1.weight.data *= 1000
    with torch.no_grad():
        for _ in range(STEPS):
            model(torch.randn(16, 3, 6, 6))
    return model.half().state_dict()


def with_keras_momentum(value: float) -> Callable[[], nn.Module]:
    return lambda: trained(layer=lambda channels: nn.BatchNorm2d(channels, momentum=value))


def with_keras_statistics() -> nn.Module:
    """As after a conversion: eps of Keras, and statistics that no batch was counted for."""
    model = trained(layer=lambda channels: nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01))
    for name, buffer in model.named_buffers():
        if name.endswith("num_batches_tracked"):
            buffer.zero_()
    return model


def with_keras_names() -> State:
    names = {"running_mean": "moving_mean", "running_var": "moving_variance"}
    state = {key: value for key, value in trained().state_dict().items() if "bn" not in key}
    return state | {f"bn1.{name}": trained().state_dict()[f"bn1.{role}"] for role, name in names.items()}


FAULTS: dict[str, Case] = {
    "parameters alone": fault(lambda: dict(trained().named_parameters()), "BN100"),
    "statistics of one layer lost": fault(without("block1.bn2.running_mean", "block1.bn2.running_var"), "BN100"),
    "variances lost": fault(without("running_var"), "BN100"),
    "means lost": fault(without("running_mean"), "BN100"),
    "moving average of the parameters": fault(
        lambda: {"model": trained().state_dict(), "ema": dict(trained().named_parameters())}, "BN100"
    ),
    "loaded leniently and saved again": fault(loaded_leniently, "BN101"),
    "trained in evaluation mode": fault(trained_in_evaluation_mode, "BN101"),
    "momentum 0": fault(with_momentum_zero, "BN101"),
    "one layer reset": fault(
        edited(
            block1__bn1__running_mean=filled(0.0),
            block1__bn1__running_var=filled(1.0),
            block1__bn1__num_batches_tracked=torch.zeros_like,
        ),
        "BN101",
    ),
    "never reached": fault(never_reached, "BN101"),
    "an infinite input": fault(after_an_infinite_input, "BN102"),
    "a negative variance": fault(edited(bn1__running_var=filled(-0.5, 3)), "BN102"),
    "a variance below 0 by less than eps": fault(edited(bn1__running_var=filled(-1e-6, 3)), "BN102"),
    "NaN in a mean": fault(edited(block2__bn2__running_mean=filled(torch.nan, 0, 7)), "BN102"),
    "infinite variances": fault(edited(block2__bn1__running_var=filled(torch.inf)), "BN102"),
    "a constant input": fault(edited(bn1__running_var=filled(0.0, 2)), "BN103"),
    "weights that decayed before a layer": fault(edited(block1__bn1__running_var=filled(1e-9)), "BN103"),
    "a huge weight": fault(edited(block1__bn2__weight=filled(4000.0, 1)), "BN103"),
    "pruned channels": fault(edited(block1__bn1__weight=filled(0.0, 0, 5)), "BN104"),
    "weights that decayed": fault(edited(bn1__weight=filled(1e-38, 1)), "BN104"),
    "zero initialization that never trained": fault(zero_initialized, "BN104"),
    "no counters": fault(without("num_batches_tracked"), "BN105"),
    "no counters, against the metadata": fault(without("num_batches_tracked", metadata=True), "BN105"),
    "counters of 0": fault(
        lambda: {k: v * (not k.endswith("tracked")) for k, v in trained().state_dict().items()}, "BN105"
    ),
    "frozen for a while": fault(frozen_for_a_while, "BN105"),
    "averaged counters": fault(averaged_counters, "BN105"),
    "a negative counter": fault(edited(bn1__num_batches_tracked=filled(-1)), "BN105"),
    "a block that is called three times": fault(called(3), "BN105"),
    "a block that is called twice": fault(called(2), "BN106"),
    "activation checkpointing": fault(recomputed, "BN106"),
    "an auxiliary network that is called twice": fault(
        lambda: (
            {f"g.{k}": v for k, v in trained().state_dict().items()}
            | {f"d.{k}": v for k, v in train(trained(), STEPS).state_dict().items()}
        ),
        "BN106",
    ),
    "float16": fault(lambda: trained().half().state_dict(), "BN107"),
    "bfloat16": fault(lambda: trained().bfloat16().state_dict(), "BN107"),
    "variances in float16": fault(half_of("running_var"), "BN107"),
    "variances beyond float16": fault(with_large_inputs, "BN102", "BN107"),
    "Keras' momentum": fault(with_keras_momentum(0.99), "BN001", "BN109"),
    "TensorFlow's momentum": fault(with_keras_momentum(0.9), "BN001", "BN109"),
    "Keras' eps and statistics": fault(with_keras_statistics, "BN001", "BN105", "BN109"),
    "Keras' names": fault(with_keras_names, "BN109"),
}


def state_of_a_library(make: Callable[[], nn.Module]) -> Callable[[], State]:
    return lambda: of_a_library(make).state_dict()


def other_normalization(layer: Callable[[int], nn.Module]) -> Callable[[], State]:
    return lambda: trained(layer=layer).state_dict()


def with_moving_average() -> State:
    """Of a model and its average, whose counters differ."""
    return {"model": trained().state_dict(), "ema": train(trained(), 1).state_dict(), "epoch": 3}


HEALTHY: dict[str, Case] = {
    "trained": healthy(lambda: trained().state_dict()),
    "untrained": healthy(lambda: seeded(Network).state_dict(), "BN101"),
    "untrained, random weights": healthy(
        lambda: {
            key: torch.randn(value.shape) * 0.02 + 1 if "bn" in key and key.endswith("weight") else value
            for key, value in seeded(Network).state_dict().items()
        },
        "BN101",
    ),
    "no affine": healthy(lambda: trained(layer=lambda c: nn.BatchNorm2d(c, affine=False)).state_dict()),
    "no bias": healthy(lambda: trained(layer=lambda c: nn.BatchNorm2d(c, bias=False)).state_dict()),
    "cumulative averages": healthy(lambda: trained(layer=lambda c: nn.BatchNorm2d(c, momentum=None)).state_dict()),
    "model and moving average": healthy(with_moving_average),
    "instance normalization": healthy(other_normalization(nn.InstanceNorm2d)),
    "group normalization": healthy(other_normalization(lambda c: nn.GroupNorm(2, c).requires_grad_(True))),
    "no normalization": healthy(lambda: nn.Linear(3, 2).state_dict()),
    "nothing": healthy(dict),
    **{make.__name__: healthy(state_of_a_library(make)) for make in MODELS},
    # their variances are small, since their initial weights are, and a state dict does not tell their eps of 1e-3
    **{make.__name__: healthy(state_of_a_library(make), "BN103") for make in MOBILENETS},
}


def with_absorbed_statistics() -> State:
    """Frozen layers as affine maps: what detectron2 makes of models of Caffe2."""
    state = {}
    for key, value in trained().state_dict().items():
        if key.endswith("running_mean"):
            state[key] = torch.zeros_like(value)
        elif key.endswith("running_var"):
            state[key] = torch.ones_like(value)
        elif not key.endswith("num_batches_tracked"):
            state[key] = value
    return state


# healthy, and yet found: no file tells them from faulty ones
FALSE_POSITIVES: dict[str, Case] = {
    "built without statistics": fault(
        lambda: trained(layer=lambda c: nn.BatchNorm2d(c, track_running_stats=False)).state_dict(), "BN100"
    ),
    "frozen layers that absorbed their statistics": fault(with_absorbed_statistics, "BN101", "BN105"),
    "half precision for inference": fault(lambda: trained().half().state_dict(), "BN107"),
}


def write(case: Case, folder: Path) -> Path:
    """As a file of torch."""
    path = folder / "checkpoint.pth"
    torch.save(case.make(), path)
    return path
