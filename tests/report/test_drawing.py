"""Figures show what the records say, hide nothing silently, and are the same bytes for the same input."""

import json
import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from synthetic import SEEDS, STEPS, accuracy, percentile_rows, write_run

from batchnorm.errors import MissingExtraError, RunError
from batchnorm.report import load_run, write_report
from batchnorm.report.figure1 import draw_figure1
from batchnorm.report.sweep import draw_sweep, heat_table

DRAW = "import sys; from batchnorm.report import write_report; write_report(sys.argv[1])"


def rewrite_metrics(folder: Path, change) -> None:
    rows = [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in map(change, rows) if row is not None]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))


def test_curves_are_the_records(run_folder: Path) -> None:
    a, b, c = (drawn.panel for drawn in draw_figure1(load_run(run_folder)).panels)
    assert [panel.title for panel in (a, b, c)] == ["(a)  Test accuracy", "(b)  Without BN", "(c)  With BN"]
    assert list(a.positions) == STEPS
    i = STEPS.index(2000)
    values = [accuracy("bn", seed, 2000) for seed in SEEDS]
    assert a.curves[0].values[i] == pytest.approx(sum(values) / 3)
    assert a.curves[0].text[i] == f"{sum(values) / 0.03:.2f} % ({100 * min(values):.2f} to {100 * max(values):.2f})"
    for panel, arm in ((b, "plain"), (c, "bn")):
        expected = [row[17] for row in percentile_rows(arm, 0, 2000)]
        assert [curve.values[i] for curve in panel.curves] == expected[::-1]
        assert [curve.name for curve in panel.curves] == ["85th percentile", "50th percentile", "15th percentile"]


def test_places_are_on_the_drawn_axes(run_folder: Path) -> None:
    for drawn in draw_figure1(load_run(run_folder)).panels:
        left, top, right, bottom = drawn.box
        assert drawn.x[0] == pytest.approx(left, abs=0.2)
        assert drawn.x[-1] == pytest.approx(right, abs=0.2)
        assert all(y is None or top <= y <= bottom for curve in drawn.y for y in curve)
        assert drawn.y[0][0] is None or drawn.panel.name != "a"


def test_percentiles_share_one_scale(run_folder: Path) -> None:
    _, b, c = draw_figure1(load_run(run_folder)).panels
    assert b.box == c.box
    slopes = []
    for drawn in (b, c):
        high, low = (drawn.panel.curves[i].values[-1] for i in (0, 2))
        slopes.append((drawn.y[2][-1] - drawn.y[0][-1]) / (high - low))
    assert slopes[0] == pytest.approx(slopes[1], rel=0.01)


def test_clipped_values_are_in_the_caption(run_folder: Path) -> None:
    caption = draw_figure1(load_run(run_folder)).caption
    assert "The axis begins at 0.7; below it lie 15 of 44 evaluations without BN" in caption
    assert "4 of 44 evaluations with BN (the last at step 300, the lowest 10.00 %)" in caption


def test_floor_falls_when_an_arm_does_not_learn(run_folder: Path) -> None:
    rewrite_metrics(run_folder, lambda row: row | ({"test_accuracy": 0.1} if row["arm"] == "plain" else {}))
    drawing = draw_figure1(load_run(run_folder))
    assert "The axis begins" not in drawing.caption
    assert None not in drawing.panels[0].y[0]


@pytest.mark.parametrize("value", [None, math.nan])
def test_diverged_network_is_drawn_as_a_gap(run_folder: Path, value: float | None) -> None:
    bad = {"test_accuracy": value, "percentiles": [[value] * 100] * 3}
    rewrite_metrics(run_folder, lambda row: row | (bad if row["step"] > 1000 and row["arm"] == "plain" else {}))
    drawing = draw_figure1(load_run(run_folder))
    assert drawing.panels[1].panel.curves[0].text[-1] == "\N{EN DASH}"
    write_report(run_folder)


def test_one_arm_one_seed_one_step(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=[0])
    rewrite_metrics(folder, lambda row: row if (row["arm"], row["seed"]) == ("bn", 0) else None)
    drawing = draw_figure1(load_run(folder))
    assert [drawn.panel.name for drawn in drawing.panels] == ["a", "c"]
    assert "one seed" in drawing.caption
    write_report(folder)


