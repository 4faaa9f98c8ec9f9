"""Sections 2 and 3 of the paper: full whitening against BN, which normalizes every feature by itself.

What whitening costs over width and batch; whether it trains better; what a covariance of fewer examples than features
does to it; and what happens if the gradient ignores that mean and covariance depend on the parameters.
"""

import math
import statistics

from batchnorm.experiments.claims import Claim
from batchnorm.experiments.learning_rates import average
from batchnorm.experiments.study import Conclusion, Line, Panel, Row, Study, Table, claim, line, of_arm
from batchnorm.experiments.whitening_networks import (
    ARMS,
    BATCHES,
    BN,
    COST,
    GROUPS,
    LARGE,
    METHODS,
    OUTSIDE,
    RANK,
    REGULARIZED,
    SMALL_EPS,
    WIDTH,
    WIDTHS,
    ZCA,
    Options,
    arms,
    name_of,
    run,
)

PAPER, DBN = "Ioffe & Szegedy 2015", "Huang et al. 2018"
ACCURACY = "population_accuracy"
SHORT = {ZCA: "ZCA", GROUPS: "ZCA, groups", OUTSIDE: "ZCA, no gradient"}
Best = dict[str, list[list[Row]]]


def conclude(rows: list[Row], options: Options) -> Conclusion:
    best: Best = {arm: at_best_rate(of_arm(rows, arm)) for arm in ARMS}
    costs, ranks = of_arm(rows, COST), of_arm(rows, RANK)
    claims = [
        cost_claim(costs),
        growth_claim(costs),
        rank_claim(ranks),
        shrinkage_claim(best),
        gradient_claim(rows, best, options),
        correlation_claim(best),
        speed_claim(best, ZCA, "whitening-trains-faster"),
        speed_claim(best, GROUPS, "groups-train-faster"),
    ]
    tables = [cost_table(costs), rank_table(ranks), end_table(best)]
    return Conclusion(claims, panels(best, costs), tables, caption=CAPTION)


def at_best_rate(rows: list[Row]) -> list[list[Row]]:
    """The rows of each seed at the learning rate with the lowest mean training loss after the last step."""
    rates = dict.fromkeys(row["rate"] for row in rows)
    seeds = dict.fromkeys(row["seed"] for row in rows)
    found = [[[row for row in rows if (row["rate"], row["seed"]) == (rate, seed)] for seed in seeds] for rate in rates]

    def loss(runs: list[list[Row]]) -> float:
        ends = [run[-1]["train_loss"] for run in runs]
        return math.inf if None in ends else average(ends)

    return min(found, key=loss)


def last(runs: list[list[Row]], field: str) -> list[float]:
    """The last value of each seed; NaN where a network diverged."""
    return [math.nan if run[-1][field] is None else run[-1][field] for run in runs]


def percent(better: list[float], worse: list[float]) -> list[float]:
    """Differences by seed, in percentage points."""
    return [100 * (a - b) for a, b in zip(better, worse, strict=True)]


def by_seed(columns: list[list[float]]) -> list[float]:
    """Means over lists that have a value per seed."""
    return [average(column) for column in zip(*columns, strict=True)]


def ratios(costs: list[Row]) -> list[dict[tuple[int, int], float]]:
    """For each seed: how many of BN's steps a step of full ZCA takes, by width and batch."""
    found = []
    for seed in sorted({row["seed"] for row in costs}):
        of_seed = [row for row in costs if row["seed"] == seed]
        times = {(row["method"], row["width"], row["batch"]): row["milliseconds"] for row in of_seed}
        places = [(width, batch) for width in WIDTHS for batch in BATCHES]
        found.append({place: times[ZCA, *place] / times[BN, *place] for place in places})
    return found


def cost_claim(costs: list[Row]) -> Claim:
    found = ratios(costs)
    least, most = min(min(each.values()) for each in found), max(max(each.values()) for each in found)
    return claim(
        "whitening-is-expensive",
        "Full whitening costs more than normalizing each feature, at every width and batch size.",
        [math.log2(min(each.values())) for each in found],
        source=f"{PAPER}, section 3",
        rule="log2 of the time of a training step with ZCA / with BN, the least of all widths and batch sizes",
        unit="doublings",
        detail=f"{least:.1f} to {most:.1f} times",
        paper="whitening is expensive",
        above=0.0,
    )


def growth_claim(costs: list[Row]) -> Claim:
    narrow, wide = min(WIDTHS), max(WIDTHS)
    doublings = math.log2(wide / narrow)
    found = ratios(costs)
    ends = [statistics.median(each[width, batch] for each in found for batch in BATCHES) for width in (narrow, wide)]
    return claim(
        "cost-grows-with-width",
        "The wider the layer, the more expensive whitening is compared with BN.",
        [
            average([math.log2(each[wide, batch] / each[narrow, batch]) / doublings for batch in BATCHES])
            for each in found
        ],
        source="d^3 operations of a decomposition against d of BN",
        rule=f"growth of log2(time with ZCA / time with BN) per doubling of the width, from {narrow} to {wide}, mean "
        "over batch sizes",
        unit="doublings",
        detail=f"{ends[0]:.1f} times at width {narrow}, {ends[1]:.1f} times at {wide} (medians)",
        above=0.0,
    )


