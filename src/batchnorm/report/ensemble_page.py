"""What the page of an ensemble shows: Figure 4, every network, and the curves of their training."""

import math
from statistics import fmean

from batchnorm.report.contents import Cell, Column, Contents, Table
from batchnorm.report.curves import gather
from batchnorm.report.drawing import Drawing, draw
from batchnorm.report.ensemble_records import EnsembleRun, Errors
from batchnorm.report.panels import Lines, about_lines, lines_panel, panel_height
from batchnorm.report.sections import figure_section
from batchnorm.report.text import number, percent
from batchnorm.report.training_page import STYLES, banner, rate_search, skipped_sentence, training_timing

TITLE = "An ensemble of batch-normalized networks"
SOURCE = "Ioffe & Szegedy 2015, section 4.2.3, Figure 4"
# Errors in percent, first guess and first five, 144 crops
PAPER_SINGLE, PAPER_CROPS, PAPER_ENSEMBLE = (25.2, 7.82), (21.99, 5.82), (20.1, 4.9)
NONE = number(None)


def ensemble_contents(run: EnsembleRun) -> Contents:
    drawing = draw_training(run)
    sections = [
        figure4(run).section(),
        networks(run).section(),
        figure_section(drawing, "Accuracy during training"),
        rate_search(run.base_learning_rate),
        training_timing(run),
    ]
    return Contents(TITLE, SOURCE, [drawing], sections, banner=banner(run.setting), styles=STYLES)


def draw_training(run: EnsembleRun) -> Drawing:
    lines = Lines(gather(run.evaluations, run.names), run.names, alone="each network with a seed of its own")
    caption = about_lines(lines) + skipped_sentence(run.evaluations, run.names)
    panel = lines_panel(lines, "accuracy", "Validation accuracy")
    return draw("training", [panel], panel_height(lines), caption)


def figure4(run: EnsembleRun) -> Table:
    """Errors of one network and of all, on one crop and on many, beside the paper's."""
    count = number(len(run.networks))
    one, all_of_them = "1 network, mean", f"{count} networks"
    rows = [
        ["Single crop", one, *alone(run, "single"), *map(error, PAPER_SINGLE)],
        ["Multicrop", one, *alone(run, "crops"), *map(error, PAPER_CROPS)],
        ["Ensemble, single crop", all_of_them, *together(run.ensemble, "single"), NONE, NONE],
        ["Ensemble, multicrop", all_of_them, *together(run.ensemble, "crops"), *map(error, PAPER_ENSEMBLE)],
    ]
    columns = [Column("BN-Inception"), Column("of", words=True)]
    columns += [Column(name, group) for group in ("Error here", "Error in the paper") for name in ("top-1", "top-5")]
    caption = (
        f"Top-1 error: the likeliest class is wrong; top-5: the label is not among the five likeliest. Here over "
        f"{number(run.crop_images)} validation images, in the paper over 50,000. Small letters give the range over the "
        f"networks. The ensemble averages the class probabilities of its networks; the paper's has 6, and its single "
        f"networks are one each. Multicrop: the mean over 144 crops of an image."
    )
    return Table("figure4", "Figure 4: errors of one network and of the ensemble", columns, rows, caption=caption)


def alone(run: EnsembleRun, crops: str) -> list[Cell]:
    """Mean and range over the networks."""
    cells = []
    for guesses in ("top1", "top5"):
        values = [getattr(network.errors, f"{crops}_{guesses}") for network in run.networks]
        mean = fmean(values)
        spread = (
            f"{100 * min(values):.2f} to {100 * max(values):.2f}" if math.isfinite(mean) and len(values) > 1 else ""
        )
        cells.append(Cell(percent(mean), spread))
    return cells


def together(errors: Errors, crops: str) -> list[str]:
    return [percent(getattr(errors, f"{crops}_{guesses}")) for guesses in ("top1", "top5")]


def error(value: float) -> str:
    """An error of the paper, with the digits that it gives."""
    return f"{value:g} %"


def networks(run: EnsembleRun) -> Table:
    rows = [
        [
            run.names[network.name],
            "; ".join(network.variations) or "none",
            *together(network.errors, "single"),
            *together(network.errors, "crops"),
        ]
        for network in run.networks
    ]
    columns = [Column("Network"), Column("variations", words=True)]
    columns += [
        Column(name, group) for group in ("Single crop", "Multicrop") for name in ("top-1 error", "top-5 error")
    ]
    foot = ["Ensemble", "", *together(run.ensemble, "single"), *together(run.ensemble, "crops")]
    return Table("networks", "Every network", columns, rows, foot=foot)
