"""``batchnorm reproduce`` with the studies: the list, the options, and every experiment at once."""

import json
from pathlib import Path
from typing import Any

import click
import pytest

from batchnorm.cli import options
from batchnorm.cli.main import run
from batchnorm.cli.reproduce import reproduce
from batchnorm.experiments import study
from batchnorm.experiments.catalogue import EXPERIMENTS
from batchnorm.experiments.outside_gradient import STUDY
from batchnorm.experiments.run_folder import open_run
from batchnorm.files import write_json
from commands import BATCHNORM, run_command

RECORD = {"verdict": "reproduced", "claims": []}
# seconds on two cores, which run other tests as well
PATIENCE = 600


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What the command asked for; it only makes the folder of a run that was stopped."""
    calls = []

    def reproduce(name: str, chosen: Any, folder: Path, **arguments: Any) -> dict[str, Any]:
        calls.append((name, chosen, folder, arguments))
        config = {"schema_version": 1, "experiment": name, "options": vars(chosen)}
        with open_run(folder, config, resume=arguments["resume"], force=arguments["force"]):
            write_json(folder / "timing.json", {"training_seconds": 1.0, "arms": {}})
            return RECORD

    monkeypatch.setattr(study, "reproduce_study", reproduce)
    monkeypatch.setattr(options, "write_report", lambda folder: [folder / "report.html"])
    return calls


def command(*arguments: object) -> int:
    return run(["reproduce", "outside-gradient", *map(str, arguments)])


def test_list_shows_every_experiment_with_claim_source_and_minutes(capsys: pytest.CaptureFixture[str]):
    assert run(["reproduce", "--list"]) == 0
    listed = " ".join(capsys.readouterr().out.split())
    for entry in EXPERIMENTS:
        for words in (entry.name, entry.claim, entry.source, f"about {entry.minutes:g} minute"):
            assert words in listed, words


def test_defaults_are_the_study_s(calls: list[tuple[Any, ...]]):
    assert command("--out", "here") == 0
    ((name, chosen, folder, arguments),) = calls
    assert (name, chosen, folder) == ("outside-gradient", STUDY.options, Path("here"))
    assert (arguments["resume"], arguments["force"]) == (False, False)


def test_quick_and_given_options_change_the_settings(calls: list[tuple[Any, ...]]):
    assert command("--quick", "--steps", 7, "--threads", 3) == 0
    assert command("--seeds", 4, "--out", "other") == 0
    (_, quick, folder, arguments), (_, other, *_) = calls
    assert (quick.steps, quick.seeds, arguments["workers"]) == (7, STUDY.quick["seeds"], 3)
    assert folder.match("runs/outside-gradient-*")
    assert (other.steps, other.seeds) == (STUDY.options.steps, (0, 1, 2, 3))


def test_resume_takes_the_settings_of_the_run(calls: list[tuple[Any, ...]]):
    command("--quick", "--seeds", 3, "--out", "here")
    assert command("--resume", "--out", "here") == 0
    assert calls[0][1] == calls[1][1]


def test_resume_refuses_the_settings_of_another_version(calls: list[tuple[Any, ...]], capsys):
    command("--out", "here")
    config = json.loads(Path("here/config.json").read_text())
    config["options"]["colour"] = "red"
    Path("here/config.json").write_text(json.dumps(config))
    assert command("--resume", "--out", "here") == 2
    assert (
        "here/config.json: the options are not those of this version; choose another --out" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--resume", "--force"), "--resume continues a run and --force deletes it: give one of them"),
        (("--resume",), "runs: no run of outside-gradient to resume there; name its folder with --out"),
        (("--steps", 0), "0 is not in the range x>=1"),
        (("--seeds", "many"), "'many' is not a valid integer range"),
    ],
)
def test_bad_options_end_in_one_line(arguments: tuple[object, ...], line: str, capsys: pytest.CaptureFixture[str]):
    assert command(*arguments) == 2
    error = capsys.readouterr().err
    assert line in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["--quick"]])
def test_all_gives_each_experiment_a_folder_and_resumes_what_was_begun(arguments, monkeypatch: pytest.MonkeyPatch):
    given = {}
    find = reproduce.get_command

    def stand_in(ctx: click.Context, name: str) -> click.Command | None:
        options = [click.Option(["--out"]), *(click.Option([flag], is_flag=True) for flag in ("--quick", "--resume"))]
        return find(ctx, name) if name == "all" else click.Command(name, params=options, callback=given_to(name))

    def given_to(name: str):
        return lambda **values: given.update({name: values}) or int(name == "scale")

    monkeypatch.setattr(reproduce, "get_command", stand_in)
    Path("runs/mnist").mkdir(parents=True)
    assert run(["reproduce", "all", "--resume", "--out", "runs", *arguments]) == 1
    quick = "--quick" in arguments
    assert given == {
        entry.name: {"out": f"runs/{entry.name}", "quick": quick, "resume": entry.name == "mnist"}
        for entry in EXPERIMENTS
    }


def test_every_experiment_runs_quickly_and_a_finished_one_is_not_run_again(tmp_path: Path):
    result = run_command([*BATCHNORM, "reproduce", "all", "--quick", "--out", "runs"], cwd=tmp_path, patience=PATIENCE)
    assert result.returncode in (0, 1), result.stderr
    last = result.stdout.splitlines()[-len(EXPERIMENTS) :]
    assert [line.partition(":")[0] for line in last] == [entry.name for entry in EXPERIMENTS]
    for entry in EXPERIMENTS:
        assert (tmp_path / "runs" / entry.name / "report.html").exists()
    again = run_command([*BATCHNORM, "reproduce", "inception", "--resume", "--out", "runs/inception"], cwd=tmp_path)
    assert again.returncode in (0, 1), again.stderr
    assert again.stdout in result.stdout
