"""What the pages of the ImageNet experiments have in common: what was trained on what, and what its steps cost."""

import math
from collections.abc import Sequence

from batchnorm.report.contents import Cell, Column, Section, Table
from batchnorm.report.records import Run
from batchnorm.report.sections import data_share, timing_section
from batchnorm.report.text import clean, joined, number, percent
from batchnorm.report.training_records import PAPER_PRESET, STAND_IN, RateSearch, Setting, TrainingEvaluation

STYLES = ("page.css", "arms.css")
PHASES = ("waiting for data", "forward", "backward", "optimizer")
RULE_LIMIT = 1000


def banner(setting: Setting) -> list[str]:
    """What a reader must know before any number."""
    small = "This is a small-scale test of the paper's claims, not a reproduction of its numbers."
    stand_in = "The bundled MNIST stood in for ImageNet."
    facts = (
        f"Preset {setting.preset}: {setting.data} with {number(setting.classes)} classes, "
        f"{number(setting.training_images)} training and {number(setting.validation_images)} validation images of "
        f"{setting.size} x {setting.size} pixels; the network at {setting.width:g} of its width; "
        f"{number(setting.steps)} steps of {number(setting.batch_size)} images."
    )
    sentences = [small] if setting.preset != PAPER_PRESET else []
    return [*sentences, *([stand_in] if setting.data == STAND_IN else []), facts]


def training_timing(run: Run) -> Section:
    return timing_section(run, waiting_sentence(run), phases=PHASES)


def waiting_sentence(run: Run) -> str:
    """How much of a step waits for data."""
    shares = {run.names[timing.arm]: data_share(timing) for timing in run.timing}
    if not shares:
        return ""
    least, most = min(shares, key=shares.__getitem__), max(shares, key=shares.__getitem__)
    if len(shares) == 1:
        return f"Waiting for data takes {100 * shares[most]:.1f} % of a step."
    low, high = (f"{100 * shares[arm]:.1f} % ({arm})" for arm in (least, most))
    return f"Waiting for data takes {low} to {high} of a step."


def rate_search(search: RateSearch | None) -> Section:
    """The base learning rates that were tried; left out where one was given."""
    if search is None:
        return Section("table.html", None)
    rows = [
        [
            Cell(f"{rate:.4g}", mark="chosen" if rate == search.chosen else ""),
            "diverged" if math.isnan(accuracy) else percent(accuracy),
            number(loss, 3),
        ]
        for rate, accuracy, loss in search.candidates
    ]
    columns = [Column("Learning rate"), Column("validation accuracy"), Column("validation loss")]
    caption = f"Chosen: {search.chosen:.4g}, {clean(search.rule, RULE_LIMIT)}."
    return Table("rates", "The base learning rate", columns, rows, caption=caption).section()


def skipped_sentence(evaluations: Sequence[TrainingEvaluation], names: dict[str, str]) -> str:
    """How many images of the training could not be read; empty if all could."""
    skipped: dict[tuple[str, int], int] = {}
    for row in evaluations:
        skipped[row.arm, row.seed] = max(skipped.get((row.arm, row.seed), 0), row.skipped_images)
    found = [f"{number(n)} of {names[arm]} (seed {seed})" for (arm, seed), n in skipped.items() if n]
    return f" Images that could not be read and were left out of the training: {joined(found)}." if found else ""
