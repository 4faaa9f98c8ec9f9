"""Figure 2 and the training curves: every arm named, every number as recorded, nothing hidden silently."""

import itertools
import math
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from synthetic_training import (
    PAPER_ARMS,
    SHAPES,
    STEPS,
    accuracy,
    read_rows,
    write_ensemble,
    write_inception,
    write_rows,
)

from batchnorm.report import load_run, write_report
from batchnorm.report.curves import gather
from batchnorm.report.drawing import draw, draw_panel, matplotlib_style, new_figure
from batchnorm.report.ensemble_page import draw_training
from batchnorm.report.figure2 import draw_figure2
from batchnorm.report.looks import looks
from batchnorm.report.metrics import Evaluation
from batchnorm.report.panels import LABEL_GAP, Label, Lines, about_lines, end_labels, label_ends, lines_panel, spread

SEEDS = (0, 1, 2)


def test_curves_are_the_records(tmp_path: Path) -> None:
    panel = draw_figure2(load_run(write_inception(tmp_path / "run", seeds=SEEDS))).panels[0].panel
    assert list(panel.positions) == STEPS
    assert [curve.name for curve in panel.curves] == list(PAPER_ARMS)
    values = [accuracy("BN-x30", seed, 2000) for seed in SEEDS]
    i, curve = STEPS.index(2000), panel.curves[3]
    assert curve.values[i] == pytest.approx(np.mean(values))
    assert curve.text[i] == f"{100 * np.mean(values):.2f} % ({100 * min(values):.2f} to {100 * max(values):.2f})"


def test_one_seed_is_said_and_has_no_range(tmp_path: Path) -> None:
    drawing = draw_figure2(load_run(write_inception(tmp_path / "run")))
    assert drawing.caption.startswith("Validation accuracy during training, one seed. The dotted line is the best of")
    assert drawing.panels[0].panel.curves[0].text[-1] == f"{100 * accuracy('Inception', 0, 8000):.2f} %"


def test_several_seeds_are_said(tmp_path: Path) -> None:
    caption = draw_figure2(load_run(write_inception(tmp_path / "run", seeds=SEEDS))).caption
    assert "mean of 3 seeds; the band runs from the lowest to the highest" in caption
    assert "Level and diamonds are those of the first seed." in caption


def test_places_are_on_the_drawn_axes(tmp_path: Path) -> None:
    (drawn,) = draw_figure2(load_run(write_inception(tmp_path / "run"))).panels
    left, top, right, bottom = drawn.box
    assert drawn.x[-1] == pytest.approx(right, abs=0.2)
    assert drawn.x[0] == pytest.approx(left + (right - left) * STEPS[0] / STEPS[-1], abs=0.2)
    assert all(y is not None and top <= y <= bottom for curve in drawn.y for y in curve)


def figure2_lines(folder: Path) -> Lines:
    run = load_run(folder)
    marks = {arm.arm: arm.steps_to_baseline for arm in run.arms if arm.steps_to_baseline is not None}
    return Lines(
        gather(run.evaluations, run.names), run.names, level=run.baseline_accuracy, level_name="best", marks=marks
    )


def drawn_axes(lines: Lines):
    with matplotlib_style():
        panel = lines_panel(lines, "accuracy", "Accuracy")
        figure = new_figure(panel.width, 3.3)
        axes = draw_panel(figure, panel, 0, 0, 3.3)
        figure.canvas.draw()
    return axes


def diamonds(axes) -> dict[float, float]:
    return {line.get_xdata()[0]: line.get_ydata()[0] for line in axes.lines if line.get_marker() == "D"}


def test_diamonds_mark_where_each_arm_reaches_the_level(tmp_path: Path) -> None:
    lines = figure2_lines(write_inception(tmp_path / "run"))
    assert set(lines.marks) == set(PAPER_ARMS[:4])
    level = max(accuracy("Inception", 0, step) for step in STEPS)
    expected = {next(s for s in STEPS if accuracy(arm, 0, s) >= level): level for arm in PAPER_ARMS[:4]}
    assert diamonds(drawn_axes(lines)) == expected


@pytest.mark.parametrize("level", [math.nan, 0.3])
def test_level_is_drawn_where_there_is_one(tmp_path: Path, level: float) -> None:
    lines = figure2_lines(write_inception(tmp_path / "run"))
    lines = Lines(lines.curves, lines.names, level=level, level_name="best", marks={})
    named = [label.text for label in end_labels(lines)]
    assert ("best" in named) == math.isfinite(level)
    assert ("dotted line" in about_lines(lines)) == math.isfinite(level)
    assert diamonds(drawn_axes(lines)) == {}


def test_diverged_arm_ends_in_a_cross_and_says_so(tmp_path: Path) -> None:
    folder = write_inception(tmp_path / "run", seeds=(0, 1), diverged={"BN-x30": 1000, "BN-x5": 1})
    lines = figure2_lines(folder)
    assert {label.text for label in end_labels(lines)} > {"BN-x30, diverged", "BN-x5, diverged", "Inception"}
    axes = drawn_axes(lines)
    crosses = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "x"]
    assert crosses == [750]
    drawing = draw_figure2(load_run(folder))
    assert "BN-x5 (2 of 2 seeds) had diverged by step 250" in drawing.caption
    assert "BN-x30 (2 of 2 seeds) had diverged by step 1,000" in drawing.caption
    curves = {curve.name: curve for curve in drawing.panels[0].panel.curves}
    assert curves["BN-x30"].text[STEPS.index(1000)] == "diverged"
    assert "diverged" not in curves["BN-x30"].text[STEPS.index(750)]


