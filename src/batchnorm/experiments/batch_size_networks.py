"""The networks of the batch-size study: methods and batches, their training, and their evaluations."""

import dataclasses
import itertools
from typing import NamedTuple

import torch
from torch import Tensor, nn

from batchnorm.experiments.data.mnist import Mnist
from batchnorm.experiments.learning_rates import each_rate
from batchnorm.experiments.mnist_network import MnistNetwork, bundled_mnist, mlp, normalized_by_batch
from batchnorm.experiments.study import Outcome, Place
from batchnorm.nn import BatchNorm1d, BatchRenorm1d, GhostBatchNorm1d
from batchnorm.statistics import recalibrate

BATCHES = (2, 4, 8, 16, 32, 64, 128, 512)
GHOSTS = (16, 32)
LARGE, LONG = 512, 15
# the learning rate of this batch is the one of the grid, and running averages of it have a momentum of 0.1
REFERENCE = 32
LARGE_STATISTICS = 1000
# Ioffe 2017: warm-up of 5,000 steps, limits reached after 40,000 and 25,000; here in shares of the training
WARMUP, RMAX, DMAX = 0.04, 0.32, 0.2
NOISE = "noise of the batch mean"
BY_AVERAGES, BY_POPULATION, BY_BATCH = "test_accuracy", "population_accuracy", "batch_accuracy"
BY_LARGE, BY_DEFAULT = "large_population_accuracy", "default_accuracy"


class Arm(NamedTuple):
    """A method at a batch size; ``long`` for ``LONG`` times as many images."""

    method: str
    batch_size: int
    long: bool = False


BN, RENORMED = "BN", "Batch Renorm"
GHOST = {f"Ghost BN of {size}": size for size in GHOSTS}
SWEEP = [
    *(Arm(method, batch) for method in (BN, RENORMED) for batch in BATCHES),
    *(Arm(method, batch) for method in GHOST for batch in BATCHES if batch >= 64),
]
ARMS = {
    f"{arm.method}, batch {arm.batch_size}{', long' if arm.long else ''}": arm
    for arm in (*SWEEP, *(Arm(method, LARGE, long=True) for method in (BN, *GHOST)))
}


@dataclasses.dataclass(frozen=True)
class Options:
    """``steps`` at a batch of 2; others see as many images. ``rates`` are those of a batch of 32."""

    steps: int = 8000
    seeds: tuple[int, ...] = (0, 1, 2)
    rates: tuple[float, ...] = (0.1, 0.5, 2.5)
    init_std: float = 0.1
    train_images: int = 10_000
    validation_images: int = 5_000
    test_images: int = 10_000
    statistics_images: int = 2_000
    noise_batches: int = 400


def arms(options: Options) -> list[str]:
    return [*ARMS, NOISE]


