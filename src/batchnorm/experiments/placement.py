"""Sections 3 and 3.2 of the paper: where the normalization stands, and what is learned around it.

Before the nonlinearity, g(BN(Wu)), or after it; with the bias of the linear layer or without; with gamma and beta, with
one of them, or with neither. And the identity: gamma = sqrt(Var[x] + eps) and beta = E[x] give back x.
"""

import copy
import dataclasses
import functools
import statistics

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchnorm.experiments.claims import Claim
from batchnorm.experiments.learning_rates import (
    accuracies,
    at_rate,
    average,
    best,
    best_rate,
    differences,
    over_rates,
    split_rate,
)
from batchnorm.experiments.mnist_network import HIDDEN, MnistNetwork, bundled_mnist, mlp
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
from batchnorm.nn import BatchNorm1d

PAPER = "Ioffe & Szegedy 2015"
IDENTITY = "identity"
SIGMOID, RELU = "sigmoid", "ReLU"
BEFORE, AFTER, WITHOUT = "before", "after", "none"
BIASED, NO_GAMMA, NO_BETA, NEITHER = "before with bias", "before, no gamma", "before, no beta", "before, neither"
VARIANTS = {
    SIGMOID: (BEFORE, AFTER, WITHOUT, BIASED, NO_GAMMA, NO_BETA, NEITHER),
    RELU: (BEFORE, AFTER, WITHOUT),
}
ROUNDING = 1e-10
# percentage points of test accuracy, 10 of MNIST's 10,000 images
MARGIN = 0.1


@dataclasses.dataclass(frozen=True)
class Options:
    """Every variant is trained at each of ``rates`` and compared at its best."""

    steps: int = 2500
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    rates: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0, 10.0)
    batch_size: int = 60
    init_std: float = 0.1
    eps: float = 1e-5
    evaluations: int = 5


def arms(options: Options) -> list[str]:
    variants = [named(activation, variant) for activation in VARIANTS for variant in VARIANTS[activation]]
    return [IDENTITY, *(at_rate(variant, rate) for variant in variants for rate in options.rates)]


def named(activation: str, variant: str) -> str:
    """The name of an arm, but for its learning rate."""
    return f"{activation}, {variant}"


def run(arm: str, seed: int, options: Options, place: Place) -> Outcome:
    if arm == IDENTITY:
        return Outcome([exact(seed, options)])
    name, rate = split_rate(arm)
    activation, variant = name.split(", ", 1)
    blocks = functools.partial(block, activation=activation, variant=variant, eps=options.eps)
    task = MnistNetwork(
        mlp(seed, blocks, init_std=options.init_std),
        bundled_mnist(),
        seed=seed,
        steps=options.steps,
        batch_size=options.batch_size,
        learning_rate=rate,
        evaluations=options.evaluations,
        measure=learned,
    )
    return task.train(place)


def block(n_in: int, n_out: int, activation: str, variant: str, eps: float) -> nn.Sequential:
    """A hidden layer. Without BN before the nonlinearity there is a bias."""
    linear = nn.Linear(n_in, n_out, bias=variant in (BIASED, AFTER, WITHOUT))
    nonlinearity = nn.Sigmoid() if activation == SIGMOID else nn.ReLU()
    if variant == WITHOUT:
        return nn.Sequential(linear, nonlinearity)
    normalization = BatchNorm1d(n_out, eps=eps, affine=variant != NEITHER, bias=variant != NO_BETA)
    if variant == NO_GAMMA:
        normalization.weight.requires_grad_(False)
    if variant == AFTER:
        return nn.Sequential(linear, nonlinearity, normalization)
    return nn.Sequential(linear, normalization, nonlinearity)


def learned(model: nn.Module) -> dict[str, float]:
    """Mean |gamma|, |beta| and |bias of the linear layer| of the last hidden layer; 1 and 0 where there is none."""
    last = [module for module in model.modules() if isinstance(module, nn.Sequential)][-1]
    linear = next(module for module in last if isinstance(module, nn.Linear))
    found = {"gamma": 1.0, "beta": 0.0, "bias": 0.0 if linear.bias is None else linear.bias.norm().item()}
    for module in last:
        if isinstance(module, BatchNorm1d):
            found["gamma"] = 1.0 if module.weight is None else module.weight.abs().mean().item()
            found["beta"] = 0.0 if module.bias is None else module.bias.norm().item()
    return found