def test_one_diverged_seed_of_several_is_counted(tmp_path: Path) -> None:
    folder = write_inception(tmp_path / "run", arms=("Inception", "BN-x5"), seeds=SEEDS)
    lost = {"validation_loss": None}
    write_rows(
        folder,
        [
            row | (lost if (row["arm"], row["seed"]) == ("BN-x5", 2) and row["step"] > 4000 else {})
            for row in read_rows(folder)
        ],
    )
    drawing = draw_figure2(load_run(folder))
    assert drawing.panels[0].panel.curves[1].text[-1] == "1 of 3 diverged"
    assert "BN-x5 (1 of 3 seeds) had diverged by step 4,250" in drawing.caption


@pytest.mark.parametrize("arms", [tuple(SHAPES), ("Inception",)])
def test_everything_diverged_still_draws(tmp_path: Path, arms: tuple[str, ...]) -> None:
    folder = write_inception(tmp_path / "run", arms=arms, diverged=dict.fromkeys(arms, 1))
    drawing = draw_figure2(load_run(folder))
    assert all(text == "diverged" for curve in drawing.panels[0].panel.curves for text in curve.text)
    assert "dotted" not in drawing.caption
    write_report(folder)


def test_nine_labels_do_not_overlap(tmp_path: Path) -> None:
    axes = drawn_axes(figure2_lines(write_inception(tmp_path / "run", arms=tuple(SHAPES))))
    boxes = sorted((text.get_window_extent() for text in axes.texts), key=lambda box: box.y0)
    assert len(boxes) == 10
    assert all(low.y1 <= high.y0 + 0.5 for low, high in itertools.pairwise(boxes))
    assert max(box.x1 for box in boxes) <= axes.figure.bbox.x1


@pytest.mark.parametrize("name", ["$\\frac{", "\u202e\u4e16\u754c\U0001f600", "x" * 1000, "_hidden", "", "--><!--&<"])
def test_hostile_arm_is_drawn_as_text(tmp_path: Path, name: str) -> None:
    folder = write_inception(tmp_path / "run", arms=("Inception", name))
    svg = write_report(folder)[0].read_text()
    ET.fromstring(svg)
    panel = draw_figure2(load_run(folder)).panels[0].panel
    assert panel.width < 6.5


def test_arms_with_steps_of_their_own_have_no_gaps() -> None:
    rows = [Evaluation("a", 0, step, 0.5) for step in (100, 200, 300)]
    rows += [Evaluation("b", 0, step, 0.6) for step in (150, 300, 450)]
    lines = Lines(gather(rows, ["a", "b"]), {"a": "a", "b": "b"})
    assert lines.curves.steps == [100, 150, 200, 300, 450]
    drawn = [line for line in drawn_axes(lines).lines if line.get_label() in "ab"]
    assert [list(line.get_xdata()) for line in drawn] == [[150, 300, 450], [100, 200, 300]]
    assert {label.text for label in end_labels(lines)} == {"a", "b"}
    assert draw("x", [lines_panel(lines, "p", "P")], 3, "").panels[0].panel.curves[0].text[1] == "\N{EN DASH}"


def test_axis_of_a_paper_sized_run_begins_where_the_papers_does() -> None:
    rows = [Evaluation("a", 0, step, 0.75 - 0.6 * (step < 3)) for step in range(10)]
    lines = Lines(gather(rows, ["a"]), {"a": "a"})
    assert lines.floor == 0.4
    assert (
        "The axis begins at 0.4; below it lie 3 evaluations, the last at step 2 (a), the lowest 15.00 %."
        in about_lines(lines)
    )


def test_small_run_hides_nothing(tmp_path: Path) -> None:
    drawing = draw_figure2(load_run(write_inception(tmp_path / "run")))
    assert "The axis begins" not in drawing.caption
    assert None not in [y for curve in drawing.panels[0].y for y in curve]


def test_skipped_images_are_said(tmp_path: Path) -> None:
    folder = write_inception(tmp_path / "run")
    write_rows(folder, [row | {"skipped_images": 3 if row["arm"] == "BN-x5" else 0} for row in read_rows(folder)])
    caption = draw_figure2(load_run(folder)).caption
    assert caption.endswith("Images that could not be read and were left out of the training: 3 of BN-x5 (seed 0).")


def test_networks_of_an_ensemble_have_seeds_of_their_own(tmp_path: Path) -> None:
    drawing = draw_training(load_run(write_ensemble(tmp_path / "run")))
    assert drawing.caption == "Validation accuracy during training, each network with a seed of its own."
    assert len(drawing.panels[0].panel.curves) == 6


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        ([3.0], [3.0]),
        ([1.0, 1.0, 1.0], [0.0, 1.0, 2.0]),
        ([0.0, 0.0], [0.0, 1.0]),
        ([10.0, 10.0], [9.0, 10.0]),
        ([9.0, 5.0, 5.5], [9.0, 4.75, 5.75]),
        ([float(i) / 100 for i in range(21)], [i / 2 for i in range(21)]),
    ],
)
def test_labels_are_spread_in_order(places: list[float], expected: list[float]) -> None:
    assert spread(places, 1.0, 0.0, 10.0) == pytest.approx(expected)


def test_labels_stand_apart_on_a_logarithmic_axis() -> None:
    axes = Figure((4, 3)).add_axes((0, 0, 1, 1))
    axes.set_yscale("log")
    axes.set_ylim(1e-4, 1.0)
    ends = {"a": 1e-3, "b": 1e-3, "c": 0.1}
    label_ends(axes, [Label(ends[name], name, look) for name, look in looks(ends).items()])
    low, high, alone = (math.log10(text.xy[1]) for text in axes.texts)
    assert high - low == pytest.approx(LABEL_GAP / 3 * 4)
    assert (low + high) / 2 == pytest.approx(-3)
    assert alone == pytest.approx(-1)
