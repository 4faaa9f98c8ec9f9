"""What the page of an MNIST run shows: Figure 1 or the sweep, final accuracies, what a step costs."""

import math
from collections.abc import Sequence
from statistics import fmean

from batchnorm.report.contents import Column, Contents, Section, Table
from batchnorm.report.figure1 import draw_figure1
from batchnorm.report.mnist_records import MnistEvaluation, MnistRun
from batchnorm.report.records import ArmTiming
from batchnorm.report.sections import figure_section, step_total, timing_section
from batchnorm.report.sweep import draw_sweep, heat_table
from batchnorm.report.text import number, percent

TITLE = "MNIST with and without batch normalization"
SOURCE = "Ioffe & Szegedy 2015, section 4.1"
COLUMNS = ("Seed", "Without BN", "With BN, running average", "With BN, Algorithm 2", "Gain with BN")
ABOUT_FINALS = (
    "The running average follows training; Algorithm 2 of the paper averages the statistics of training batches after "
    "training, with the weights frozen. The gain, in percentage points, is that of the running average."
)


def mnist_contents(run: MnistRun) -> Contents:
    timing = timing_section(run, cost_sentence(run.timing), head="One step of a stack of seeds", shares=False)
    if run.points:
        drawing = draw_sweep(run)
        figure = figure_section(
            drawing, "Accuracy over learning rate", name="figure", axis="learning rate", table=False
        )
        sections = [figure, Section("heat.html", heat_table(run)), Section("table.html", None), timing]
        return Contents(f"{TITLE}: the sweep", SOURCE, [drawing], sections, records=("sweep.json",))
    drawing = draw_figure1(run)
    figure = figure_section(drawing, "Figure 1", name="figure")
    sections = [figure, Section("heat.html", None), final_accuracies(run).section(), timing]
    return Contents(TITLE, SOURCE, [drawing], sections)


def final_accuracies(run: MnistRun) -> Table:
    """Accuracy of every network at the last step: seed, plain, BN with running average, BN with Algorithm 2, gain."""
    last: dict[tuple[str, int], MnistEvaluation] = {}
    for row in run.evaluations:
        if (row.arm, row.seed) not in last or row.step > last[row.arm, row.seed].step:
            last[row.arm, row.seed] = row
    seeds = sorted({seed for _, seed in last})

    def value(arm: str, seed: int, name: str) -> float:
        row = last.get((arm, seed))
        return math.nan if row is None else getattr(row, name)

    columns = [
        [value("plain", seed, "accuracy") for seed in seeds],
        [value("bn", seed, "accuracy") for seed in seeds],
        [value("bn", seed, "accuracy_population") for seed in seeds],
    ]
    return Table(
        "finals",
        "Final test accuracy of every network",
        [Column(name) for name in COLUMNS],
        [accuracy_row(number(seed), values) for seed, values in zip(seeds, zip(*columns, strict=True), strict=True)],
        foot=accuracy_row("Mean", [fmean(column) for column in columns]) if len(seeds) > 1 else (),
        caption=ABOUT_FINALS,
        label="Final test accuracy",
    )


def accuracy_row(name: str, values: Sequence[float]) -> list[str]:
    gain = 100 * (values[1] - values[0])
    return [name, *map(percent, values), f"{gain:+.2f}" if math.isfinite(gain) else percent(None)]


def cost_sentence(timing: Sequence[ArmTiming]) -> str:
    """Which ratio BN costs and how many networks a step trains."""
    totals = {arm.arm: step_total(arm) for arm in timing}
    networks = max((arm.networks for arm in timing), default=0)
    stack = f" A step trains a stack of {number(networks)} networks, one per seed, at once." if networks > 1 else ""
    if totals.get("plain", 0) > 0 and "bn" in totals:
        ratio = totals["bn"] / totals["plain"]
        return f"A step with BN takes {ratio:.2f} times as long as one without.{stack}{layers_sentence(timing)}"
    return f"Time of one step by phase.{stack}{layers_sentence(timing)}"


def layers_sentence(timing: Sequence[ArmTiming]) -> str:
    """What the fused layers save, measured by turns in the same process."""
    for arm in timing:
        if arm.step_in_turn_microseconds is not None:
            before, after = (arm.step_in_turn_microseconds[layers] for layers in ("torch", "fused"))
            return (
                f" With torch's BN layers and a sigmoid after each it takes {number(before)} µs, with BN and sigmoid "
                f"in one kernel {number(after)} µs, measured by turns after the training."
            )
    return ""
