"""A run folder is made once, held while in use, resumed only as it was made, and nothing else is ever deleted."""

import errno
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from batchnorm.errors import RunError
from batchnorm.experiments.run_folder import finish_run, latest_folder, open_run

CONFIG = {"schema_version": 1, "experiment": "mnist", "options": {"steps": 100, "seeds": (0, 1)}, "notes": []}
CLAIMS = {"verdict": "reproduced", "claims": []}


def enter(folder: Path, *, resume: bool = False, force: bool = False, **options: Any) -> dict[str, Any] | None:
    config = {**CONFIG, "options": {**CONFIG["options"], **options}}
    with open_run(folder, config, resume=resume, force=force) as record:
        return record


def finish(folder: Path, **flags: bool) -> None:
    with open_run(folder, CONFIG, **{"resume": False, "force": False, **flags}) as record:
        assert record is None
        (folder / "work").mkdir(exist_ok=True)
        (folder / "timing.json").write_text("{}")
        finish_run(folder, [{"step": 1}], CLAIMS)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that was started and stopped."""
    enter(tmp_path / "run")
    return tmp_path / "run"


def test_a_new_run_writes_its_configuration(tmp_path: Path):
    assert enter(tmp_path / "a" / "b") is None
    assert json.loads((tmp_path / "a" / "b" / "config.json").read_text()) == json.loads(json.dumps(CONFIG))


def test_an_empty_folder_is_as_good_as_none(tmp_path: Path):
    assert enter(tmp_path) is None
    assert names(tmp_path) == [".lock", "config.json"]


def test_a_folder_with_contents_is_refused(run: Path):
    with pytest.raises(RunError, match=r"run: exists already and is not empty; .*--resume.*--force.*--out"):
        enter(run)


def test_resume_continues_a_stopped_run(run: Path):
    assert enter(run, resume=True) is None


def test_resume_survives_two_crashes_in_a_row(run: Path):
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), open_run(run, CONFIG, resume=True, force=False):
            raise ZeroDivisionError
    finish(run, resume=True)
    assert enter(run, resume=True) == CLAIMS


def test_resume_before_anything_was_written_starts_anew(tmp_path: Path):
    (tmp_path / ".lock").touch()
    (tmp_path / ".config.json.abc.tmp").write_text("{")
    assert enter(tmp_path, resume=True) is None
    assert names(tmp_path) == [".lock", "config.json"]


def test_resume_of_a_finished_run_gives_its_claims_and_changes_nothing(tmp_path: Path):
    finish(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert enter(tmp_path, resume=True) == CLAIMS
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_resume_cleans_up_after_a_run_killed_just_after_its_claims(tmp_path: Path):
    finish(tmp_path)
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "bn.checkpoint").touch()
    (tmp_path / ".claims.json.abc.tmp").touch()
    assert enter(tmp_path, resume=True) == CLAIMS
    assert names(tmp_path) == [".lock", "claims.json", "config.json", "metrics.jsonl", "timing.json"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 200}, r"config\.json: made with steps=100, now asked for steps=200; resume with the same options"),
        ({"seeds": (0,)}, r"made with seeds=\[0, 1\], now asked for seeds=\[0\]"),
        ({"steps": 7, "seeds": (5,)}, r"made with seeds=\[0, 1\], now asked for seeds=\[5\]"),
        ({"new": True}, "made with new=None, now asked for new=True"),
    ],
)
def test_resume_with_other_options_names_the_first_that_differs(run: Path, options: dict[str, Any], message: str):
    before = (run / "config.json").read_bytes()
    with pytest.raises(RunError, match=message):
        enter(run, resume=True, **options)
    assert (run / "config.json").read_bytes() == before


def test_resume_of_another_experiment_is_refused(run: Path):
    with (
        pytest.raises(RunError, match="belongs to experiment 'mnist', not 'inception'"),
        open_run(run, CONFIG | {"experiment": "inception"}, resume=True, force=False),
    ):
        pass


def test_resume_of_a_missing_folder_is_refused(tmp_path: Path):
    with pytest.raises(RunError, match="nowhere: nothing to resume there"):
        enter(tmp_path / "nowhere", resume=True)
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "config.json: expected the JSON record of a run, but"), ("[]", "expected a JSON object, found list")],
)
@pytest.mark.parametrize("flag", ["resume", "force"])
def test_a_broken_configuration_is_refused(run: Path, flag: str, text: str, message: str):
    (run / "config.json").write_text(text)
    with pytest.raises(RunError, match=message):
        enter(run, **{flag: True})
    assert (run / "config.json").read_text() == text


@pytest.mark.parametrize("flag", ["resume", "force"])
def test_a_folder_of_other_files_is_never_taken_or_deleted(tmp_path: Path, flag: str):
    (tmp_path / "thesis.tex").write_text("years of work")
    (tmp_path / ".bashrc").touch()
    with pytest.raises(
        RunError, match=r"holds '\.bashrc', which no run writes, so --force does not|holds '\.bashrc' but no"
    ):
        enter(tmp_path, **{flag: True})
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("missing", ["metrics.jsonl", "timing.json", "claims.json"])
def test_a_run_that_lost_a_record_is_not_finished(tmp_path: Path, missing: str):
    finish(tmp_path)
    (tmp_path / missing).unlink()
    assert enter(tmp_path, resume=True) is None


def test_force_deletes_no_file_that_a_run_does_not_write(run: Path):
    (run / "thesis.tex").write_text("years of work")
    with pytest.raises(RunError, match=r"holds 'thesis\.tex', which no run writes, so --force does not delete it"):
        enter(run, force=True)
    assert names(run) == [".lock", "config.json", "thesis.tex"]


def test_force_does_not_follow_a_link(run: Path, tmp_path: Path):
    (tmp_path / "link").symlink_to(run)
    with pytest.raises(RunError, match="link: is not a folder itself"):
        enter(tmp_path / "link", force=True)
    assert names(run) == [".lock", "config.json"]


def test_force_takes_what_a_run_killed_at_its_start_left(tmp_path: Path):
    (tmp_path / ".lock").touch()
    (tmp_path / ".config.json.abc.tmp").touch()
    assert enter(tmp_path, force=True) is None
    assert names(tmp_path) == [".lock", "config.json"]


def test_force_does_not_delete_a_folder_with_some_other_configuration(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"editor": "vi", "experiment": "mine"}')
    with pytest.raises(RunError, match=r"has no config\.json of a run, so --force does not delete it"):
        enter(tmp_path, force=True)
    assert names(tmp_path) == ["config.json"]


def test_force_starts_over(tmp_path: Path):
    finish(tmp_path)
    (tmp_path / "figure1.svg").touch()
    assert enter(tmp_path, force=True, steps=7) is None
    assert names(tmp_path) == [".lock", "config.json"]
    assert json.loads((tmp_path / "config.json").read_text())["options"]["steps"] == 7


def test_force_of_a_new_folder_makes_it(tmp_path: Path):
    assert enter(tmp_path / "new", force=True) is None


HOLD = """
    import sys
    from pathlib import Path
    from batchnorm.experiments.run_folder import open_run

    config = {"experiment": "mnist", "options": {"steps": 100, "seeds": [0, 1]}}
    with open_run(Path(sys.argv[1]), config, resume=True, force=False):
        print("held", flush=True)
        sys.stdin.read()
