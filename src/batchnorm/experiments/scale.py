"""Section 3.3 of the paper: normalization does not see the scale of the weights before it.

Four identities, on MNIST in float64: BN((aW)u) = BN(Wu), the same gradient for u, 1 / a of the gradient for W, and so
no gradient along W. Then what follows in training, according to van Laarhoven 2017: weights grow with every step, so
the effective learning rate falls, unless L2 keeps it. And that training is "more resilient to the parameter scale".
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from batchnorm.experiments.claims import Claim
from batchnorm.experiments.data.mnist import PIXELS
from batchnorm.experiments.learning_rates import accuracies, at_rate, average, best, over, split_rate
from batchnorm.experiments.mnist_network import MnistNetwork, bundled_mnist, mlp
from batchnorm.experiments.study import (
    Conclusion,
    Line,
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

PAPER = "Ioffe & Szegedy 2015, section 3.3"
LAARHOVEN = "van Laarhoven 2017, arXiv:1706.05350"
IDENTITIES = {"eps 0": 0.0, "eps 1e-5": 1e-5}
FACTORS = (0.001, 0.01, 0.1, 10.0, 100.0, 1000.0)
FIELDS = ("output", "grad_input", "grad_weight")
BN, DECAYED, PLAIN = "BN", "BN with L2", "plain"
# of the networks whose weights are followed
RATE = 0.5
ROUNDING = 1e-10
HIDDEN = 100


@dataclasses.dataclass(frozen=True)
class Options:
    """``init_std`` of all weights; those of hidden layers are multiplied by each of ``scales``."""

    steps: int = 3000
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    batch_size: int = 60
    rates: tuple[float, ...] = (0.5, 2.0, 8.0)
    scales: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0, 10.0)
    init_std: float = 0.1
    weight_decay: float = 2e-3
    eps: float = 1e-5
    evaluations: int = 12


def arms(options: Options) -> list[str]:
    trained = [
        at_rate(scaled(kind, scale), rate) for kind in (PLAIN, BN) for scale in options.scales for rate in options.rates
    ]
    return [*IDENTITIES, *trained, *(at_rate(scaled(DECAYED, scale), RATE) for scale in options.scales)]


def scaled(kind: str, scale: float) -> str:
    """The name of an arm, but for its learning rate."""
    return f"{kind}, scale {scale:g}"


def run(arm: str, seed: int, options: Options, place: Place) -> Outcome:
    if arm in IDENTITIES:
        return Outcome(list(compare(IDENTITIES[arm], seed, options)))
    name, rate = split_rate(arm)
    kind, scale = name.split(", scale ")
    return train_network(kind, float(scale), rate, seed, options, place)


def compare(eps: float, seed: int, options: Options) -> Iterator[Row]:
    """How far BN((aW)u) and its gradients are from what BN(Wu) without eps says they are."""
    data, generator = bundled_mnist(), torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(data.train_labels), generator=generator)[: options.batch_size]
    u = data.inputs(data.train_images[chosen]).double()
    weight = options.init_std * torch.randn(HIDDEN, PIXELS, dtype=torch.float64, generator=generator)
    grad_output = torch.randn(len(u), HIDDEN, dtype=torch.float64, generator=generator)
    output, grad_input, grad_weight = layer(u, weight, grad_output, 0.0)
    for factor in (sign * factor for sign in (1, -1) for factor in FACTORS):
        found = layer(u, factor * weight, grad_output, eps)
        sign = math.copysign(1, factor)
        expected = (sign * output, sign * grad_input, grad_weight / abs(factor))
        deviations = ((a - b).norm() / b.norm() for a, b in zip(found, expected, strict=True))
        cosines = torch.cosine_similarity(found[2], weight, dim=1)
        row = dict(zip(FIELDS, (deviation.item() for deviation in deviations), strict=True))
        yield {"factor": factor, **row, "along_weight": cosines.abs().max().item()}


def layer(u: Tensor, weight: Tensor, grad_output: Tensor, eps: float) -> list[Tensor]:
    """Output of BN(Wu), and the gradients of u and W."""
    u, weight = u.clone().requires_grad_(), weight.clone().requires_grad_()
    output = batch_norm_train(u @ weight.T, eps=eps).output
    return [output.detach(), *torch.autograd.grad(output, (u, weight), grad_output)]


def train_network(kind: str, scale: float, rate: float, seed: int, options: Options, place: Place) -> Outcome:
    """A network whose hidden layers begin ``scale`` times as large; W is the matrix of the last of them."""

    def block(n_in: int, n_out: int) -> nn.Module:
        if kind == PLAIN:
            return nn.Sequential(nn.Linear(n_in, n_out), nn.Sigmoid())
        normalization = BatchNorm1d(n_out, eps=options.eps, activation="sigmoid")
        return nn.Sequential(nn.Linear(n_in, n_out, bias=False), normalization)

    model = mlp(seed, block, init_std=options.init_std)
    hidden = [module.weight for module in model.modules() if isinstance(module, nn.Linear)][:-1]
    with torch.no_grad():
        for weight in hidden:
            weight *= scale
    # in the checkpoint with the model
    stepped = torch.zeros((), dtype=torch.float64)
    model.register_buffer("stepped", stepped)
    task = MnistNetwork(
        model,
        bundled_mnist(),
        seed=seed,
        steps=options.steps,
        batch_size=options.batch_size,
        learning_rate=rate,
        weight_decay=options.weight_decay if kind == DECAYED else 0.0,
        evaluations=options.evaluations,
        measure=lambda model: sizes(hidden[-1], rate, stepped),
    )

    def add_step(*_: object) -> None:
        assert hidden[-1].grad is not None
        stepped.add_((rate * hidden[-1].grad.norm()) ** 2)

    task.optimizer.register_step_post_hook(add_step)
    return task.train(place)


def sizes(weight: Tensor, rate: float, stepped: Tensor) -> dict[str, float]:
    """|W|, the learning rate over its square, and the sum of the squared steps, lr^2 |gradient|^2, so far."""
    square = weight.double().square().sum().item()
    return {"size": math.sqrt(square), "effective_rate": rate / square, "stepped": stepped.item()}


def conclude(rows: list[Row], options: Options) -> Conclusion:
    deviations = [
        of_factors(rows, arm, field, f"{words}, {arm}")
        for field, words in (("output", "output"), ("grad_weight", "gradient of W"))
        for arm in IDENTITIES
    ]
    followed = [(kind, scale) for scale in (0.1, 1.0, 10.0) for kind in (BN, DECAYED)]
    weights, effective = (
        [line(rows, at_rate(scaled(*pair), RATE), field, name=f"{pair[0]}, a = {pair[1]:g}") for pair in followed]
        for field in ("size", "effective_rate")
    )
    chosen = {(way, kind): choose(rows, kind, options) for way, choose in WAYS.items() for kind in (BN, PLAIN)}
    resilience = [
        over(rows, dict(zip(options.scales, names, strict=True)), f"{kind}, {way}")
        for (way, kind), names in chosen.items()
    ]
    panels = [
        Panel("identities", "How far BN(aWu) is from BN(Wu)", "a", "relative deviation", deviations, True, True),
        Panel("weights", f"W at learning rate {RATE:g}", "steps", "|W|", weights, y_log=True),
        Panel("effective", "Effective learning rate", "steps", "learning rate / |W|^2", effective, y_log=True),
        Panel("resilience", "Test accuracy", "scale of the initial weights", "percent", resilience, x_log=True),
    ]
    claims = [*identity_claims(rows), growth_claim(rows), effective_claim(rows), forgotten_claim(rows, options)]
    claims += [resilience_claim(rows, way, chosen[way, PLAIN], chosen[way, BN]) for way in WAYS]
    return Conclusion(claims, panels, [ends(rows, options)], CAPTION)


def of_factors(rows: list[Row], arm: str, field: str, name: str) -> Line:
    return line([row for row in of_arm(rows, arm) if row["factor"] > 0], arm, field, x="factor", name=name)


def one_rate(rows: list[Row], kind: str, options: Options) -> list[str]:
    """The arms of all scales at the one rate that is best for them together."""
    choices = [[at_rate(scaled(kind, scale), rate) for scale in options.scales] for rate in options.rates]
    return max(choices, key=lambda names: average([average(accuracies(rows, name)) for name in names]))


def best_rates(rows: list[Row], kind: str, options: Options) -> list[str]:
    """The arms of all scales, each at its own best rate."""
    return [best(rows, scaled(kind, scale), options.rates) for scale in options.scales]


WAYS = {"one rate": one_rate, "best rates": best_rates}


def largest(rows: list[Row], sign: int, fields: Sequence[str]) -> list[float]:
    """The largest deviation without eps over all factors of a sign, for every seed."""
    exact = [row for row in of_arm(rows, "eps 0") if row["factor"] * sign > 0]
    seeds = sorted({row["seed"] for row in exact})
    return [max(row[field] for row in of_arm(exact, "eps 0", seed) for field in fields) for seed in seeds]


def identity_claims(rows: list[Row]) -> Iterator[Claim]:
    for name, statement, sign, fields, paper in (
        ("same-output", "BN((aW)u) = BN(Wu) for a > 0.", 1, ["output"], "BN(Wu) = BN((aW)u)"),
        ("same-gradient", "The gradient of u does not change.", 1, ["grad_input"], "the same layer Jacobian"),
        ("inverse-gradient", "The gradient of aW is 1 / a of that of W.", 1, ["grad_weight"], "1 / a"),
        ("negative", "For a < 0 output and gradient of u change sign, and W's is 1 / |a|.", -1, FIELDS, None),
        ("orthogonal", "So no gradient points along the weights of a neuron.", 1, ["along_weight"], None),
    ):
        what = "|cosine| of a neuron's weights and their gradient" if name == "orthogonal" else "relative deviation"
        yield claim(
            name,
            statement,
            largest(rows, sign, fields),
            source=LAARHOVEN if name == "orthogonal" else PAPER,
            rule=f"largest {what}, over all a",
            unit="relative",
            detail=f"|a| = {', '.join(f'{factor:g}' for factor in FACTORS)}; float64, eps 0: rounding is left",
            paper=paper,
            below=ROUNDING,
        )


def growth_claim(rows: list[Row]) -> Claim:
    name = at_rate(scaled(BN, 1.0), RATE)
    first = [row for row in of_arm(rows, name) if row["step"] == 0]
    grown = [end**2 - row["size"] ** 2 for row, end in zip(first, values_at_end(rows, name, "size"), strict=True)]
    squares = values_at_end(rows, name, "stepped")
    factors = [math.sqrt(1 + by / row["size"] ** 2) for by, row in zip(grown, first, strict=True)]
    return claim(
        "weights-grow",
        "Without L2, every step makes the weights longer: |W|^2 grows by the square of the step.",
        [abs(by / square - 1) for by, square in zip(grown, squares, strict=True)],
        source=LAARHOVEN,
        rule="|growth of |W|^2 over the training / sum of lr^2 |gradient|^2 over its steps - 1|",
        unit="relative",
        detail=f"|W| after the training / before it: {', '.join(f'{factor:.3g}' for factor in factors)}",
        below=0.01,
    )


def effective_claim(rows: list[Row]) -> Claim:
    without, decayed = (
        [RATE / size**2 for size in values_at_end(rows, at_rate(scaled(kind, 1.0), RATE), "size")]
        for kind in (BN, DECAYED)
    )
    return claim(
        "effective-rate",
        "L2 keeps up the effective learning rate, which falls without it.",
        [math.log10(b / a) for a, b in zip(without, decayed, strict=True)],
        source=LAARHOVEN,
        rule="logarithm of lr / |W|^2 after the training with L2 / the same without it",
        unit="powers of ten",
        detail=f"lr / |W|^2 {shown(without)} without L2, {shown(decayed)} with it",
        above=0.0,
    )


def forgotten_claim(rows: list[Row], options: Options) -> Claim:
    spreads = []
    for kind in (BN, DECAYED):
        columns = [values_at_end(rows, at_rate(scaled(kind, scale), RATE), "size") for scale in options.scales]
        spreads.append([spread([math.log10(size) for size in sizes]) for sizes in zip(*columns, strict=True)])
    return claim(
        "scale-forgotten",
        "L2 sets the length of the weights, wherever they began.",
        [decayed - without for without, decayed in zip(*spreads, strict=True)],
        source=LAARHOVEN,
        rule="logarithm of the largest |W| / the smallest, over the initial scales, after the training: with L2 less "
        "without it",
        unit="powers of ten",
        detail=f"{shown(spreads[0])} without L2, {shown(spreads[1])} with it; "
        f"{spread([math.log10(scale) for scale in options.scales]):g} before the training",
        below=0.0,
    )


def spread(values: Sequence[float]) -> float:
    """Highest less lowest; NaN if there is one, which max and min would pass over."""
    return max(values) - min(values) if all(map(math.isfinite, values)) else math.nan


def resilience_claim(rows: list[Row], way: str, plain: list[str], bn: list[str]) -> Claim:
    columns = [zip(*(accuracies(rows, name) for name in names), strict=True) for names in (plain, bn)]
    without, normalized = ([spread(values) for values in seeds] for seeds in columns)
    rates = "the one learning rate that is best for all scales" if way == "one rate" else "each scale's best rate"
    return claim(
        f"resilient-{way.replace(' ', '-')}",
        f"With BN the accuracy depends less on the initial scale of the weights, at {rates}.",
        [a - b for a, b in zip(without, normalized, strict=True)],
        source=PAPER,
        rule="highest less lowest test accuracy over the initial scales: without BN less with BN",
        unit="percentage points",
        detail=f"{shown(without)} without BN, {shown(normalized)} with it",
        paper="more resilient to the parameter scale",
        above=0.0,
    )


def ends(rows: list[Row], options: Options) -> Table:
    """How the networks ended at the best rate of each scale, and how long W was at the rate where it is followed."""
    lines = []
    for kind in (PLAIN, BN, DECAYED):
        for scale in options.scales:
            arm = scaled(kind, scale)
            name = at_rate(arm, RATE) if kind == DECAYED else best(rows, arm, options.rates)
            size = average(values_at_end(rows, at_rate(arm, RATE), "size"))
            lines.append(
                [
                    kind,
                    f"{scale:g}",
                    f"{split_rate(name)[1]:g}",
                    f"{average(accuracies(rows, name)):.2f} %",
                    f"{size:.3g}",
                ]
            )
    columns = ["Network", "initial scale", "best rate", "test accuracy", f"|W| at rate {RATE:g}"]
    return Table("networks", "The networks", columns, lines, "Means over the seeds, after the last step.")


def shown(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.3g}" for value in values)


CAPTION = (
    "Deviations: one layer on one mini-batch, in float64, from what the identities say without eps. W: the weights of "
    "the last hidden layer. Lines are means over the seeds, bands run from the lowest to the highest."
)
STUDY = Study(
    title="The scale of the weights",
    options=Options(),
    quick={"steps": 40, "seeds": (0, 1), "rates": (0.5,), "scales": (0.1, 1.0, 10.0), "evaluations": 1},
    notes=(
        "The paper writes 'for a scalar a'. The identities hold for a > 0 without eps; for a < 0 output and gradient "
        "of u change their signs, which a claim of its own checks. With eps they hold where a^2 Var[Wu] is far above "
        "eps: the figure shows how far.",
        "The paper gives no experiment for 'more resilient to the parameter scale'. Here: the network of its section "
        "4.1 on MNIST, plain SGD, hidden weights drawn at 0.1 to 10 times the standard deviation 0.1, the output layer "
        "always at 0.1. What decides is the learning rate, so both networks have 0.5, 2 and 8 to choose from by "
        "their test accuracy: one for all scales, or the best for each scale.",
        "L2 is SGD's weight decay of 0.002 on all weights, the output layer's included: at learning rate 0.5 the "
        "initial weights fade with a time constant of 1,000 steps. All of this is plain SGD; momentum changes it.",
    ),
    arms=arms,
    run=run,
    conclude=conclude,
)
