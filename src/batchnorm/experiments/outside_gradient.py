"""Section 2 of the paper: what happens if the gradient step ignores that the normalization depends on parameters.

Three questions on MNIST. A bias b before the normalization, everything else fixed: "b will grow indefinitely while the
loss remains fixed". A scale s instead of the bias, mean and variance outside the gradient. And the whole network, which
according to the paper "blows up when the normalization parameters are computed outside the gradient descent step".
"""

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchnorm.experiments.claims import Claim
from batchnorm.experiments.data.mnist import CLASSES, PIXELS
from batchnorm.experiments.mnist_network import MnistNetwork, bundled_mnist, mlp
from batchnorm.experiments.study import (
    Conclusion,
    Outcome,
    Panel,
    Place,
    Row,
    Study,
    Table,
    claim,
    line,
    of_arm,
    values_at_end,
)
from batchnorm.reference import batch_mean, batch_var, normalize

SOURCE = "Ioffe & Szegedy 2015, section 2"
OUTSIDE, INSIDE = "outside the gradient", "through the statistics"
BIAS, SCALE, NETWORK = "bias", "scale", "network"
RATES = (0.5, 2.0, 8.0)
HIDDEN = 100


@dataclasses.dataclass(frozen=True)
class Options:
    """``steps`` of gradient descent in all three parts; eps in the networks only, the single layer needs none."""

    steps: int = 2000
    seeds: tuple[int, ...] = (0, 1, 2)
    batch_size: int = 60
    learning_rate: float = 0.5
    init_std: float = 0.1
    eps: float = 1e-5
    evaluations: int = 100


def arms(options: Options) -> list[str]:
    layers = [f"{part}, {where}" for part in (BIAS, SCALE) for where in (OUTSIDE, INSIDE)]
    return [*layers, *(network(rate, where) for rate in RATES for where in (OUTSIDE, INSIDE))]


def network(rate: float, where: str) -> str:
    """The name of an arm."""
    return f"{NETWORK}, learning rate {rate:g}, {where}"


class Normalization(nn.Module):
    """A bias and the normalization of its sum with the input; neither gamma nor beta, as in section 2."""

    mean: Tensor
    var: Tensor

    def __init__(self, features: int, where: str, eps: float) -> None:
        super().__init__()
        self.where, self.eps = where, eps
        self.bias = nn.Parameter(torch.zeros(features))
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("var", torch.ones(features))

    def forward(self, input: Tensor) -> Tensor:
        x = input + self.bias
        if not self.training:
            return normalize(x, self.mean, self.var, self.eps)
        mean, var = statistics_of(x, self.where)
        with torch.no_grad():
            self.mean.lerp_(mean, 0.1)
            self.var.lerp_(var, 0.1)
        return normalize(x, mean, var, self.eps)


def statistics_of(x: Tensor, where: str) -> tuple[Tensor, Tensor]:
    """Mean and variance of the batch, as constants for the gradient or not."""
    mean = batch_mean(x)
    var = batch_var(x, mean)
    return (mean.detach(), var.detach()) if where == OUTSIDE else (mean, var)


def run(arm: str, seed: int, options: Options, place: Place) -> Outcome:
    part, *_, where = arm.split(", ")
    return train_network(arm, where, seed, options, place) if part == NETWORK else descend(part, where, seed, options)