"""


@pytest.mark.parametrize("flag", ["resume", "force"])
def test_a_folder_in_use_by_another_process_is_refused_until_that_dies(run: Path, flag: str):
    command = [sys.executable, "-c", textwrap.dedent(HOLD), str(run)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunError, match="run: another process is running in it; wait for it or choose another"):
            enter(run, **{flag: True})
        assert (run / "config.json").exists()
        holder.kill()
    assert enter(run, **{flag: True}) is None


@pytest.mark.parametrize(
    ("flag", "reason"), [("resume", "File exists"), ("force", "is not a folder"), (None, "exists")]
)
def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path, flag: str | None, reason: str):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(RunError, match=rf"file: .*{reason}.*; choose another --out"):
        enter(tmp_path / "file", **({flag: True} if flag else {}))
    assert (tmp_path / "file").read_text() == "kept"


def test_a_path_under_a_file_is_refused(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="file/run: Not a directory; choose another --out"):
        enter(tmp_path / "file" / "run")


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder where nothing can be made")
def test_an_unwritable_place_is_refused():
    with pytest.raises(RunError, match="/proc/run: No such file or directory; choose another --out"):
        enter(Path("/proc/run"))


def test_a_full_disk_is_one_line_and_the_run_resumes(run: Path):
    full = OSError(errno.ENOSPC, "No space left on device", str(run / "work" / "bn.checkpoint"))
    message = r"work/bn\.checkpoint: No space left on device; choose another --out, or free space and use --resume"
    with pytest.raises(RunError, match=message), open_run(run, CONFIG, resume=True, force=False):
        raise full
    assert enter(run, resume=True) is None


def test_the_latest_run_is_the_last_folder_by_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError, match="runs: no run of mnist to resume there; name its folder with --out"):
        latest_folder("mnist")
    for name in ("mnist-20260102-000000", "mnist-20251231-235959", "zebra-20270101-000000"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    (tmp_path / "runs" / "mnist-notes.txt").touch()
    assert latest_folder("mnist") == Path("runs/mnist-20260102-000000")
