"""What running statistics cost on ResNet-18: recalibration, deferred updates, and what folding them saves."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from batchnorm.benchmarks.correctness import another_function
from batchnorm.benchmarks.peers import OURS, TORCH, WITHOUT, PeerUnavailableError
from batchnorm.benchmarks.run import Record, as_microseconds
from batchnorm.benchmarks.steps import SIZE, resnet18, training_step
from batchnorm.benchmarks.timing import time_in_turn, watch_others
from batchnorm.statistics import deferred_stats, recalibrate
from batchnorm.surgery import convert, fold

SUITE = "statistics"
RECALIBRATION, DEFERRAL, FOLDING = "recalibrate", "deferred_stats", "fold"
BATCHES, BATCH = 2, 8

Calls = dict[str, Callable[[], Any]]


def measure_statistics(case: str, seconds: float, batch: int = BATCH, size: int = SIZE) -> list[Record]:
    """Records of one case of :data:`CASES`, whoever is compared in turn, ours last."""
    torch.manual_seed(0)
    try:
        plain = resnet18()
    except PeerUnavailableError as error:
        return [{"kind": "skipped", "suite": SUITE, "case": case, "peer": OURS, "reason": str(error)}]
    batches = [torch.randn(batch, 3, size, size) for _ in range(BATCHES)]
    what, _, layers = case.partition(" of ")
    model = convert(plain, batches[0][:2])[0] if layers == "ours" else plain
    calls, wrong = PREPARE[what](model, batches)
    record: Record = {"suite": SUITE, "case": case}
    if wrong is not None:
        return [{"kind": "failed", "peer": OURS, "reason": wrong, **record}]
    others = watch_others()
    times = time_in_turn(calls, seconds)
    record.update(kind="cost", batch=batch, size=size, threads=torch.get_num_threads(), others_cores=others())
    return [{**record, "peer": peer, **as_microseconds(times[peer])} for peer in calls]


def recalibration(model: nn.Module, batches: list[Tensor]) -> tuple[Calls, str | None]:
    """Against the forward pass of the same batches in evaluation mode."""
    model.eval()

    @torch.no_grad()
    def evaluate() -> None:
        for images in batches:
            model(images)

    return {WITHOUT: evaluate, OURS: lambda: recalibrate(model, batches)}, None


def deferral(model: nn.Module, batches: list[Tensor]) -> tuple[Calls, str | None]:
    """Against the same training step without a transaction."""
    labels = torch.randint(0, 1000, (len(batches[0]),))
    step = training_step(model, batches[0], labels)

    def deferred() -> None:
        with deferred_stats(model):
            step()

    return {WITHOUT: step, OURS: deferred}, None


@torch.no_grad()
def folding(model: nn.Module, batches: list[Tensor]) -> tuple[Calls, str | None]:
    """Against torch's own function for a convolution and a BN, and against the network as it is."""
    recalibrate(model, batches)
    model.eval()
    images = batches[0]
    folded, _ = fold(model, images[:2])
    networks = {WITHOUT: model, TORCH: fused_by_torch(model), OURS: folded}
    exact = copy.deepcopy(model).double()(images[:2].double())
    wrong = another_function(["scores"], [folded(images[:2])], [exact])
    return {name: without_gradients(network, images) for name, network in networks.items()}, wrong


def fused_by_torch(model: nn.Module) -> nn.Module:
    """A copy in which ``fuse_conv_bn_eval`` made one of each convolution and the BN behind it."""
    fused = copy.deepcopy(model)
    for block in fused.modules():
        if isinstance(getattr(block, "normalization", None), nn.BatchNorm2d):
            block.convolution = fuse_conv_bn_eval(block.convolution, block.normalization)  # pyright: ignore[reportArgumentType]
            block.normalization = nn.Identity()
    return fused


def without_gradients(model: nn.Module, images: Tensor) -> Callable[[], Tensor]:
    return torch.no_grad()(lambda: model(images))


PREPARE: dict[str, Callable[[nn.Module, list[Tensor]], tuple[Calls, str | None]]] = {
    RECALIBRATION: recalibration,
    DEFERRAL: deferral,
    FOLDING: folding,
}
CASES = [
    *(f"{what} of {layers}" for what in (RECALIBRATION, DEFERRAL) for layers in (TORCH, OURS)),
    f"{FOLDING} of {TORCH}",
]
