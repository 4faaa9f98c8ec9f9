"""A network on MNIST, for the training loop: what the studies train."""

import functools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchnorm.experiments.data.mnist import CLASSES, PIXELS, Mnist, load_mnist
from batchnorm.experiments.data.shuffling import Order
from batchnorm.experiments.study import Outcome, Place
from batchnorm.experiments.training import read_rows, train

HIDDEN = (100, 100, 100)
EVALUATION_BATCH = 1000


@functools.cache
def bundled_mnist() -> Mnist:
    """Read once by each process, which a study of many short trainings would spend a third of its time on."""
    return load_mnist()


class MnistNetwork:
    """A network, its optimizer (SGD) and its batches, a shuffle per epoch and seed.

    Args:
        model: (m, 784) to scores (m, 10).
        data: MNIST, or a part of it.
        seed: of the order of the images. Initial weights are the caller's.
        steps: of the training.
        batch_size: examples of a step.
        learning_rate: of SGD.
        momentum: of SGD.
        weight_decay: L2 of weights, not of vectors.
        evaluations: evenly spaced, and one before the first step.
        measure: what else a row of the metrics has, called in evaluation mode without gradients.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Mnist,
        *,
        seed: int,
        steps: int,
        batch_size: int = 60,
        learning_rate: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        evaluations: int = 20,
        measure: Callable[[nn.Module], dict[str, Any]] = lambda model: {},
    ) -> None:
        settings = {"seed": seed, "steps": steps, "batch": batch_size, "lr": learning_rate, "decay": weight_decay}
        self.settings = json.dumps(settings | {"momentum": momentum, "model": str(model)})
        self.name, self.model, self.data, self.steps, self.measure = "", model, data, steps, measure
        self.evaluation_steps = {-(-steps * part // evaluations) for part in range(evaluations + 1)}
        groups = [
            {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": weight_decay},
            {"params": [p for p in model.parameters() if p.dim() <= 1]},
        ]
        groups = [group for group in groups if group["params"]]
        self.optimizer = torch.optim.SGD(groups, lr=learning_rate, momentum=momentum)
        self.order = Order([len(data.train_labels)], seed=seed, batch_size=batch_size)
        self.test_inputs = data.inputs(data.test_images)

    def batch(self, index: int) -> tuple[Tensor, Tensor]:
        chosen = torch.tensor(self.order.step(index))
        return self.data.inputs(self.data.train_images[chosen]), self.data.train_labels[chosen]

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.model(images), labels)

    @torch.no_grad()
    def evaluate(self, step: int) -> list[dict[str, Any]]:
        """Accuracy and loss on the test images, and what else is measured."""
        scores = torch.cat([self.model(part) for part in self.test_inputs.split(EVALUATION_BATCH)])
        accuracy = (scores.argmax(1) == self.data.test_labels).double().mean().item()
        loss = F.cross_entropy(scores, self.data.test_labels).item()
        return [{"step": step, "test_accuracy": accuracy, "test_loss": loss, **self.measure(self.model)}]

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing but model and optimizer changes."""

    def train(self, place: Place) -> Outcome:
        """All steps, from the checkpoint of a stopped run if there is one."""
        self.name = place.name
        timing = train(self, place.folder, on_progress=place.on_progress, should_stop=place.should_stop)
        return Outcome(list(read_rows(place.folder / f"{place.name}.jsonl")), timing)


@contextmanager
def normalized_by_batch(model: nn.Module) -> Iterator[None]:
    """In training mode, but running statistics are neither used nor changed, and there are no gradients."""
    modes = [(module, module.training) for module in model.modules()]
    layers: list[Any] = [module for module, _ in modes if getattr(module, "track_running_stats", False)]
    try:
        for layer in layers:
            layer.track_running_stats = False
        model.train()
        with torch.no_grad():
            yield
    finally:
        for layer in layers:
            layer.track_running_stats = True
        for module, training in modes:
            module.training = training


def mlp(
    seed: int,
    block: Callable[[int, int], nn.Module],
    *,
    hidden: tuple[int, ...] = HIDDEN,
    init_std: float = 0.1,
) -> nn.Sequential:
    """The paper's network for MNIST: ``block(in, out)`` for every hidden layer, then a linear layer to 10 scores.

    Weights of linear layers are drawn from N(0, init_std^2) by a generator of this seed, biases are 0: networks of
    one seed begin alike, whatever stands between their linear layers.

    Example:
        >>> mlp(0, lambda n_in, n_out: nn.Sequential(nn.Linear(n_in, n_out), nn.Sigmoid()))(torch.rand(5, 784)).shape
        torch.Size([5, 10])
    """
    sizes = (PIXELS, *hidden)
    network = nn.Sequential(*map(block, sizes, sizes[1:]), nn.Linear(sizes[-1], CLASSES))
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0.0, init_std, generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return network