def test_figure1_needs_a_unit(run_folder: Path) -> None:
    claims = json.loads((run_folder / "claims.json").read_text()) | {"unit_drawn": None}
    (run_folder / "claims.json").write_text(json.dumps(claims))
    with pytest.raises(RunError, match=r"no 'unit_drawn'; expected the unit whose input Figure 1 shows"):
        write_report(run_folder)


@pytest.mark.parametrize("name", ["figure1", "sweep"])
def test_same_input_same_bytes_in_another_process(run_folder: Path, sweep_folder: Path, name: str) -> None:
    folder = run_folder if name == "figure1" else sweep_folder
    with matplotlib.rc_context({"lines.linewidth": 9, "axes.facecolor": "black", "svg.hashsalt": None}):
        paths = write_report(folder)
    assert [path.name for path in paths] == [f"{name}.svg", f"{name}.png", "report.html"]
    first = [path.read_bytes() for path in paths]
    for path in paths:
        path.unlink()
    subprocess.run([sys.executable, "-c", DRAW, str(folder)], check=True)
    assert [path.read_bytes() for path in paths] == first


def test_files_are_white_undated_and_without_links(run_folder: Path) -> None:
    svg, png, _ = (path.read_bytes() for path in write_report(run_folder))
    text = svg.decode()
    ET.fromstring(text)
    assert "#ffffff" in text
    assert "<text" not in text
    assert not re.search(r"<dc:date>|20\d\d-\d\d", text)
    assert b"Software" not in png
    image = matplotlib.image.imread(run_folder / "figure1.png")
    assert image.shape[1] == 1840
    assert np.array_equal(image[0, 0, :3], [1, 1, 1])


def test_ids_of_panels_differ(sweep_folder: Path) -> None:
    found = [re.findall(r'\bid="([^"]*)"', drawn.svg) for drawn in draw_sweep(load_run(sweep_folder)).panels]
    everything = [name for names in found for name in names]
    assert len(everything) == len(set(everything))
    for drawn, names in zip(draw_sweep(load_run(sweep_folder)).panels, found, strict=True):
        assert set(re.findall(r'(?:href="#|url\(#)([^")]*)', drawn.svg)) <= set(names)


def test_heat_table_marks_the_best_of_each_arm(sweep_folder: Path) -> None:
    table = heat_table(load_run(sweep_folder))
    assert table.rates == ["0.01", "0.1", "0.5", "1", "2"]
    best = [
        (std, arm, rate)
        for std, arm, cells in table.rows
        for rate, cell in zip(table.rates, cells, strict=True)
        if cell.best
    ]
    assert best == [("0.05", "without BN", "1"), ("0.05", "with BN", "1")]
    heats = [cell.heat for _, _, cells in table.rows for cell in cells]
    assert (min(heats), max(heats)) == (0, 1)


def test_sweep_with_gaps(sweep_folder: Path) -> None:
    record = json.loads((sweep_folder / "sweep.json").read_text())
    del record["points"][3]
    del record["points"][4]["arms"]["bn"]
    record["points"][5]["arms"]["plain"] |= {"mean": None, "low": None, "high": None}
    (sweep_folder / "sweep.json").write_text(json.dumps(record))
    write_report(sweep_folder)
    assert heat_table(load_run(sweep_folder)).rows[0][2][3] is None


def test_single_point_sweep(sweep_folder: Path) -> None:
    record = json.loads((sweep_folder / "sweep.json").read_text())
    (sweep_folder / "sweep.json").write_text(json.dumps(record | {"points": record["points"][:1], "best": {}}))
    assert len(draw_sweep(load_run(sweep_folder)).panels) == 1
    write_report(sweep_folder)


def test_missing_matplotlib_names_the_extra(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=re.escape("not installed: pip install 'batchnorm[plots]'")):
        write_report(run_folder)
    assert not (run_folder / "report.html").exists()


def test_importing_the_report_imports_neither_torch_nor_matplotlib() -> None:
    code = "import sys, batchnorm.report; print({'torch', 'matplotlib'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert result.stdout.strip() == "set()"