def descend(part: str, where: str, seed: int, options: Options) -> Outcome:
    """Gradient descent on the bias or the scale of one layer, on one mini-batch, in float64: the rest is fixed."""
    data, generator = bundled_mnist(), torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(data.train_labels), generator=generator)[: options.batch_size]
    first, last = (
        options.init_std * torch.randn(n_in, n_out, dtype=torch.float64, generator=generator)
        for n_in, n_out in ((PIXELS, HIDDEN), (HIDDEN, CLASSES))
    )
    u, labels = data.inputs(data.train_images[chosen]).double() @ first, data.train_labels[chosen]
    moved = torch.full((HIDDEN,), float(part == SCALE), dtype=torch.float64, requires_grad=True)
    every, rows = max(options.steps // options.evaluations, 1), []
    for step in range(options.steps + 1):
        x = u + moved if part == BIAS else u * moved
        mean, var = statistics_of(x, where)
        output = x - mean if part == BIAS else normalize(x, mean, var, 0.0)
        loss = F.cross_entropy(torch.sigmoid(output) @ last, labels)
        (gradient,) = torch.autograd.grad(loss, moved)
        if step % every == 0:
            sizes = {"size": moved.detach().norm().item(), "gradient": gradient.norm().item()}
            rows.append({"step": step, "loss": loss.item(), **sizes})
        with torch.no_grad():
            moved -= options.learning_rate * gradient
    return Outcome(rows)


def train_network(arm: str, where: str, seed: int, options: Options, place: Place) -> Outcome:
    """All parameters of a network of three such layers."""

    def block(n_in: int, n_out: int) -> nn.Module:
        return nn.Sequential(nn.Linear(n_in, n_out, bias=False), Normalization(n_out, where, options.eps), nn.Sigmoid())

    def sizes(model: nn.Module) -> dict[str, float]:
        biases = [module.bias.norm() for module in model.modules() if isinstance(module, Normalization)]
        weights = [module.weight.norm() for module in model.modules() if isinstance(module, nn.Linear)][:-1]
        return {"size": torch.stack(biases).norm().item(), "weight_size": torch.stack(weights).norm().item()}

    rate = next(rate for rate in RATES if network(rate, where) == arm)
    task = MnistNetwork(
        mlp(seed, block, init_std=options.init_std),
        bundled_mnist(),
        seed=seed,
        steps=options.steps,
        batch_size=options.batch_size,
        learning_rate=rate,
        measure=sizes,
    )
    return task.train(place)


def conclude(rows: list[Row], options: Options) -> Conclusion:
    outside, inside = f"{BIAS}, {OUTSIDE}", f"{BIAS}, {INSIDE}"
    scales = [f"{SCALE}, {where}" for where in (OUTSIDE, INSIDE)]
    sizes = [line(rows, arm, "size", name=where) for arm, where in ((outside, OUTSIDE), (inside, INSIDE))]
    losses = [line(rows, outside, "loss", name="bias, outside"), line(rows, scales[0], "loss", name="scale, outside")]
    gradients = [line(rows, arm, "gradient", name=where) for arm, where in zip(scales, (OUTSIDE, INSIDE), strict=True)]
    weights = [
        line(rows, network(rate, where), "weight_size", name=f"{where.split()[0]}, rate {rate:g}")
        for rate in RATES
        for where in (OUTSIDE, INSIDE)
    ]
    panels = [
        Panel("bias", "Size of the bias", "steps", "|b|", sizes),
        Panel("loss", "Loss while only bias or scale move", "steps", "loss", losses),
        Panel("scale", "Gradient of the scale", "steps", "|gradient|", gradients),
        Panel("weights", "Weights of the whole network", "steps", "|W|", weights, y_log=True),
    ]
    claims = [
        growth_claim(rows, outside),
        loss_claim(rows, outside),
        inside_claim(rows, inside, outside),
        scale_claim(rows, *scales),
        network_claim(rows),
    ]
    return Conclusion(claims, panels, [networks(rows)], caption=CAPTION)


def by_seed(rows: list[Row], arm: str) -> list[list[Row]]:
    seeds = sorted({row["seed"] for row in of_arm(rows, arm)})
    return [of_arm(rows, arm, seed) for seed in seeds]


def growth_claim(rows: list[Row], arm: str) -> Claim:
    values = [run[-1]["size"] / run[len(run) // 2]["size"] for run in by_seed(rows, arm)]
    return claim(
        "bias-grows",
        "If the gradient ignores the mean, the bias before it grows without bound.",
        values,
        source=SOURCE,
        rule="|b| after all steps / |b| after half of them, 2 for a growth that never slows down",
        unit="ratio",
        detail=f"|b| after {rows_end(rows, arm):,} steps: {shown(values_at_end(rows, arm, 'size'))}",
        paper="grows indefinitely",
        above=1.9,
    )


def loss_claim(rows: list[Row], arm: str) -> Claim:
    runs = [[row["loss"] for row in run] for run in by_seed(rows, arm)]
    return claim(
        "loss-stays",
        "Meanwhile the loss stays as it is.",
        [(max(losses) - min(losses)) / losses[0] for losses in runs],
        source=SOURCE,
        rule="highest less lowest loss of the training, relative to the first",
        unit="of the loss",
        detail=f"loss {shown([losses[0] for losses in runs])}, in float64",
        paper="the loss remains fixed",
        below=1e-9,
    )


def inside_claim(rows: list[Row], inside: str, outside: str) -> Claim:
    pairs = list(zip(values_at_end(rows, inside, "size"), values_at_end(rows, outside, "size"), strict=True))
    return claim(
        "gradient-inside",
        "With the gradient through the mean, the bias before it does not move.",
        [here / there for here, there in pairs],
        source=SOURCE,
        rule="|b| with the gradient through the mean / |b| with the mean outside, after all steps",
        unit="ratio",
        detail=f"|b| {shown([here for here, _ in pairs])}: rounding",
        paper="the gradient with respect to b is 0",
        below=1e-9,
    )


def scale_claim(rows: list[Row], outside: str, inside: str) -> Claim:
    runs = [[row["gradient"] for row in run] for run in by_seed(rows, outside)]
    calm = [max(row["gradient"] for row in run) for run in by_seed(rows, inside)]
    return claim(
        "scale-is-worse",
        "If the variance is ignored too, a scale moves although the output does not depend on its size, and its "
        "gradient grows.",
        [math.log10(max(gradients) / gradients[0]) for gradients in runs],
        source=SOURCE,
        rule="logarithm of the largest gradient of the training / the first",
        unit="powers of ten",
        detail=f"with the gradient through mean and variance it is at most {max(calm):.0e}",
        paper="the issue gets worse if the normalization not only centers but also scales",
        above=0.0,
    )


def network_claim(rows: list[Row]) -> Claim:
    ends = {
        field: [[values_at_end(rows, network(rate, where), field) for where in (OUTSIDE, INSIDE)] for rate in RATES]
        for field in ("test_accuracy", "weight_size")
    }
    differences = [[100 * (b - a) for a, b in zip(*pair, strict=True)] for pair in ends["test_accuracy"]]
    growth = "; ".join(
        f"learning rate {rate:g}: {outside[0] / inside[0]:.3g} times"
        for rate, (outside, inside) in zip(RATES, ends["weight_size"], strict=True)
    )
    return claim(
        "network-blows-up",
        "A network blows up when its normalization is computed outside the gradient step: its weights grow, and it "
        "learns worse or not at all.",
        [sum(column) / len(RATES) for column in zip(*differences, strict=True)],
        source=SOURCE,
        rule="test accuracy with the gradient through the statistics less that of the same network with them outside, "
        f"mean over the learning rates {', '.join(f'{rate:g}' for rate in RATES)}",
        unit="percentage points",
        detail=f"|W| outside over |W| through the statistics, first seed: {growth}",
        paper="the model blows up",
        above=0.0,
    )


def networks(rows: list[Row]) -> Table:
    """How the whole networks ended, mean over the seeds."""
    lines = []
    for rate in RATES:
        for where in (OUTSIDE, INSIDE):
            fields = ("test_accuracy", "weight_size", "size")
            ends = [values_at_end(rows, network(rate, where), field) for field in fields]
            accuracy, weights, biases = (sum(values) / len(values) for values in ends)
            lines.append([f"{rate:g}", where, f"{accuracy:.2%}", f"{weights:.3g}", f"{biases:.3g}"])
    columns = ["Learning rate", "normalization", "test accuracy", "|W|", "|b|"]
    return Table("networks", "The whole network", columns, lines, "Means over the seeds, after the last step.")


def rows_end(rows: list[Row], arm: str) -> int:
    return of_arm(rows, arm)[-1]["step"]


def shown(values: list[float]) -> str:
    return ", ".join(f"{value:.3g}" for value in values)


CAPTION = (
    "Bias and scale: one layer on one mini-batch, everything else fixed, in float64. Whole network: three layers of "
    "100 sigmoids, all parameters trained. Lines are means over the seeds, bands run from the lowest to the highest."
)
STUDY = Study(
    title="Normalization outside the gradient",
    options=Options(),
    quick={"steps": 100, "seeds": (0, 1), "evaluations": 4},
    notes=(
        "The paper gives the argument, a bias before a mean subtraction, and says that a model blew up in initial "
        "experiments; it gives no network, learning rate or numbers. Here: MNIST, the network of section 4.1, plain "
        "SGD, and three learning rates for the whole network.",
        "Neither gamma nor beta follows the normalization, as in section 2 of the paper, where they do not exist yet.",
        "The whole network is evaluated with running averages of its statistics.",
    ),
    arms=arms,
    run=run,
    conclude=conclude,
)
