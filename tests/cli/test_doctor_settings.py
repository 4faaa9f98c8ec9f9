"""``[tool.batchnorm.doctor]`` and baselines: what is ignored or known does not count, and is not forgotten."""

import json
from pathlib import Path

import pytest

from batchnorm.cli import main
from batchnorm.cli.baseline import compare, read_baseline, write_baseline
from batchnorm.errors import DataError
from examinations import HOSTILE, finding
from small_network import save, trained


@pytest.fixture(autouse=True)
def lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A checkpoint without running statistics, in a folder below the current one's project."""
    folder = tmp_path / "project" / "models"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    save(Path("lost.pt"), dict(trained().named_parameters()))


def doctor(*arguments: object) -> int:
    return main.run(["doctor", "lost.pt", "--output-format", "concise", *map(str, arguments)])


def settings(text: str, place: str = "..") -> Path:
    path = Path(place) / "pyproject.toml"
    path.write_text(text)
    return path


def found(capsys: pytest.CaptureFixture[str]) -> tuple[list[str], list[str]]:
    """Layers and codes on standard output; notes on standard error without the summary."""
    captured = capsys.readouterr()
    places = [":".join(line.split(":")[1:3]).rpartition(" error")[0].strip() for line in captured.out.splitlines()]
    return places, [note for note in captured.err.splitlines() if not note.startswith(("lost.pt: ", "not run: "))]


BOTH = ["bn1: BN100", "bn2: BN100"]


def test_without_settings_everything_counts(capsys: pytest.CaptureFixture[str]):
    assert doctor() == 1
    assert found(capsys) == (BOTH, [])


@pytest.mark.parametrize("table", ['select = ["BN0"]', 'ignore = ["BN100"]', 'ignore = ["bn1"]'])
def test_rules_are_chosen_in_the_nearest_project_file(table: str, capsys: pytest.CaptureFixture[str]):
    settings(f"[tool.batchnorm.doctor]\n{table}")
    settings("[project]\nname = 'nearer, and without our table'", ".")
    assert doctor() == 0
    assert found(capsys) == ([], [])
    settings("[tool.batchnorm.doctor]", ".")
    assert doctor() == 1


def test_options_replace_settings(capsys: pytest.CaptureFixture[str]):
    settings('[tool.batchnorm.doctor]\nselect = ["BN0"]\nignore = ["BN107"]\nfail-on = "info"')
    assert doctor("--select", "BN100") == 1
    assert doctor("--select", "BN10", "--ignore", "BN100") == 0
    assert doctor("--select", "BN100", "--fail-on", "error") == 1


def test_the_threshold_can_be_a_setting(capsys: pytest.CaptureFixture[str]):
    state = {name: value.half() if "running" in name else value for name, value in trained().state_dict().items()}
    save(Path("lost.pt"), state)
    assert doctor() == 0
    settings('[tool.batchnorm.doctor]\nfail-on = "warning"')
    assert doctor() == 1
    assert doctor("--fail-on", "error") == 0


def test_a_layers_findings_are_ignored_and_counted(capsys: pytest.CaptureFixture[str]):
    settings('[tool.batchnorm.doctor]\nper-layer-ignores = {"*2" = ["BN10"]}')
    assert doctor() == 1
    assert found(capsys) == (["bn1: BN100"], ["ignored as pyproject.toml says: 1 finding"])
    settings('[tool.batchnorm.doctor.per-layer-ignores]\n"bn*" = ["BN100"]')
    assert doctor() == 0
    assert found(capsys) == ([], ["ignored as pyproject.toml says: 2 findings"])