def exact(seed: int, options: Options) -> Row:
    """In float64, on one mini-batch: the gradient of a bias before BN, and networks with BN made the identity."""
    data, generator = bundled_mnist(), torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(data.train_labels), generator=generator)[: options.batch_size]
    images, labels = data.inputs(data.train_images[chosen]).double(), data.train_labels[chosen]

    def network(variant: str) -> nn.Sequential:
        blocks = functools.partial(block, activation=SIGMOID, variant=variant, eps=options.eps)
        return mlp(seed, blocks, init_std=options.init_std).double()

    biased, plain = network(BIASED), network(WITHOUT)
    loss = F.cross_entropy(biased(images), labels)
    bias_gradient, beta_gradient = (
        torch.cat(torch.autograd.grad(loss, biases[: len(HIDDEN)], retain_graph=True)).norm()
        for biases in (
            [module.bias for module in biased.modules() if isinstance(module, kind)]
            for kind in (nn.Linear, BatchNorm1d)
        )
    )
    with torch.no_grad():
        normalized = with_identities(plain, images, options.eps)
        output, expected = normalized(images), plain(images)
    return {
        "bias_gradient": (bias_gradient / beta_gradient).item(),
        "identity": ((output - expected).norm() / expected.norm()).item(),
    }


def with_identities(model: nn.Sequential, images: Tensor, eps: float) -> nn.Sequential:
    """The network with BN before every nonlinearity, its gamma and beta those of these images."""
    layers, x = [], images
    for part in copy.deepcopy(model):
        if not isinstance(part, nn.Sequential):
            layers.append(part)
            continue
        linear, nonlinearity = part
        x = linear(x)
        normalization = BatchNorm1d(x.shape[1], eps=eps, dtype=x.dtype)
        normalization.weight.copy_((x.var(0, correction=0) + eps).sqrt())
        normalization.bias.copy_(x.mean(0))
        layers.append(nn.Sequential(linear, normalization, nonlinearity))
        x = nonlinearity(x)
    return nn.Sequential(*layers)


def conclude(rows: list[Row], options: Options) -> Conclusion:
    rates = options.rates
    placements = [
        Panel(
            activation.lower(),
            f"Test accuracy, {activation}",
            "learning rate",
            "percent",
            [over_rates(rows, named(activation, where), rates, where) for where in (BEFORE, AFTER, WITHOUT)],
            x_log=True,
        )
        for activation in VARIANTS
    ]
    parameters = [
        over_rates(rows, named(SIGMOID, variant), rates, variant) for variant in (BEFORE, NO_GAMMA, NO_BETA, NEITHER)
    ]
    biases = [line(rows, best(rows, named(SIGMOID, where), rates), "bias", name=where) for where in (BIASED, WITHOUT)]
    panels = [
        *placements,
        Panel("parameters", "Sigmoid: gamma and beta", "learning rate", "percent", parameters, x_log=True),
        Panel("bias", "Sigmoid: bias of the linear layer", "steps", "|bias|", biases),
    ]
    claims = [
        identity_claim(rows),
        bias_gradient_claim(rows, options),
        bias_claim(rows, options),
        *(order_claim(rows, activation, options) for activation in VARIANTS),
        parameters_claim(rows, options),
    ]
    return Conclusion(claims, panels, [variants(rows, options)], CAPTION)


def identity_claim(rows: list[Row]) -> Claim:
    return claim(
        "identity",
        "gamma = sqrt(Var[x] + eps) and beta = E[x] make BN the identity: a network computes the same with it.",
        [row["identity"] for row in of_arm(rows, IDENTITY)],
        source=f"{PAPER}, section 3",
        rule="|scores with BN before every nonlinearity - scores without it| / |scores|, in float64",
        unit="relative",
        detail="gamma and beta are those of the batch that is normalized; the paper's sqrt(Var[x]) leaves out eps",
        paper="the transformation inserted in the network can represent the identity transform",
        below=ROUNDING,
    )


def bias_gradient_claim(rows: list[Row], options: Options) -> Claim:
    name = best(rows, named(SIGMOID, BIASED), options.rates)
    bias, beta = (average(values_at_end(rows, name, field)) for field in ("bias", "beta"))
    return claim(
        "bias-has-no-gradient",
        "A bias before BN has no gradient: the subtraction of the mean cancels it.",
        [row["bias_gradient"] for row in of_arm(rows, IDENTITY)],
        source=f"{PAPER}, section 3.2",
        rule="|gradient of the biases before BN| / |gradient of beta|, in float64",
        unit="relative",
        detail=f"after training in float32 the last hidden layer has |bias| = {bias:.1g}, |beta| = {beta:.2g}",
        paper="its effect will be canceled by the subsequent mean subtraction",
        below=ROUNDING,
    )


