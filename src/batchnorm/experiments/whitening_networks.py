"""The networks of the whitening study: methods, batches and widths, their training, cost and covariances."""

import contextlib
import copy
import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchnorm import functional
from batchnorm.experiments.data.mnist import Mnist
from batchnorm.experiments.learning_rates import each_rate
from batchnorm.experiments.mnist_network import MnistNetwork, bundled_mnist, mlp, normalized_by_batch
from batchnorm.experiments.study import Outcome, Place, Row
from batchnorm.nn import BatchNorm1d, Whitening1d
from batchnorm.reference import batch_mean, covariance
from batchnorm.statistics import recalibrate

WIDTHS, BATCHES = (32, 64, 128), (16, 64, 256)
WIDTH, LARGE = 64, 256
DEPTH, GROUP = 3, 16
EPS, SMALL_EPS = 1e-3, 1e-5
COST, RANK = "cost of a step", "rank of the covariance"


class WhiteningOutsideGradient(Whitening1d):
    """ZCA whose mean and covariance are constants for the gradient."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        with torch.no_grad():
            mean, cov = batch_mean(input), covariance(input)[None]
            if self.track_running_stats:
                assert self.running_mean is not None
                assert self.running_cov is not None
                assert self.momentum is not None
                self.running_mean.lerp_(mean, self.momentum)
                self.running_cov.lerp_(cov * (len(input) / (len(input) - 1)), self.momentum)
        return functional.whiten(input, mean, cov, self.weight, self.bias, eps=self.eps)


BN, ZCA, OUTSIDE, GROUPS = "BN", "ZCA", "ZCA outside the gradient", f"ZCA in groups of {GROUP}"
METHODS: dict[str, Callable[[int], nn.Module]] = {
    BN: lambda features: BatchNorm1d(features, EPS),
    ZCA: lambda features: Whitening1d(features, EPS),
    GROUPS: lambda features: Whitening1d(features, EPS, group_size=GROUP),
    "Newton-Schulz": lambda features: Whitening1d(features, EPS, method="newton_schulz"),
    "Cholesky": lambda features: Whitening1d(features, EPS, method="cholesky"),
    OUTSIDE: lambda features: WhiteningOutsideGradient(features, EPS),
}
# for a covariance of fewer examples than features
REGULARIZED: dict[str, Callable[[int], nn.Module]] = {
    f"ZCA, eps {SMALL_EPS:g}": lambda features: Whitening1d(features, SMALL_EPS),
    "ZCA, eps 0.1": lambda features: Whitening1d(features, 0.1),
    "ZCA, shrinkage 0.1": lambda features: Whitening1d(features, SMALL_EPS, shrinkage=0.1),
    "ZCA, shrinkage 0.5": lambda features: Whitening1d(features, SMALL_EPS, shrinkage=0.5),
}


class Arm(NamedTuple):
    """A method of ``METHODS`` or ``REGULARIZED``, examples of a step, features of the three hidden layers."""

    method: str
    batch_size: int
    width: int = WIDTH


def name_of(method: str, batch_size: int, width: int = WIDTH) -> str:
    """The name of an arm."""
    return f"{method}, batch {batch_size}, width {width}"


ARMS = {
    name_of(*arm): arm
    for arm in (
        *(Arm(method, batch) for method in METHODS for batch in BATCHES),
        *(Arm(method, min(BATCHES)) for method in REGULARIZED),
        *(Arm(method, LARGE, width) for method in (BN, ZCA, GROUPS) for width in WIDTHS if width != WIDTH),
    )
}


@dataclasses.dataclass(frozen=True)
class Options:
    """``steps`` of every network; ``rounds`` of the interleaved timing."""

    steps: int = 250
    seeds: tuple[int, ...] = (0, 1, 2)
    rates: tuple[float, ...] = (0.5, 2.0, 8.0)
    init_std: float = 0.1
    rounds: int = 15
    evaluations: int = 5
    measured_images: int = 512
    population_images: int = 2_048
    test_images: int = 2_000


def arms(options: Options) -> list[str]:
    return [COST, RANK, *ARMS]


def network(arm: Arm, seed: int, options: Options) -> nn.Sequential:
    make = (METHODS | REGULARIZED)[arm.method]

    def block(n_in: int, n_out: int) -> nn.Module:
        return nn.Sequential(nn.Linear(n_in, n_out, bias=False), make(n_out), nn.Sigmoid())

    return mlp(seed, block, hidden=(arm.width,) * DEPTH, init_std=options.init_std)


def run(arm: str, seed: int, options: Options, place: Place) -> Outcome:
    if arm == COST:
        return Outcome(time_steps(seed, options))
    if arm == RANK:
        return Outcome(measure_ranks(seed, options))
    chosen, data, rows, timing = ARMS[arm], bundled_mnist(), [], None
    images, labels = data.inputs(data.train_images[: options.measured_images]), data.train_labels
    population = data.inputs(data.train_images[: options.population_images])
    data = data._replace(
        test_images=data.test_images[: options.test_images], test_labels=data.test_labels[: options.test_images]
    )

    def measure(model: nn.Module) -> dict[str, float]:
        weights = [module.weight.norm() for module in model.modules() if isinstance(module, nn.Linear)][:-1]
        return {
            "weight_size": torch.stack(weights).norm().item(),
            "train_loss": training_loss(model, images, labels, chosen.batch_size),
            "population_accuracy": population_accuracy(model, population.split(chosen.batch_size), data),
            **correlations(model, images),
        }

    for rate, part in each_rate(place, options.rates, steps=options.steps, shown=options.steps):
        task = MnistNetwork(
            network(chosen, seed, options),
            data,
            seed=seed,
            steps=options.steps,
            batch_size=chosen.batch_size,
            learning_rate=rate,
            evaluations=options.evaluations,
            measure=measure,
        )
        outcome = task.train(part)
        timing = timing or outcome.timing
        rows += [row | {"rate": rate, "batch": chosen.batch_size, "width": chosen.width} for row in outcome.rows]
    return Outcome(rows, timing)


def training_loss(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int) -> float:
    """Of images of the training set, normalized in batches as in training."""
    with normalized_by_batch(model):
        output = torch.cat([model(part) for part in images.split(batch_size)])
    return F.cross_entropy(output, labels[: len(images)]).item()


def population_accuracy(model: nn.Module, batches: Sequence[Tensor], data: Mnist) -> float:
    """On the test images, by population statistics: those of all training batches together."""
    measured = copy.deepcopy(model)
    # a network that has diverged has none, and is scored as it stands
    with contextlib.suppress(ValueError):
        recalibrate(measured, batches)
    scores = measured(data.inputs(data.test_images))
    return (scores.argmax(1) == data.test_labels).double().mean().item()


def correlations(model: nn.Module, images: Tensor) -> dict[str, float]:
    """Root mean square of the correlations between features before and after the last normalization, by one batch."""
    layer = next(module for module in reversed(list(model.modules())) if isinstance(module, BatchNorm1d | Whitening1d))
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        seen.extend((args[0], output))

    hook = layer.register_forward_hook(keep)
    try:
        with normalized_by_batch(model):
            model(images)
    finally:
        hook.remove()
    before, after = (root_mean_square(correlation(x.double())) for x in seen)
    return {"correlation_before": before, "correlation_after": after}


def correlation(x: Tensor) -> Tensor:
    """Of the features of (m, d)."""
    cov = covariance(x)
    deviations = cov.diagonal().sqrt()
    return cov / (deviations[:, None] * deviations)


def root_mean_square(correlation: Tensor) -> float:
    """Of what is not on the diagonal."""
    d = len(correlation)
    return ((correlation.square().sum() - d) / (d * (d - 1))).clamp(min=0).sqrt().item()


def time_steps(seed: int, options: Options) -> list[Row]:
    """Milliseconds of processor time of a step, a method after the other in every round: medians over the rounds."""
    rows = []
    for width in WIDTHS:
        for batch in BATCHES:
            steps = {method: step_of(Arm(method, batch, width), seed, options) for method in METHODS}
            spent: dict[str, list[float]] = {method: [] for method in METHODS}
            # the first round compiles and warms up
            for _ in range(options.rounds + 1):
                for method, step in steps.items():
                    started = time.process_time()
                    step()
                    spent[method].append(1e3 * (time.process_time() - started))
            rows += [
                {"width": width, "batch": batch, "method": method, "milliseconds": statistics.median(times[1:])}
                for method, times in spent.items()
            ]
    return rows


def step_of(arm: Arm, seed: int, options: Options) -> Callable[[], Any]:
    """A training step: forward, backward, SGD."""
    model, data = network(arm, seed, options), bundled_mnist()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    images, labels = data.inputs(data.train_images[: arm.batch_size]), data.train_labels[: arm.batch_size]

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return step


@torch.no_grad()
def measure_ranks(seed: int, options: Options) -> list[Row]:
    """Of the covariance of a batch of the first hidden layer's sums, before training, in float64."""
    data, generator, rows = bundled_mnist(), torch.Generator().manual_seed(seed), []
    for width in WIDTHS:
        first = network(Arm(BN, LARGE, width), seed, options).get_submodule("0.0").double()
        for batch in BATCHES:
            chosen = torch.randint(len(data.train_labels), (batch,), generator=generator)
            cov = covariance(first(data.inputs(data.train_images[chosen]).double()))
            rank = int(torch.linalg.matrix_rank(cov, hermitian=True))
            rows.append({"width": width, "batch": batch, "rank": rank})
    return rows
