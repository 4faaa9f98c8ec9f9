"""What the page of an Inception run shows: Figures 2 and 3, settings of the arms, the search for a learning rate."""

import math
from statistics import fmean

from batchnorm.report.contents import Cell, Column, Contents, Table
from batchnorm.report.figure2 import BASELINE, draw_figure2
from batchnorm.report.inception_records import Arm, InceptionRun
from batchnorm.report.sections import figure_section
from batchnorm.report.text import number, percent
from batchnorm.report.training_page import STYLES, banner, rate_search, training_timing

TITLE = "Inception with and without batch normalization"
SOURCE = "Ioffe & Szegedy 2015, section 4.2, Figures 2 and 3"
# Steps to 72.2 %, and the best accuracy in percent
PAPER = {
    "Inception": (31.0e6, 72.2),
    "BN-Baseline": (13.3e6, 72.7),
    "BN-x5": (2.1e6, 73.0),
    "BN-x30": (2.7e6, 74.8),
    "BN-x5-Sigmoid": (None, 69.8),
}


def inception_contents(run: InceptionRun) -> Contents:
    drawing = draw_figure2(run)
    sections = [
        figure_section(drawing, "Figure 2: accuracy during training"),
        figure3(run).section(),
        settings(run).section(),
        last_evaluations(run).section(),
        rate_search(run.base_learning_rate),
        training_timing(run),
    ]
    return Contents(TITLE, SOURCE, [drawing], sections, banner=banner(run.setting), styles=STYLES)


def figure3(run: InceptionRun) -> Table:
    """Steps to the plain network's best accuracy, and the best accuracy of each arm, beside the paper's."""
    baseline = next((arm.steps_to_baseline for arm in run.arms if arm.arm == BASELINE), None)
    columns = [
        Column("Network"),
        Column(f"steps to {percent(run.baseline_accuracy)}", "Here"),
        Column("times fewer", "Here"),
        Column("best accuracy", "Here"),
        Column("steps to 72.2 %", "Paper"),
        Column("times fewer", "Paper"),
        Column("best accuracy", "Paper"),
    ]
    caption = (
        f"The first evaluated step at which the validation accuracy is at least the best of {BASELINE}, and how many "
        f"times fewer steps that is."
    )
    if len({row.seed for row in run.evaluations}) > 1:
        caption += " The numbers are those of the first seed; the claims are judged on all."
    rows = [[run.names[arm.arm], *reached(run, arm, baseline), *in_paper(arm.arm)] for arm in run.arms]
    heading = f"Figure 3: steps to the best accuracy of {BASELINE}, and best accuracy"
    return Table("figure3", heading, columns, rows, caption=caption)


def reached(run: InceptionRun, arm: Arm, baseline: int | None) -> list[Cell]:
    known = math.isfinite(run.baseline_accuracy) and math.isfinite(arm.best_accuracy)
    steps = "never" if arm.steps_to_baseline is None and known else number(arm.steps_to_baseline)
    ratio = baseline / arm.steps_to_baseline if baseline and arm.steps_to_baseline else None
    best = "diverged" if math.isnan(arm.best_accuracy) else percent(arm.best_accuracy)
    at = f"at step {number(arm.best_step)}" if arm.best_step is not None else ""
    return [Cell(steps), Cell(number(ratio)), Cell(best, at)]


def in_paper(arm: str) -> list[str]:
    steps, accuracy = PAPER.get(arm, (None, None))
    ratio = None if steps is None else PAPER[BASELINE][0] / steps
    millions = number(None) if steps is None else f"{steps / 1e6:.1f} million"
    return [millions, number(ratio), number(None) if accuracy is None else f"{accuracy:.1f} %"]


def settings(run: InceptionRun) -> Table:
    rows = [
        [
            run.names[arm.arm],
            "; ".join(arm.changes) or "nothing",
            f"{arm.learning_rate:.4g}",
            number(arm.weight_decay),
            number(arm.dropout),
            number(arm.parameters),
        ]
        for arm in run.arms
    ]
    columns = [Column("Network"), Column("changes to the plain network", words=True)]
    columns += [Column(name) for name in ("learning rate", "weight decay", "dropout", "parameters")]
    return Table("arms", "What each network changes", columns, rows)


def last_evaluations(run: InceptionRun) -> Table:
    """The last row of every arm, mean over the seeds."""
    rows = []
    for arm, name in run.names.items():
        of_arm = [row for row in run.evaluations if row.arm == arm]
        step = max(row.step for row in of_arm)
        last = [row for row in of_arm if row.step == step]
        accuracies = [
            fmean(getattr(row, field) for row in last) for field in ("accuracy", "accuracy_population", "top5")
        ]
        losses = [fmean(getattr(row, field) for row in last) for field in ("validation_loss", "training_loss")]
        rows.append([name, number(step), *map(percent, accuracies), *(number(loss) for loss in losses)])
    columns = [
        Column("Network"),
        Column("step"),
        Column("running averages", "Validation accuracy"),
        Column("Algorithm 2", "Validation accuracy"),
        Column("first five", "Validation accuracy"),
        Column("validation", "Loss"),
        Column("training", "Loss"),
    ]
    caption = (
        "Accuracy with the running averages that follow training, and with Algorithm 2 of the paper, which averages "
        "the statistics of training batches afterwards; first five: the label is among the five likeliest classes. "
        "The training loss is that since the evaluation before."
    )
    return Table("last", "At the last step", columns, rows, caption=caption)
