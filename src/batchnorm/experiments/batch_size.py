"""Batches of 2 to 512: what BN, Ghost BN and Batch Renorm lose or win, and which statistics evaluate it.

Every network of the sweep sees the same number of images, whatever its batch. Ghost BN's claim is about large batches
and long training, so batches of 512 are also trained 15 times as long. How the noise of a batch mean falls with the
batch is measured on networks that are not trained.
"""

import math
from statistics import linear_regression

from batchnorm.experiments.batch_size_networks import (
    ARMS,
    BATCHES,
    BN,
    BY_AVERAGES,
    BY_BATCH,
    BY_DEFAULT,
    BY_LARGE,
    BY_POPULATION,
    GHOST,
    LARGE,
    NOISE,
    RENORMED,
    Options,
    arms,
    run,
)
from batchnorm.experiments.claims import Claim
from batchnorm.experiments.study import Conclusion, Line, Panel, Row, Study, Table, claim, line, of_arm

WU, RENORM, HOFFER = "Wu & Johnson 2021", "Ioffe 2017", "Hoffer, Hubara & Soudry 2017"
STATISTICS = {
    BY_BATCH: "mini-batch",
    BY_DEFAULT: "momentum 0.1",
    BY_AVERAGES: "averages, 320 images",
    BY_POPULATION: "population, batches of m",
    BY_LARGE: "population, of 1,000",
}
Best = dict[str, list[Row]]


def conclude(rows: list[Row], options: Options) -> Conclusion:
    best = {arm: at_best_rate(of_arm(rows, arm)) for arm in ARMS}
    noise = of_arm(rows, NOISE)
    swept = [row | {"arm": arm.method} for name, arm in ARMS.items() if not arm.long for row in best[name]]
    methods = {BN: BN, RENORMED: RENORMED} | {method: f"Ghost of {size}" for method, size in GHOST.items()}

    def lines(field: str) -> list[Line]:
        return [line(swept, method, field, x="batch", name=short) for method, short in methods.items()]

    def panel(name: str, title: str, lines: list[Line]) -> Panel:
        return Panel(name, title, "batch size", "test accuracy", lines, x_log=True)

    statistics = [line(swept, BN, field, x="batch", name=name) for field, name in STATISTICS.items()]
    noises = [
        line(noise, NOISE, "noise_of_mean", x="batch", name="mean"),
        line(noise, NOISE, "noise_of_var", x="batch", name="variance"),
        Line("1 / m", BATCHES, [1 / batch for batch in BATCHES]),
    ]
    panels = [
        panel("averages", "With running averages", lines(BY_AVERAGES)),
        panel("population", "With population statistics", lines(BY_POPULATION)),
        panel("statistics", "BN under other statistics", statistics),
        Panel("noise", "Noise of the statistics", "batch size", "squared relative error", noises, True, True),
    ]
    claims = [
        small_claim(best),
        disagreement_claim(best),
        population_claim(best),
        renorm_claim(best),
        ghost_claim(best),
        noise_claim(noise),
    ]
    return Conclusion(claims, panels, [table(best)], caption=CAPTION)


def at_best_rate(rows: list[Row]) -> list[Row]:
    """The rows, one per seed, of the learning rate with the highest mean accuracy on validation images."""
    by_rate: dict[float, list[Row]] = {}
    for row in rows:
        by_rate.setdefault(row["rate"], []).append(row)
    return max(by_rate.values(), key=lambda found: math.fsum(row["validation_accuracy"] for row in found))


def percent(better: list[Row], worse: list[Row], field: str, other: str | None = None) -> list[float]:
    """Differences by seed, in percentage points."""
    return [100 * (a[field] - b[other or field]) for a, b in zip(better, worse, strict=True)]


def averaged(*values: list[float]) -> list[float]:
    """Means by seed."""
    return [math.fsum(column) / len(column) for column in zip(*values, strict=True)]