def rank_claim(ranks: list[Row]) -> Claim:
    few = [row for row in ranks if row["batch"] <= row["width"]]
    seeds = sorted({row["seed"] for row in few})
    return claim(
        "few-examples-are-singular",
        "The covariance of no more examples than features is singular.",
        [float(max(row["rank"] - row["batch"] + 1 for row in few if row["seed"] == seed)) for seed in seeds],
        source=f"{PAPER}, section 3",
        rule="rank of the covariance less m - 1, the largest of all widths and batches of m up to the width",
        unit="of the rank",
        detail=", ".join(f"width {row['width']}, m {row['batch']}: rank {row['rank']}" for row in few[: len(few) // 3]),
        paper="singular covariance matrices",
        below=0.5,
    )


def shrinkage_claim(best: Best) -> Claim:
    plain, _, *shrunk = (last(best[name_of(method, min(BATCHES))], ACCURACY) for method in REGULARIZED)
    names = [method.removeprefix("ZCA, ") for method in REGULARIZED if "shrinkage" in method]
    ends = [f"{name} {average(values):.1%}" for name, values in zip(names, shrunk, strict=True)]
    return claim(
        "singular-needs-regularization",
        "Where the covariance is singular, whitening needs regularization.",
        by_seed([percent(values, plain) for values in shrunk]),
        source=f"{PAPER}, section 3",
        rule=f"test accuracy by population statistics of ZCA at a batch of {min(BATCHES)} with shrinkage less that "
        f"without, mean over two amounts of it; eps {SMALL_EPS:g}",
        unit="percentage points",
        detail=f"without {average(plain):.1%}, {', '.join(ends)}",
        paper="regularization would be required",
        above=0.0,
    )


def gradient_claim(rows: list[Row], best: Best, options: Options) -> Claim:
    """Over all rates, not each at its best: the claim is that training cannot be trusted."""
    differences = []
    for batch in BATCHES:
        inside, outside = (
            [row for row in of_arm(rows, name_of(method, batch)) if row["step"] == options.steps]
            for method in (ZCA, OUTSIDE)
        )
        for rate in options.rates:
            pair = [[row[ACCURACY] for row in side if row["rate"] == rate] for side in (inside, outside)]
            differences.append(percent(*pair))
    large = [best[name_of(method, LARGE)] for method in (ZCA, OUTSIDE)]
    sizes, ends = ([average(last(runs, field)) for runs in large] for field in ("weight_size", ACCURACY))
    return claim(
        "gradient-must-pass",
        "Whitening that the gradient ignores trains worse.",
        by_seed(differences),
        source=f"{PAPER}, section 2",
        rule="test accuracy by population statistics of ZCA with the gradient through mean and covariance less that "
        "without, mean over batch sizes and learning rates",
        unit="percentage points",
        detail=f"batch {LARGE}, best rates: {ends[0]:.1%} and {ends[1]:.1%}; |W| {sizes[0]:.3g} and {sizes[1]:.3g}",
        paper="the model blows up",
        above=0.0,
    )


def correlation_claim(best: Best) -> Claim:
    after = [last(best[name_of(method, LARGE)], "correlation_after") for method in (BN, ZCA)]
    before = last(best[name_of(BN, LARGE)], "correlation_before")
    return claim(
        "bn-leaves-correlations",
        "BN leaves features correlated, whitening does not.",
        [math.log2(plain / whitened) for plain, whitened in zip(*after, strict=True)],
        source=f"{PAPER}, section 3",
        rule="log2 of the correlation between features after BN / after ZCA, root mean square over the last hidden "
        f"layer at the end of training in batches of {LARGE}; at least a factor of two",
        unit="doublings",
        detail=f"before BN {average(before):.3f}, after it {average(after[0]):.3f}, after ZCA {average(after[1]):.3f}",
        paper="even when the features are not decorrelated",
        above=1.0,
    )


def speed_claim(best: Best, method: str, name: str) -> Claim:
    plain, whitened = (last(best[name_of(each, LARGE)], "train_loss") for each in (BN, method))
    return claim(
        name,
        f"Step by step, {method} trains faster than BN.",
        [math.log(a / b) for a, b in zip(plain, whitened, strict=True)],
        source=DBN,
        rule=f"logarithm of the training loss with BN / with {method} after all steps at a batch of {LARGE}, each at "
        "its best learning rate",
        unit="of ln(loss)",
        detail=f"loss with BN {average(plain):.3f}, with {method} {average(whitened):.3f}",
        paper="whitening improves training further",
        above=0.0,
    )


def panels(best: Best, costs: list[Row]) -> list[Panel]:
    def short(method: str) -> str:
        return SHORT.get(method, method)

    at_large = [row | {"arm": row["method"]} for row in costs if row["batch"] == LARGE]
    cost = [line(at_large, method, "milliseconds", x="width", name=short(method)) for method in METHODS]
    losses, times, accuracies = [], [], []
    for method in METHODS:
        runs = [row | {"arm": method} for run in best[name_of(method, LARGE)] for row in run]
        curve = line(runs, method, "train_loss", name=short(method))
        step = statistics.median(row["milliseconds"] for row in of_arm(at_large, method) if row["width"] == WIDTH)
        losses.append(curve)
        times.append(Line(curve.name, [x * step for x in curve.x], curve.y, curve.low, curve.high))
        ends = [row | {"arm": method} for batch in BATCHES for row in map(end, best[name_of(method, batch)])]
        accuracies.append(line(ends, method, ACCURACY, x="batch", name=short(method)))
    return [
        Panel("cost", f"A step in batches of {LARGE}", "width", "milliseconds", cost, True, True),
        Panel("accuracy", f"Accuracy at a width of {WIDTH}", "batch size", "test accuracy", accuracies, True),
        Panel("steps", f"Training in batches of {LARGE}", "steps", "training loss", losses),
        Panel("time", "The same over time", "milliseconds", "training loss", times),
    ]


def end(run: list[Row]) -> Row:
    return run[-1]


def cost_table(costs: list[Row]) -> Table:
    """Medians over the seeds."""
    places = [(width, batch) for width in WIDTHS for batch in BATCHES]
    lines = []
    for method in METHODS:
        found = [
            [row["milliseconds"] for row in costs if (row["method"], row["width"], row["batch"]) == (method, *place)]
            for place in places
        ]
        lines.append([method, *(f"{statistics.median(values):.2f}" for values in found)])
    columns = ["Method", *(f"{width} x {batch}" for width, batch in places)]
    caption = "Forward, backward and SGD of three hidden layers, processor time in milliseconds, by width x batch."
    return Table("cost", "Cost of a training step", columns, lines, caption)


def rank_table(ranks: list[Row]) -> Table:
    lines = []
    for width in WIDTHS:
        found = [[row["rank"] for row in ranks if (row["width"], row["batch"]) == (width, batch)] for batch in BATCHES]
        lines.append([f"{width}", *(f"{min(values)} to {max(values)}" for values in found)])
    columns = ["Width", *(f"batch {batch}" for batch in BATCHES)]
    return Table("ranks", "Rank of the covariance", columns, lines, "Of the first hidden layer, over the seeds.")


def end_table(best: Best) -> Table:
    """How the networks ended, mean over the seeds."""
    fields = {
        ACCURACY: ".1%",
        "test_accuracy": ".1%",
        "train_loss": ".3f",
        "correlation_before": ".3f",
        "correlation_after": ".3f",
        "weight_size": ".3g",
    }
    lines = []
    for arm, runs in best.items():
        means = [format(average(last(runs, field)), form) for field, form in fields.items()]
        lines.append([arm, f"{runs[0][0]['rate']:g}", *means])
    headings = ["test accuracy", "by averages", "training loss", "correlation before", "after", "|W|"]
    columns = ["Arm", "best rate", *headings]
    caption = "Correlation: root mean square between the features of the last hidden layer, before and after the layer."
    return Table("ends", "How the networks ended", columns, lines, caption)


CAPTION = (
    "Three hidden layers of sigmoids. Training loss: of fixed training images, normalized in batches as in training. "
    "Accuracy: by population statistics. "
    "Each method at its best learning rate; lines are means over the seeds, bands run from the lowest to the highest."
)
STUDY = Study(
    title="Whitening",
    options=Options(),
    quick={
        "steps": 10,
        "seeds": (0, 1),
        "rates": (2.0,),
        "rounds": 1,
        "evaluations": 1,
        "measured_images": 256,
        "population_images": 256,
        "test_images": 200,
    },
    notes=(
        "The paper gives the argument against full whitening, its cost, its derivatives and singular covariances, and "
        "no measurement. Here: MNIST, the network of its section 4.1 with 32, 64 or 128 features, few steps of SGD.",
        "Each arm is trained at each rate of a short grid and counts with the one that has the lowest training loss "
        "after the last step; the claim about the ignored gradient takes all rates.",
        f"BN and whitening add the same eps of 0.001 to variances and covariances. It decides what a singular "
        f"covariance does, so ZCA at a batch of {min(BATCHES)} is also trained with other eps and with shrinkage.",
        "Test accuracy is of a part of the test images, by population statistics of 2,048 training images in the "
        "training's batches. Running averages (momentum 0.1) lag behind a covariance that moves with the weights.",
        "Times are processor time, the methods taking turns, medians. Covariances are decomposed in "
        "float64, for every method of whitening.",
    ),
    arms=arms,
    run=run,
    conclude=conclude,
)
