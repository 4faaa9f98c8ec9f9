"""Records are read whole, or refused with one line that says which, what was expected, and what to do."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from synthetic import CLAIMS, OPTIONS, STEPS, claim, write, write_run

from batchnorm.errors import RunError
from batchnorm.report import load_run

RECORDS = ("config.json", "environment.json", "metrics.jsonl", "claims.json", "timing.json")


def change(folder: Path, name: str, **fields: Any) -> None:
    write(folder, name, json.loads((folder / name).read_text()) | fields)


def test_run_holds_what_the_files_say(run_folder: Path) -> None:
    run = load_run(str(run_folder))
    assert (run.experiment, run.verdict, run.unit_drawn) == ("mnist", "not reproduced", 17)
    assert run.options == OPTIONS
    assert run.claims == CLAIMS
    assert len(run.evaluations) == 2 * 3 * len(STEPS)
    assert [timing.arm for timing in run.timing] == ["plain", "bn"]
    assert list(run.timing[0].step_microseconds) == ["batch", "forward", "backward", "optimizer"]
    assert (run.points, run.best) == ([], {})


def test_sweep_holds_points_and_best(sweep_folder: Path) -> None:
    run = load_run(sweep_folder)
    assert len(run.points) == 15
    assert run.points[0].arms["bn"].keys() == {"mean", "low", "high"}
    assert run.best == {"plain": (1.0, 0.05), "bn": (1.0, 0.05)}
    assert run.unit_drawn is None


@pytest.mark.parametrize("name", RECORDS)
def test_missing_record_is_named(run_folder: Path, name: str) -> None:
    (run_folder / name).unlink()
    with pytest.raises(
        RunError, match=rf"{re.escape(name)}: missing; expected .*; run it again with --resume"
    ) as raised:
        load_run(run_folder)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", RECORDS)
@pytest.mark.parametrize("data", [b"{", b"\xff\xfe", b"[1]", b"[" * 100_000, b"null"])
def test_garbled_record_is_named(run_folder: Path, name: str, data: bytes) -> None:
    (run_folder / name).write_bytes(data)
    with pytest.raises(RunError, match=rf"{re.escape(name)}: .*not (JSON|a JSON object|an object); expected"):
        load_run(run_folder)


@pytest.mark.parametrize("name", ["config.json", "claims.json"])
@pytest.mark.parametrize("version", [2, None, "1\x1b[2J"])
def test_other_schema_version_is_refused(run_folder: Path, name: str, version: object) -> None:
    change(run_folder, name, schema_version=version)
    with pytest.raises(
        RunError, match=rf"{re.escape(name)}: schema_version is .*; expected 1; use the version"
    ) as raised:
        load_run(run_folder)
    assert "\x1b" not in str(raised.value)


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"verdict": "maybe"}, "'verdict' is maybe; expected reproduced or not reproduced or not comparable"),
        ({"unit_drawn": 1.5}, "'unit_drawn' is 1.5; expected int or null"),
        ({"unit_drawn": True}, "'unit_drawn' is true; expected int or null"),
        ({"unit_drawn": 100}, "metrics.jsonl: line 1: no percentiles of unit 100; expected three lists"),
        ({"unit_drawn": -1}, "no percentiles of unit -1"),
        ({"claims": 3}, "'claims' is 3; expected list"),
        ({"claims": ["x"]}, "a claim is not an object"),
        ({"claims": [claim(verdict="yes")]}, "claim final-accuracy: 'verdict' is yes"),
        ({"claims": [claim(mean="0.3")]}, "claim final-accuracy: 'mean' is 0.3; expected int or float or null"),
        ({"claims": [{"name": "x" * 500}]}, "no field 'statement'"),
    ],
)
def test_wrong_field_of_claims_is_named(run_folder: Path, fields: dict[str, Any], line: str) -> None:
    change(run_folder, "claims.json", **fields)
    with pytest.raises(RunError, match=re.escape(line)):
        load_run(run_folder)


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"arm": "other"}, "line 1: 'arm' is other; expected plain or bn"),
        ({"seed": -1}, "line 1: 'seed' is -1; expected a whole number from 0"),
        ({"step": 10**400}, "expected a whole number from 0"),
        ({"test_accuracy": 1.5}, "line 1: 'test_accuracy' is 1.5; expected a fraction from 0 to 1, or null"),
        ({"percentiles": [[1], [2]]}, "line 1: no percentiles of unit 17"),
        ({"percentiles": None}, "line 1: no percentiles of unit 17"),
    ],
)
def test_wrong_row_of_metrics_is_named(run_folder: Path, fields: dict[str, Any], line: str) -> None:
    rows = (run_folder / "metrics.jsonl").read_text().splitlines()
    rows[0] = json.dumps(json.loads(rows[0]) | fields)
    (run_folder / "metrics.jsonl").write_text("\n".join(rows))
    with pytest.raises(RunError, match=re.escape(line)):
        load_run(run_folder)


def test_unfinished_network_is_named(run_folder: Path) -> None:
    rows = (run_folder / "metrics.jsonl").read_text().splitlines()
    (run_folder / "metrics.jsonl").write_text("\n".join(rows[:-1]))
    line = "seed 2 of arm bn has 43 evaluations up to step 48000; expected 44 up to step 50000; run it again"
    with pytest.raises(RunError, match=line):
        load_run(run_folder)


def test_repeated_step_is_named(run_folder: Path) -> None:
    rows = (run_folder / "metrics.jsonl").read_text()
    (run_folder / "metrics.jsonl").write_text(rows + rows.splitlines()[0])
    with pytest.raises(RunError, match="seed 0 of arm plain has a step twice"):
        load_run(run_folder)


def test_empty_metrics_are_refused(run_folder: Path) -> None:
    (run_folder / "metrics.jsonl").write_text("")
    with pytest.raises(RunError, match=r"metrics\.jsonl: empty; expected one row per evaluation"):
        load_run(run_folder)


def test_diverged_numbers_become_nan_or_none(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", claims=[claim(mean=math.inf, low=math.nan, high=10**400)])
    rows = [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]
    rows[3]["test_accuracy"] = None
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = load_run(folder)
    assert math.isnan(run.evaluations[3].accuracy)
    assert [run.claims[0][name] for name in ("mean", "low", "high")] == [None, None, None]


@pytest.mark.parametrize("value", [math.nan, "fast", None])
def test_timing_must_be_finite(run_folder: Path, value: object) -> None:
    change(run_folder, "timing.json", training_seconds=value)
    with pytest.raises(RunError, match=r"timing\.json: 'training_seconds' is .*; expected"):
        load_run(run_folder)


@pytest.mark.parametrize("rate", [0, -1, math.inf])
def test_learning_rate_of_a_sweep_must_be_positive(sweep_folder: Path, rate: float) -> None:
    points = json.loads((sweep_folder / "sweep.json").read_text())["points"]
    change(sweep_folder, "sweep.json", points=[points[0] | {"learning_rate": rate}])
    with pytest.raises(RunError, match=r"sweep\.json: point 0: .*learning_rate"):
        load_run(sweep_folder)


def test_unreadable_record_says_why(run_folder: Path) -> None:
    (run_folder / "config.json").unlink()
    (run_folder / "config.json").mkdir()
    with pytest.raises(
        RunError, match=r"config\.json: Is a directory; expected a readable file; check its permissions"
    ):
        load_run(run_folder)


@pytest.mark.parametrize("name", ["other", "<b>\x1b[2J" * 100, ""])
def test_unknown_experiment_is_named(run_folder: Path, name: str) -> None:
    change(run_folder, "config.json", experiment=name)
    with pytest.raises(
        RunError, match=r"config\.json: 'experiment' is .*; expected mnist.*; use the version"
    ) as raised:
        load_run(run_folder)
    assert "\x1b" not in str(raised.value)
    assert len(str(raised.value)) < 500