def shown(rows: list[Row], field: str) -> str:
    return f"{math.fsum(row[field] for row in rows) / len(rows):.1%}"


def small_claim(best: Best) -> Claim:
    small, reference = best["BN, batch 2"], best["BN, batch 32"]
    return claim(
        "small-batches-hurt",
        "BN loses accuracy when the batch is as small as 2.",
        percent(reference, small, BY_AVERAGES),
        source=f"{RENORM}; {WU}",
        rule="test accuracy with running averages at a batch of 32 less that at 2, each at its best learning rate",
        unit="percentage points",
        detail=f"batch 32 {shown(reference, BY_AVERAGES)}, batch 2 {shown(small, BY_AVERAGES)}",
        paper="small batches diminish its effect",
        above=0.0,
    )


def disagreement_claim(best: Best) -> Claim:
    sides = [best[f"BN, batch {batch}"] for batch in BATCHES]
    x = [math.log2(batch) for batch in BATCHES]
    # a disagreement of none of the images counts as that of half an image
    floor = 0.5 / min(row["images_compared"] for side in sides for row in side)
    values = [
        linear_regression(x, [math.log2(max(row["disagreement"], floor)) for row in column]).slope
        for column in zip(*sides, strict=True)
    ]
    return claim(
        "modes-disagree",
        "The smaller the batch, the more BN differs between training and evaluation.",
        values,
        source=f"{RENORM}; {WU}",
        rule="slope of log2 of the share of test images that the statistics of their mini-batch and of the population "
        "classify differently, over log2 of the batch",
        unit="per doubling",
        detail=f"batch 2 {shown(sides[0], 'disagreement')}, batch 512 {shown(sides[-1], 'disagreement')} of the images",
        below=0.0,
    )


def population_claim(best: Best) -> Claim:
    sides = [best[f"BN, batch {batch}"] for batch in (2, 4, 8)]
    gains = [shown(side, BY_DEFAULT) + " to " + shown(side, BY_POPULATION) for side in sides]
    return claim(
        "population-beats-averages",
        "Population statistics measured with frozen weights evaluate BN better than running averages.",
        averaged(*(percent(side, side, BY_POPULATION, BY_DEFAULT) for side in sides)),
        source=f"{WU}; Ioffe & Szegedy 2015, Algorithm 2",
        rule="test accuracy with population statistics less that with averages of momentum 0.1, mean over batches of "
        "2, 4 and 8",
        unit="percentage points",
        detail=f"batches of 2, 4, 8: {', '.join(gains)}",
        above=0.0,
    )


def renorm_claim(best: Best) -> Claim:
    pairs = [(best[f"{RENORMED}, batch {batch}"], best[f"BN, batch {batch}"]) for batch in (2, 4)]
    sides = [f"{shown(renorm, BY_AVERAGES)} and {shown(plain, BY_AVERAGES)}" for renorm, plain in pairs]
    return claim(
        "renorm-helps-small-batches",
        "Batch Renorm loses less than BN at the smallest batches.",
        averaged(*(percent(renorm, plain, BY_AVERAGES) for renorm, plain in pairs)),
        source=RENORM,
        rule="test accuracy of Batch Renorm less that of BN, both with running averages, mean over batches of 2 and 4",
        unit="percentage points",
        detail=f"Batch Renorm and BN at batch 2: {sides[0]}; at batch 4: {sides[1]}",
        paper="better than BN",
        above=0.0,
    )


def ghost_claim(best: Best) -> Claim:
    plain, *ghosts = (best[f"{method}, batch {LARGE}, long"] for method in (BN, *GHOST))
    ends = [f"{method} {shown(rows, BY_AVERAGES)}" for method, rows in zip((BN, *GHOST), (plain, *ghosts), strict=True)]
    return claim(
        "ghost-generalizes",
        "Ghost BN generalizes better than BN in large batches.",
        averaged(*(percent(ghost, plain, BY_AVERAGES) for ghost in ghosts)),
        source=HOFFER,
        rule=f"test accuracy at a batch of {LARGE}, trained long, less that of BN, mean over the two ghost batches",
        unit="percentage points",
        detail=", ".join(ends),
        paper="a significant decrease in the generalization gap",
        above=0.0,
    )