def bias_claim(rows: list[Row], options: Options) -> Claim:
    rate = best_rate(rows, named(SIGMOID, BEFORE), options.rates)
    without, biased = (at_rate(named(SIGMOID, variant), rate) for variant in (BEFORE, BIASED))
    spread = statistics.stdev(accuracies(rows, without)) if len(options.seeds) > 1 else float("nan")
    apart = [abs(difference) for difference in differences(rows, biased, without)]
    return claim(
        "bias-is-ignored",
        "A network with that bias learns as one without it.",
        [difference / spread if spread else float("nan") for difference in apart],
        source=f"{PAPER}, section 3.2",
        rule="|test accuracy with bias - without|, same seed, relative to the standard deviation over seeds without it",
        unit="standard deviations",
        detail=f"at learning rate {rate:g}: {max(apart):.2g} points at most, seeds {spread:.2g} points apart",
        paper="the bias b can be ignored",
        below=1.0,
    )


def order_claim(rows: list[Row], activation: str, options: Options) -> Claim:
    before, after = (best(rows, named(activation, variant), options.rates) for variant in (BEFORE, AFTER))
    return claim(
        f"before-{activation.lower()}",
        f"BN before the {activation} is at least as good as after it.",
        differences(rows, before, after),
        source=f"{PAPER}, section 3.2",
        rule=f"test accuracy with BN before less with BN after, each at its best learning rate; {MARGIN:g} points less "
        "still count as as good",
        unit="percentage points",
        detail=f"{best_ends(rows, before)} before, {best_ends(rows, after)} after",
        paper="BN immediately before the nonlinearity",
        above=-MARGIN,
    )


def parameters_claim(rows: list[Row], options: Options) -> Claim:
    both, neither = (best(rows, named(SIGMOID, variant), options.rates) for variant in (BEFORE, NEITHER))
    return claim(
        "gamma-beta",
        "Without gamma and beta a sigmoid network loses: its inputs stay in the linear regime.",
        differences(rows, both, neither),
        source=f"{PAPER}, section 3",
        rule="test accuracy with gamma and beta less without both, each at its best learning rate",
        unit="percentage points",
        detail=f"{best_ends(rows, both)} with, {best_ends(rows, neither)} without; mean |gamma| of the last hidden "
        f"layer {average(values_at_end(rows, both, 'gamma')):.2f}",
        paper="simply normalizing each input of a layer may change what the layer can represent",
        above=0.0,
    )


def best_ends(rows: list[Row], name: str) -> str:
    return f"{average(accuracies(rows, name)):.2f} % (learning rate {split_rate(name)[1]:g})"


def variants(rows: list[Row], options: Options) -> Table:
    """Every variant at its best rate, with what its last hidden layer learned."""
    lines = []
    for activation in VARIANTS:
        for variant in VARIANTS[activation]:
            name = best(rows, named(activation, variant), options.rates)
            values = accuracies(rows, name)
            parts = [average(values_at_end(rows, name, field)) for field in ("gamma", "beta", "bias")]
            ends = [f"{split_rate(name)[1]:g}", f"{average(values):.2f} %", f"{min(values):.2f} to {max(values):.2f}"]
            lines.append([activation, variant, *ends, *(f"{part:.2g}" for part in parts)])
    columns = ["Nonlinearity", "BN", "best rate", "test accuracy", "seeds", "mean |gamma|", "|beta|", "|bias|"]
    caption = "After the last step; gamma, beta and bias of the last hidden layer, 1 and 0 where there is none."
    return Table("variants", "Every variant at its best learning rate", columns, lines, caption)


CAPTION = "Lines are means over the seeds, bands run from the lowest to the highest."
STUDY = Study(
    title="Where the normalization stands",
    options=Options(),
    quick={"steps": 40, "seeds": (0, 1), "rates": (1.0,), "evaluations": 1},
    notes=(
        "The paper puts BN before the nonlinearity and gives reasons, no comparison. Here: the network of its section "
        "4.1 on MNIST with sigmoids and with ReLUs, plain SGD, each variant at learning rates 0.1, 0.3, 1, 3, 10, "
        "compared at the best by its mean test accuracy, which flatters every variant alike.",
        "With BN after the nonlinearity the linear layer has its bias, and gamma and beta stand before the next layer.",
        "What others found is not of one kind: in the CaffeNet benchmark of ducha-aiki on ImageNet at 128 pixels, BN "
        "after the ReLU reached 0.499 and before it 0.474 (0.493 and 0.478 with gamma and beta). Networks as small as "
        "this one on MNIST do not settle it.",
        "'At least as good' allows 0.1 percentage points, 10 of the 10,000 test images, decided beforehand.",
    ),
    arms=arms,
    run=run,
    conclude=conclude,
)
