"""Whole training steps of networks, as they are and after ``batchnorm.convert``."""

import copy
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchnorm.benchmarks.cases import MEMORY_FORMATS
from batchnorm.benchmarks.correctness import another_function
from batchnorm.benchmarks.peers import PeerUnavailableError
from batchnorm.benchmarks.run import Record, as_microseconds
from batchnorm.benchmarks.timing import time_in_turn, watch_others
from batchnorm.experiments.models.inception import Inception
from batchnorm.surgery import convert

BATCH, SIZE, CLASSES = 16, 224, 1000
LEARNING_RATE, MOMENTUM = 0.01, 0.9
# Enough to see a wrong layer
CHECKED_BATCH, CHECKED_SIZE = 4, 64
PLAIN, CONVERTED = "torch", "ours"


class Scores(nn.Module):
    """A model of transformers that takes a tensor of images and returns a tensor of scores."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(pixel_values=images).logits


def from_transformers(name: str, **options: Any) -> nn.Module:
    """A model with random weights; nothing is downloaded."""
    if importlib.util.find_spec("transformers") is None:
        raise PeerUnavailableError("transformers is not installed: pip install 'batchnorm[bench]'")
    import transformers

    config = getattr(transformers, f"{name}Config")(num_labels=CLASSES, **options)
    return Scores(getattr(transformers, f"{name}ForImageClassification")(config))


def resnet18() -> nn.Module:
    sizes = [64, 128, 256, 512]
    return from_transformers("ResNet", layer_type="basic", depths=[2, 2, 2, 2], embedding_size=64, hidden_sizes=sizes)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "ResNet-18": resnet18,
    # Dropout would draw other values in the network that is compared
    "MobileNetV2": lambda: from_transformers("MobileNetV2", classifier_dropout_prob=0.0),
    "BN-Inception": lambda: Inception(CLASSES, fused=False),
}


def measure_steps(name: str, memory_format: str, seconds: float, batch: int = BATCH, size: int = SIZE) -> list[Record]:
    """Records of one network in one layout, unconverted and converted in turn, ours last."""
    torch.manual_seed(0)
    record: Record = {
        "suite": "steps",
        "case": f"{name} {memory_format}",
        "model": name,
        "memory_format": memory_format,
    }
    try:
        plain = MODELS[name]().to(memory_format=MEMORY_FORMATS[memory_format])  # pyright: ignore[reportCallIssue]
    except PeerUnavailableError as error:
        return [{"kind": "skipped", "peer": CONVERTED, "reason": str(error), **record}]
    converted, changes = convert(copy.deepcopy(plain), torch.randn(2, 3, size, size))
    wrong = different_scores(plain, converted)
    if wrong is not None:
        return [{"kind": "failed", "peer": CONVERTED, "reason": wrong, **record}]
    images = torch.randn(batch, 3, size, size).contiguous(memory_format=MEMORY_FORMATS[memory_format])
    labels = torch.randint(0, CLASSES, (batch,))
    steps = {PLAIN: training_step(plain, images, labels), CONVERTED: training_step(converted, images, labels)}
    others = watch_others()
    times = time_in_turn(steps, seconds)
    record.update(
        kind="step",
        batch=batch,
        size=size,
        threads=torch.get_num_threads(),
        changes=len(changes),
        others_cores=others(),
    )
    return [{**record, "peer": peer, **as_microseconds(times[peer])} for peer in (PLAIN, CONVERTED)]


def training_step(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], None]:
    """Forward, cross-entropy, backward, SGD with momentum."""
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, MOMENTUM)
    model.train()

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return step


def different_scores(plain: nn.Module, converted: nn.Module) -> str | None:
    """Compare scores in training mode with the unconverted network in float64; neither network is changed.

    Rounding grows with every layer, so a third of the digits must agree; the layers by themselves are held to more.
    """
    images = torch.randn(CHECKED_BATCH, 3, CHECKED_SIZE, CHECKED_SIZE)
    with torch.no_grad():
        exact = copy.deepcopy(plain).double().train()(images.double())
        actual = copy.deepcopy(converted).train()(images)
    return another_function(["scores"], [actual], [exact])