def steps_of(arm: Arm, options: Options) -> int:
    images = options.steps * min(BATCHES) * (LONG if arm.long else 1)
    return max(images // arm.batch_size, 1)


def learning_rate(rate: float, batch_size: int) -> float:
    """In proportion to the batch, as in Goyal et al."""
    return rate * batch_size / REFERENCE


def momentum(batch_size: int) -> float:
    """Running averages that look back over as many images whatever the batch; 0.1 at the reference."""
    return 1 - 0.9 ** (batch_size / REFERENCE)


def layer(arm: Arm, steps: int, features: int) -> nn.Module:
    weight_of_new = momentum(arm.batch_size)
    if arm.method in GHOST:
        return GhostBatchNorm1d(features, momentum=weight_of_new, ghost_batch_size=GHOST[arm.method])
    if arm.method == RENORMED:
        warmup, rmax, dmax = (round(share * steps) for share in (WARMUP, RMAX, DMAX))
        return BatchRenorm1d(features, momentum=weight_of_new, warmup_steps=warmup, rmax_steps=rmax, dmax_steps=dmax)
    return BatchNorm1d(features, momentum=weight_of_new)


def network(seed: int, options: Options, arm: Arm) -> nn.Sequential:
    def block(n_in: int, n_out: int) -> nn.Module:
        return nn.Sequential(
            nn.Linear(n_in, n_out, bias=False), layer(arm, steps_of(arm, options), n_out), nn.Sigmoid()
        )

    return mlp(seed, block, init_std=options.init_std)


def parts(options: Options) -> tuple[Mnist, Mnist]:
    """Training and test images, and validation images with the same test images."""
    data, last = bundled_mnist(), options.train_images + options.validation_images
    test = data.test_images[: options.test_images], data.test_labels[: options.test_images]
    training, validation = (
        Mnist(data.train_images[part], data.train_labels[part], *test, data.scale)
        for part in (slice(options.train_images), slice(options.train_images, last))
    )
    return training, validation


def run(arm: str, seed: int, options: Options, place: Place) -> Outcome:
    if arm == NOISE:
        return measure_noise(seed, options)
    rows, timing = [], None
    chosen, steps = ARMS[arm], steps_of(ARMS[arm], options)
    for rate, part in each_rate(place, options.rates, steps=steps, shown=options.steps):
        task = MnistNetwork(
            network(seed, options, chosen),
            parts(options)[0],
            seed=seed,
            steps=steps,
            batch_size=chosen.batch_size,
            learning_rate=learning_rate(rate, chosen.batch_size),
            evaluations=1,
        )
        outcome = task.train(part)
        timing = timing or outcome.timing
        row = outcome.rows[-1] | {"batch": chosen.batch_size, "rate": rate}
        rows.append(row | evaluations(task.model, chosen.batch_size, options))
    return Outcome(rows, timing, steps)


def evaluations(model: nn.Module, batch_size: int, options: Options) -> dict[str, float]:
    """Of the trained network: validation accuracy, and test accuracy with other statistics than running averages."""
    training, validation = parts(options)
    images = training.inputs(training.train_images[: options.statistics_images])
    test, labels = training.inputs(training.test_images), training.test_labels
    compared = in_batches(test[: options.statistics_images], batch_size)
    count = sum(map(len, compared))
    model.eval()
    found = {
        "validation_accuracy": accuracy(
            scores(model, [validation.inputs(validation.train_images)]), validation.train_labels
        )
    }
    with normalized_by_batch(model):
        by_batch = scores(model, compared)
    recalibrate(model, in_batches(images, batch_size))
    by_population = scores(model, [test])
    found[BY_BATCH] = accuracy(by_batch, labels[:count])
    found[BY_POPULATION] = accuracy(by_population, labels)
    found["disagreement"] = 1 - accuracy(by_batch, by_population[:count].argmax(1))
    found["images_compared"] = count
    recalibrate(model, in_batches(images, LARGE_STATISTICS))
    found[BY_LARGE] = accuracy(scores(model, [test]), labels)
    average_by_default(model, images, batch_size)
    found[BY_DEFAULT] = accuracy(scores(model, [test]), labels)
    return found


def in_batches(images: Tensor, size: int) -> list[Tensor]:
    """Whole batches, since one of a single image has no variance; all images as one if they fill none.

    Example:
        >>> [len(batch) for batch in in_batches(torch.zeros(5, 1), 2)], len(in_batches(torch.zeros(5, 1), 6)[0])
        ([2, 2], 5)
    """
    return [batch for batch in images.split(size) if len(batch) == size] or [images]


@torch.no_grad()
def average_by_default(model: nn.Module, images: Tensor, batch_size: int) -> None:
    """Running averages of torch's default momentum, 0.1, of 50 batches; the weights stay."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.momentum = 0.1
    for batch in itertools.islice(itertools.cycle(in_batches(images, batch_size)), 50):
        model(batch)
    model.eval()


@torch.no_grad()
def scores(model: nn.Module, batches: list[Tensor]) -> Tensor:
    return torch.cat([model(batch) for batch in batches])


def accuracy(found: Tensor, labels: Tensor) -> float:
    return (found.argmax(1) == labels).double().mean().item()


@torch.no_grad()
def measure_noise(seed: int, options: Options) -> Outcome:
    """How mean and variance of a batch scatter: of the first BN layer's input, before training."""
    first = network(seed, options, Arm(BN, REFERENCE)).get_submodule("0.0")
    data, generator = bundled_mnist(), torch.Generator().manual_seed(seed)
    rows = []
    for batch in BATCHES:
        drawn = torch.randint(len(data.train_labels), (options.noise_batches, batch), generator=generator)
        values = [first(data.inputs(data.train_images[chosen])).double() for chosen in drawn]
        means = torch.stack([x.mean(0) for x in values])
        variances = torch.stack([x.var(0) for x in values])
        var = variances.mean(0)
        noise = {"noise_of_mean": means.var(0) / var, "noise_of_var": variances.var(0) / var.square()}
        rows.append({"batch": batch, **{name: found.mean().item() for name, found in noise.items()}})
    return Outcome(rows)
