"""Sections 3.4 and 4.2.1 of the paper: batch normalization as a regularizer, against Dropout and L2.

"A training example is seen in conjunction with other examples in the mini-batch", so what the network computes for it
is not deterministic; Dropout "can be either removed or reduced in strength", and the weight of L2 was divided by 5.
Few training images, so that there is overfitting: a network with and without BN, with Dropout or L2 of some strengths.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from statistics import linear_regression

import torch
import torch.nn.functional as F
from torch import nn

from batchnorm.experiments.claims import Claim
from batchnorm.experiments.data.mnist import PIXELS, Mnist
from batchnorm.experiments.learning_rates import (
    accuracies,
    at_rate,
    average,
    best,
    differences,
    over,
    split_rate,
)
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
from batchnorm.nn import BatchNorm1d
from batchnorm.reference import batch_norm_train

PAPER = "Ioffe & Szegedy 2015"
COMPANIONS = "companions"
PLAIN, BN = "plain", "BN"
# What the paper names: Inception's 40 %, and the 10 % of some networks of the ensemble.
STRONG, WEAK = 0.4, 0.1
# of the plain network; a fifth of each is there for BN
DECAYS = (0.001, 0.005)
FIFTH = 5
BATCHES = (4, 8, 16, 32, 64, 128, 256)
DRAWS = 200
HIDDEN = 100
# percentage points of test accuracy, 10 of MNIST's 10,000 images
MARGIN = 0.1


@dataclasses.dataclass(frozen=True)
class Options:
    """Every variant is trained at each of ``rates`` and compared at its best; ``images`` of the training set."""

    steps: int = 2000
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7)
    rates: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0)
    images: int = 2000
    batch_size: int = 60
    init_std: float = 0.1
    evaluations: int = 4


def variants() -> list[str]:
    """All arms that are trained, but for their learning rates."""
    plain = [with_l2(PLAIN, decay) for decay in DECAYS]
    normalized = [with_l2(BN, decay) for decay in sorted({*DECAYS, *(decay / FIFTH for decay in DECAYS)})]
    dropped = [with_dropout(network, share) for network in (PLAIN, BN) for share in (WEAK, STRONG)]
    return [PLAIN, BN, *dropped, *plain, *normalized]


def with_dropout(network: str, share: float) -> str:
    return f"{network}, dropout {share:g}"


def with_l2(network: str, decay: float) -> str:
    return f"{network}, L2 {decay:g}"


def arms(options: Options) -> list[str]:
    return [COMPANIONS, *(at_rate(variant, rate) for variant in variants() for rate in options.rates)]


def run(arm: str, seed: int, options: Options, place: Place) -> Outcome:
    if arm == COMPANIONS:
        return Outcome(list(noise(seed, options)))
    variant, rate = split_rate(arm)
    network, _, regularizer = variant.partition(", ")
    kind, _, strength = regularizer.partition(" ")
    blocks = functools.partial(block, network=network, dropout=float(strength) if kind == "dropout" else 0.0)
    # of Dropout
    torch.manual_seed(seed)
    data = some_images(seed, options)
    task = MnistNetwork(
        mlp(seed, blocks, init_std=options.init_std),
        data,
        seed=seed,
        steps=options.steps,
        batch_size=options.batch_size,
        learning_rate=rate,
        weight_decay=float(strength) if kind == "L2" else 0.0,
        evaluations=options.evaluations,
        measure=functools.partial(on_training_images, data),
    )
    return task.train(place)


def block(n_in: int, n_out: int, network: str, dropout: float) -> nn.Sequential:
    """A hidden layer of ReLUs, and Dropout behind it."""
    last = [nn.Dropout(dropout)] if dropout else []
    if network == PLAIN:
        return nn.Sequential(nn.Linear(n_in, n_out), nn.ReLU(), *last)
    return nn.Sequential(nn.Linear(n_in, n_out, bias=False), BatchNorm1d(n_out, activation="relu"), *last)


def some_images(seed: int, options: Options) -> Mnist:
    """A part of the training images for every seed, the same for all arms, and all test images."""
    data = bundled_mnist()
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(data.train_labels), generator=generator)[: options.images]
    return data._replace(train_images=data.train_images[chosen], train_labels=data.train_labels[chosen])


def on_training_images(data: Mnist, model: nn.Module) -> dict[str, float]:
    scores = model(data.inputs(data.train_images))
    accuracy = (scores.argmax(1) == data.train_labels).double().mean().item()
    return {"train_accuracy": accuracy, "train_loss": F.cross_entropy(scores, data.train_labels).item()}


def noise(seed: int, options: Options) -> Iterator[Row]:
    """How much the normalized value of an image depends on the rest of its mini-batch: its variance over draws."""
    data, generator = bundled_mnist(), torch.Generator().manual_seed(seed)
    weight = options.init_std * torch.randn(PIXELS, HIDDEN, generator=generator)
    x = data.inputs(data.train_images[: 10 * DRAWS]) @ weight
    for batch_size in BATCHES:
        draws = torch.randint(1, len(x), (DRAWS, batch_size), generator=generator)
        draws[:, 0] = 0
        values = [batch_norm_train(x[chosen].double()).output[0] for chosen in draws]
        yield {"batch_size": batch_size, "variance": torch.stack(values).var(0).mean().item()}


def conclude(rows: list[Row], options: Options) -> Conclusion:
    chosen = {variant: best(rows, variant, options.rates) for variant in variants()}
    dropped = [
        over(rows, {share: chosen[name] for share, name in strengths(network).items()}, network)
        for network in (PLAIN, BN)
    ]
    losses = [
        line(rows, chosen[network], f"{part}_loss", name=f"{network}, {part}")
        for network in (PLAIN, BN)
        for part in ("train", "test")
    ]
    decays = [
        over(rows, {decay: chosen[with_l2(network, decay)] for decay in l2_of(network)}, network)
        for network in (PLAIN, BN)
    ]
    companions = line(rows, COMPANIONS, "variance", x="batch_size", name=BN)
    panels = [
        Panel("losses", "Loss without Dropout and L2", "steps", "loss", losses, y_log=True),
        Panel("dropout", "Test accuracy over Dropout", "share of units dropped", "percent", dropped),
        Panel("l2", "Test accuracy over L2", "weight decay", "percent", decays, x_log=True),
        Panel("companions", "What companions change", "batch size", "variance", [companions], True, True),
    ]
    claims = [noise_claim(rows), gap_claim(rows, chosen), *dropout_claims(rows, chosen), l2_claim(rows, chosen)]
    return Conclusion(claims, panels, [table(rows, chosen)], CAPTION)


def strengths(network: str) -> dict[float, str]:
    return {0.0: network, **{share: with_dropout(network, share) for share in (WEAK, STRONG)}}


def l2_of(network: str) -> list[float]:
    return [float(variant.rsplit(" ", 1)[1]) for variant in variants() if variant.startswith(f"{network}, L2")]


def noise_claim(rows: list[Row]) -> Claim:
    slopes = []
    for seed in sorted({row["seed"] for row in of_arm(rows, COMPANIONS)}):
        points = [(math.log(r["batch_size"]), math.log(r["variance"])) for r in of_arm(rows, COMPANIONS, seed)]
        slopes.append(linear_regression(*zip(*points, strict=True)).slope)
    return claim(
        "companions",
        "What BN computes for a training example depends on the others of its mini-batch, the less the larger it is.",
        [abs(slope + 1) for slope in slopes],
        source=f"{PAPER}, section 3.4",
        rule="|slope + 1| of the logarithm of the variance of an image's normalized values, over draws of the others, "
        "against that of the batch size: 0 if it goes with 1 / m",
        unit="of the slope",
        detail=f"slopes {', '.join(f'{slope:.2f}' for slope in slopes)}; {DRAWS} draws for every batch size, first "
        "layer, initial weights",
        paper="no longer producing deterministic values for a given training example",
        below=0.2,
    )


def gaps(rows: list[Row], name: str) -> list[float]:
    """Accuracy on the training images less that on the test images, in percentage points."""
    train, test = (values_at_end(rows, name, f"{part}_accuracy") for part in ("train", "test"))
    return [100 * (a - b) for a, b in zip(train, test, strict=True)]


def gap_claim(rows: list[Row], chosen: dict[str, str]) -> Claim:
    plain, bn = (gaps(rows, chosen[network]) for network in (PLAIN, BN))
    return claim(
        "gap",
        "BN regularizes: the gap between training and test accuracy is smaller with it.",
        [a - b for a, b in zip(plain, bn, strict=True)],
        source=f"{PAPER}, section 3.4",
        rule="accuracy on the training images less accuracy on the test images: without BN less with BN, each at its "
        "best learning rate, neither Dropout nor L2",
        unit="percentage points",
        detail=f"{average(plain):.2f} without BN, {average(bn):.2f} with it",
        paper="advantageous to the generalization of the network",
        above=0.0,
    )


def dropout_claims(rows: list[Row], chosen: dict[str, str]) -> Iterator[Claim]:
    """About Dropout at the better of its strengths for the network in question."""
    means = {variant: average(accuracies(rows, name)) for variant, name in chosen.items()}
    with_best = {
        network: max((with_dropout(network, share) for share in (WEAK, STRONG)), key=means.__getitem__)
        for network in (PLAIN, BN)
    }
    reduced = max((BN, with_dropout(BN, WEAK)), key=means.__getitem__)
    gains = [differences(rows, chosen[with_best[network]], chosen[network]) for network in (PLAIN, BN)]
    yield points_claim(
        "instead-of-dropout",
        "BN without Dropout is at least as accurate as the plain network with the better Dropout.",
        differences(rows, chosen[BN], chosen[with_best[PLAIN]]),
        rule=f"test accuracy of BN less that of the plain network with Dropout; {MARGIN:g} points less still count",
        detail=f"BN {means[BN]:.2f} %, {with_best[PLAIN]} {means[with_best[PLAIN]]:.2f} %, plain {means[PLAIN]:.2f} %",
        above=-MARGIN,
    )
    yield points_claim(
        "removed-or-reduced",
        f"With BN, Dropout of {STRONG:g} can be removed or reduced to {WEAK:g}.",
        differences(rows, chosen[reduced], chosen[with_dropout(BN, STRONG)]),
        rule=f"test accuracy of the better of the two less that with Dropout {STRONG:g}; {MARGIN:g} points less still "
        "count",
        detail=f"{reduced} {means[reduced]:.2f} %, BN with {STRONG:g} {means[with_dropout(BN, STRONG)]:.2f} %",
        above=-MARGIN,
    )
    yield points_claim(
        "dropout-brings-less",
        "Dropout brings less to a network with BN than to one without.",
        [a - b for a, b in zip(*gains, strict=True)],
        rule="gain in test accuracy by the better Dropout: of the plain network less that of BN",
        detail=f"plain {average(gains[0]):+.2f} by {with_best[PLAIN]}, BN {average(gains[1]):+.2f} by {with_best[BN]}",
        above=0.0,
    )


def points_claim(name: str, statement: str, values: list[float], *, rule: str, detail: str, above: float) -> Claim:
    """A claim about Dropout."""
    return claim(
        name,
        statement,
        values,
        source=f"{PAPER}, sections 3.4 and 4.2.1",
        rule=f"{rule}; each at its best learning rate",
        unit="percentage points",
        detail=detail,
        paper="Dropout can be either removed or reduced in strength",
        above=above,
    )


def l2_claim(rows: list[Row], chosen: dict[str, str]) -> Claim:
    def mean(decay: float) -> float:
        return average(accuracies(rows, chosen[with_l2(PLAIN, decay)]))

    decay = max(DECAYS, key=mean)
    whole, fifth = (chosen[with_l2(BN, value)] for value in (decay, decay / FIFTH))
    return claim(
        "l2-reduced",
        "With BN, a fifth of the L2 that suits the plain network gives a higher accuracy than all of it.",
        differences(rows, fifth, whole),
        source=f"{PAPER}, section 4.2.1",
        rule=f"test accuracy of BN with L2 / {FIFTH} less that with L2, the plain network's better one",
        unit="percentage points",
        detail=f"plain is better with L2 {decay:g}; BN {average(accuracies(rows, whole)):.2f} % with it, "
        f"{average(accuracies(rows, fifth)):.2f} % with a fifth",
        paper="this improves the accuracy on the held-out validation data",
        above=0.0,
    )


def table(rows: list[Row], chosen: dict[str, str]) -> Table:
    """Every variant at its best rate."""
    lines = []
    for variant, name in chosen.items():
        test, gap = accuracies(rows, name), average(gaps(rows, name))
        losses = [average(values_at_end(rows, name, f"{part}_loss")) for part in ("train", "test")]
        shown = [f"{average(test):.2f} %", f"{min(test):.2f} to {max(test):.2f}", f"{gap:.2f}"]
        lines.append([variant, f"{split_rate(name)[1]:g}", *shown, *(f"{loss:.3g}" for loss in losses)])
    columns = ["Network", "best rate", "test accuracy", "seeds", "gap, points", "training loss", "test loss"]
    return Table("variants", "Every variant at its best learning rate", columns, lines, "After the last step.")


CAPTION = (
    "Every network at its best learning rate. Lines are means over the seeds, bands run from the lowest to the highest."
)
STUDY = Study(
    title="Batch normalization, Dropout and L2",
    options=Options(),
    quick={"steps": 40, "seeds": (0, 1), "rates": (0.3,), "evaluations": 1},
    notes=(
        "The paper reports Inception on ImageNet: Dropout removed and L2 divided by 5 together with five other "
        "changes. Here: the network of its section 4.1 with ReLUs, on 2,000 training images so that it overfits, "
        "others for every seed, and all 10,000 test images.",
        "Dropout follows every hidden layer with 0.4, as in Inception, or 0.1, as in some networks of the paper's "
        "ensemble. L2 is SGD's weight decay of 0.001 or 0.005 on all weights, not on biases, gamma and beta.",
        "Each variant is compared at the best of the learning rates 0.1, 0.3, 1 and 3 by its mean test accuracy, "
        "which flatters every variant alike. All have the same number of steps, 60 epochs.",
        "'At least as good' allows 0.1 percentage points, 10 of the 10,000 test images, decided beforehand.",
    ),
    arms=arms,
    run=run,
    conclude=conclude,
)