def noise_claim(noise: list[Row]) -> Claim:
    seeds = sorted({row["seed"] for row in noise})
    runs = [of_arm(noise, NOISE, seed) for seed in seeds]
    slopes = [
        linear_regression(
            [math.log(row["batch"]) for row in run], [math.log(row["noise_of_mean"]) for row in run]
        ).slope
        for run in runs
    ]
    return claim(
        "noise-falls",
        "The variance of a batch mean falls as 1 / m.",
        [abs(found + 1) for found in slopes],
        source="the variance of a mean of m independent values",
        rule="distance from -1 of the slope of log(variance of batch means) over log m, of the first layer, batches of "
        f"{BATCHES[0]} to {BATCHES[-1]}",
        unit="exponent",
        detail=f"slopes {', '.join(f'{found:.3f}' for found in slopes)}",
        paper="exponent -1",
        below=0.05,
    )


def table(best: Best) -> Table:
    """How the networks of all arms ended."""
    fields = (BY_AVERAGES, BY_POPULATION, BY_BATCH, "disagreement")
    lines = [[arm, f"{rows[0]['rate']:g}", *(shown(rows, field) for field in fields)] for arm, rows in best.items()]
    columns = ["Arm", "best rate", "running averages", "population statistics", "mini-batch", "modes disagree"]
    return Table(
        "ends",
        "Test accuracy by the statistics of the evaluation",
        columns,
        lines,
        "Means over the seeds, at the learning rate that was best on validation images; the rate is that of a batch of "
        "32. Modes disagree: the share of test images that mini-batch and population statistics classify differently.",
    )


CAPTION = (
    "Three layers of 100 sigmoids; every network of the sweep saw as many images. Lines are means over the seeds, each "
    "at its best learning rate; bands run from the lowest to the highest. Noise: the variance of batch means "
    "relative to that of the values, and of batch variances relative to their squared mean, of the first layer's "
    "sums before training."
)
STUDY = Study(
    title="Batch size",
    options=Options(),
    quick={
        "steps": 256,
        "seeds": (0, 1),
        "rates": (0.1,),
        "noise_batches": 20,
        "train_images": 1000,
        "validation_images": 500,
        "test_images": 500,
        "statistics_images": 100,
    },
    notes=(
        "The sources trained ResNets, Inception and others, mostly on ImageNet and CIFAR. Here: a part of MNIST, the "
        "network of the 2015 paper's section 4.1, SGD. Networks of the sweep all see as many images as that of batch 2 "
        "does, those trained long 15 times as many.",
        "Learning rate: that of a batch of 32, times batch / 32 (Goyal et al. 2017). Every arm is "
        "trained at each rate of a short grid and counts with the one that has the highest accuracy on "
        "validation images, evaluated with running averages.",
        "Running averages look back over as many images whatever the batch: momentum 1 - 0.9^(m / 32), torch's 0.1 at "
        "32. BN is also evaluated with averages of momentum 0.1, of 50 batches after training.",
        "Population statistics: pooled moments of training images with frozen weights, in batches of m as in "
        "Algorithm 2 of the 2015 paper, and for comparison in batches of 1,000.",
        "Batch Renorm: rmax 3, dmax 5. Warm-up, and growth of rmax and dmax, end after 4 %, 32 % and 20 % of the "
        "steps: the proportions of the source's 5,000, 40,000 and 25,000.",
        "Ghost BN's claim is about training to the end, so it is judged on the networks that are trained long.",
    ),
    arms=arms,
    run=run,
    conclude=conclude,
)
