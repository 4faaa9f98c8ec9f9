"""The page of a study: panels with axes of their own, tables, and records that are read whole or refused."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from synthetic_training import study_panel, write_study
from test_report_page import HOSTILE, outline
from test_training_records import ESCAPE, MISSING, change, refusal

from batchnorm.experiments.catalogue import EXPERIMENTS as CATALOGUE
from batchnorm.report import load_run, write_report
from batchnorm.report.experiments import EXPERIMENTS, STUDY
from batchnorm.report.study_page import draw_study


@pytest.fixture
def study_folder(tmp_path: Path) -> Path:
    return write_study(tmp_path / "study")


def test_every_experiment_of_the_catalogue_has_a_page():
    assert list(EXPERIMENTS) == [entry.name for entry in CATALOGUE]
    assert {name for name, experiment in EXPERIMENTS.items() if experiment is STUDY} == {
        entry.name for entry in CATALOGUE if entry.module
    }


def test_page_holds_panels_tables_and_their_numbers(study_folder: Path):
    names = [path.name for path in write_report(study_folder)]
    assert names == ["figure.svg", "figure.png", "report.html"]
    page = (study_folder / "report.html").read_text()
    for text in ("Test accuracy: accuracy over steps", "batch size", "0.95 (0.9 to 0.97)", "The whole network"):
        assert text in page, text


def test_same_records_give_the_same_bytes(tmp_path: Path):
    pages = [write_report(write_study(tmp_path / name))[-1].read_bytes() for name in ("a", "b")]
    assert pages[0] == pages[1]


def test_lines_of_one_panel_may_have_other_points(study_folder: Path):
    (first, second), run = draw_study(load_run(study_folder)).panels, load_run(study_folder)
    assert first.panel.positions == [0, 100, 200]
    assert [math.isnan(value) for value in first.panel.curves[1].values] == [False, True, True]
    assert second.panel.axis == "batch size"
    assert second.panel.labels == ["2", "16", "512"]
    assert run.panels[0].lines[1].low[0] == 0.1


def test_a_line_has_one_look_in_all_panels(study_folder: Path):
    first, second = draw_study(load_run(study_folder)).panels
    assert first.panel.curves[0].color == second.panel.curves[0].color


def test_study_without_training_has_no_timing(study_folder: Path):
    change(study_folder, "timing.json", ("arms",), {})
    assert "What a step costs" not in write_report(study_folder)[-1].read_text()


@pytest.mark.parametrize(
    ("place", "value", "line"),
    [
        (("title",), MISSING, "no field 'title'; expected str"),
        (("arms",), [], "no arms; expected at least one"),
        (("panels",), {}, "'panels' is {}; expected list"),
        (("panels", 0), 3, "'panels' has 3 in place 0; expected objects"),
        (("panels", 0, "name"), "a b", "'name' is a b; expected letters, digits and hyphens"),
        (("panels", 0, "lines"), [], "panel accuracy: no points; expected at least one line with a point"),
        (("panels", 0, "x_log"), 1, "panel accuracy: 'x_log' is 1; expected true or false"),
        (("panels", 0, "lines", 0, "x"), [0, None, 1], "line BN: 'x', 'y', 'low' and 'high' do not belong together"),
        (("panels", 0, "lines", 0, "y"), [1.0], "line BN: 'x', 'y', 'low' and 'high' do not belong together"),
        (("panels", 0, "lines", 0, "y"), ["1"] * 3, "line BN: 'y' has 1; expected numbers or null"),
        (("panels", 0, "lines", 0, "y", 1), True, "line BN: 'y' has true; expected numbers or null"),
        (("tables", 0, "rows", 0), ["BN"], 'table networks: a row is ["BN"]; expected 3 texts'),
        (("tables", 0, "rows", 0, 1), 5, "expected 3 texts"),
        (("tables", 0, "columns"), [1], "table networks: 'columns' has 1; expected texts"),
        (("caption",), None, "'caption' is null; expected str"),
        (("panels", 0, "name"), ESCAPE, "expected letters, digits and hyphens"),
    ],
)
def test_wrong_record_is_named(study_folder: Path, place: tuple[Any, ...], value: Any, line: str):
    change(study_folder, "claims.json", place, value)
    assert line in refusal(study_folder)


def hostile_study(folder: Path) -> Path:
    """Every string that the record of a study can hold, hostile, but for the names of panels and tables."""
    write_study(folder)
    claims = json.loads((folder / "claims.json").read_text())
    line = claims["panels"][0]["lines"][0] | {"name": HOSTILE}
    panel = study_panel(title=HOSTILE, x=HOSTILE, y=HOSTILE, lines=[line])
    table = claims["tables"][0] | {"heading": HOSTILE, "columns": [HOSTILE], "rows": [[HOSTILE]], "caption": HOSTILE}
    texts = dict.fromkeys(("title", "source", "caption"), HOSTILE)
    return write_study(folder, panels=[panel], tables=[table], **texts)


def test_hostile_strings_stay_text(tmp_path: Path):
    hostile = hostile_study(tmp_path / "hostile")
    write_report(hostile)
    after = outline(hostile)
    assert after.count("script") == 2
    assert not [name for _, attrs in after.tags for name in attrs if name.startswith("on")]
    assert "<script>document.title='owned'</script>" in after.words
    assert "\x1b" not in (hostile / "report.html").read_text()