def test_ignores_that_are_of_no_use_are_named(capsys: pytest.CaptureFixture[str]):
    settings('[tool.batchnorm.doctor]\nper-layer-ignores = {"bn1" = ["BN100", "BN102"], "bn9" = ["BN1"]}')
    assert doctor() == 1
    assert found(capsys)[1] == [
        "ignored as pyproject.toml says: 1 finding",
        'pyproject.toml ignores what is not there: "bn1" = ["BN102"]',
        'pyproject.toml ignores what is not there: "bn9" = ["BN1"]',
    ]
    assert doctor("--select", "BN100") == 1
    assert found(capsys)[1][1:] == ['pyproject.toml ignores what is not there: "bn9" = ["BN1"]']


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[tool.batchnorm.doctor", "pyproject.toml is no TOML (Expected ']'"),
        ("[tool.batchnorm.doctor]\nselct = []", "there is no 'selct'; did you mean select?"),
        (
            "[tool.batchnorm.doctor]\nqqq = []",
            "there is no 'qqq'; did you mean one of select, ignore, fail-on, per-lay",
        ),
        ("[tool.batchnorm.doctor]\nfail_on = 1", "there is no 'fail_on'; did you mean fail-on?"),
        ("[tool.batchnorm.doctor]\nfail-on = 'never'", "fail-on is never, expected one of error, warning, info"),
        ("[tool.batchnorm.doctor]\nfail-on = [1]", "fail-on is [1], expected one of error, warning, info"),
        ("[tool.batchnorm.doctor]\nselect = 'BN1'", "select is BN1, expected a list of codes"),
        ("[tool.batchnorm.doctor]\nignore = [1]", "ignore is [1], expected a list of codes"),
        ("[tool.batchnorm.doctor]\nignore = ['BN777']", "ignore: no rule's code begins with 'BN777'"),
        ("[tool.batchnorm.doctor]\nignore = ['']", "ignore: no rule's code begins with ''"),
        ("[tool.batchnorm.doctor]\nper-layer-ignores = ['BN1']", "per-layer-ignores is"),
        ("[tool.batchnorm.doctor]\nper-layer-ignores = {'a' = ['X']}", "a: no rule's code begins with 'X'"),
        ("[tool.batchnorm]\ndoctor = 3", "expected a table, found 3"),
    ],
)
def test_unknown_settings_are_one_line_and_status_2(text: str, message: str, capsys: pytest.CaptureFixture[str]):
    settings(text)
    assert doctor() == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    [line] = captured.err.splitlines()
    assert line.startswith("batchnorm: ")
    assert "pyproject.toml" in line
    assert message in line


def test_known_findings_do_not_count_and_new_ones_do(capsys: pytest.CaptureFixture[str]):
    assert doctor("--write-baseline", "known.json") == 0
    assert found(capsys) == (
        [],
        ["wrote known.json: 2 findings known from now on", "known and not counted: 2 findings"],
    )
    assert doctor("--baseline", "known.json") == 0
    assert found(capsys) == ([], ["known and not counted: 2 findings"])
    state = trained().state_dict()
    state["bn1.running_var"][0] = float("nan")
    del state["bn2.running_mean"], state["bn2.running_var"]
    save(Path("lost.pt"), state)
    assert doctor("--baseline", "known.json") == 1
    assert found(capsys) == (
        ["bn1: BN102"],
        ["known and not counted: 1 finding", "known and gone, so write the baseline anew: BN100 bn1"],
    )
    assert doctor("--baseline", "known.json", "--select", "BN0") == 0
    assert found(capsys) == ([], [])


def test_a_baseline_is_readable_and_has_the_same_bytes_each_time(capsys: pytest.CaptureFixture[str]):
    assert doctor("--write-baseline", "known.json") == 0
    first = Path("known.json").read_bytes()
    assert json.loads(first) == {
        "schema_version": 1,
        "findings": [{"code": "BN100", "layer": "bn1"}, {"code": "BN100", "layer": "bn2"}],
    }
    assert doctor("--write-baseline", "known.json") == 0
    assert Path("known.json").read_bytes() == first


def test_a_baseline_keeps_any_name_and_how_often_a_rule_found_something(tmp_path: Path):
    path = tmp_path / "known.json"
    findings = [finding("BN002", "", message=f"member {i}") for i in range(2)]
    findings += [finding("BN100", name) for name in HOSTILE]
    write_baseline(path, findings)
    known = read_baseline(path)
    assert compare(findings, known) == ([], {})
    third = finding("BN002", "", message="one more")
    new, left = compare([*findings, third], known)
    assert new == [third]
    new, left = compare(findings[1:], known)
    assert (new, dict(left)) == ([], {("BN002", ""): 1})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[1]",
        "{}",
        '{"schema_version": 1}',
        '{"schema_version": 1, "findings": [1]}',
        '{"schema_version": 1, "findings": [{"code": 1, "layer": "a"}]}',
        '{"schema_version": 1, "findings": [{"code": [], "layer": "a"}]}',
        "[" * 100_000,
        "\x93NUMPY",
    ],
)
def test_another_file_is_no_baseline_and_never_overwritten(text: str, tmp_path: Path):
    path = tmp_path / "other.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(DataError, match=r"other.json is no baseline: expected a file of batchnorm doctor --write-base"):
        read_baseline(path)
    with pytest.raises(DataError, match="is no baseline"):
        write_baseline(path, [])
    assert path.read_text(encoding="latin-1") == text


def test_a_baseline_of_a_later_version_is_refused(tmp_path: Path):
    path = tmp_path / "known.json"
    path.write_text('{"schema_version": 2, "findings": []}')
    with pytest.raises(DataError, match="is a baseline of version 2, expected 1: write it anew"):
        read_baseline(path)
