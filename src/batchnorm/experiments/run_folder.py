"""The folder of a run: created once, locked while in use, resumed only with the same configuration."""

import contextlib
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from batchnorm.errors import RunError
from batchnorm.files import remove_temporary, write_atomic, write_json

CONFIG = "config.json"
CLAIMS = "claims.json"
TIMING = "timing.json"
METRICS = "metrics.jsonl"
LOCK = ".lock"
# Metrics and checkpoints of the tasks while they are trained
WORK = "work"
# What a run leaves in its folder before its configuration stands
OWN = (LOCK, f".{CONFIG}.")
# What a run writes; --force deletes nothing else
WRITTEN = ("*.json", "*.jsonl", "*.svg", "*.png", "report.html", "checkpoints", WORK, LOCK, ".*.tmp")


@contextlib.contextmanager
def open_run(folder: Path, config: dict[str, Any], *, resume: bool, force: bool) -> Iterator[dict[str, Any] | None]:
    """Make or reopen the folder of a run and hold it until the block ends.

    Args:
        folder: of this run alone.
        config: what determines the results; written as ``config.json``, and compared on ``resume``.
        resume: continue the run in the folder. One that was stopped before it wrote anything starts anew.
        force: delete an earlier run in the folder first. A folder that does not hold a run is never deleted.

    Yields:
        The claims of the run if it is finished already, else None.

    Raises:
        RunError: the folder is in use, exists without ``resume`` or ``force``, was made with another configuration,
            is not a run folder, or cannot be written.
    """
    try:
        if force and folder.exists():
            remove_run(folder)
        if resume and not folder.exists():
            raise RunError(f"{folder}: nothing to resume there; leave --resume out to start a run")
        folder.mkdir(parents=True, exist_ok=True)
        if not resume and any(folder.iterdir()):
            raise RunError(
                f"{folder}: exists already and is not empty; continue it with --resume, start over with "
                "--force, or choose another --out"
            )
        with locked(folder):
            if (folder / CONFIG).exists():
                compare(folder / CONFIG, config)
            else:
                refuse_strangers(folder)
                write_json(folder / CONFIG, config)
            remove_temporary(folder)
            finished = all((folder / name).exists() for name in (METRICS, TIMING, CLAIMS))
            if finished:
                remove_work(folder)
            yield read_record(folder / CLAIMS) if finished else None
    except OSError as error:
        where = error.filename or folder
        raise RunError(
            f"{where}: {error.strerror or error}; choose another --out, or free space and use --resume"
        ) from error


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Refuse a folder that another process works in. The lock goes with the process, however it ends."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(folder / LOCK, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RunError(
                f"{folder}: another process is running in it; wait for it or choose another --out"
            ) from error
        yield


def finish_run(folder: Path, rows: list[dict[str, Any]], claims: dict[str, Any]) -> dict[str, Any]:
    """Write metrics and claims; with ``claims.json`` the run is complete, and the working files go."""
    lines = [json.dumps(row, sort_keys=True, allow_nan=False) + "\n" for row in rows]
    write_atomic(folder / METRICS, "".join(lines).encode())
    write_json(folder / CLAIMS, claims)
    remove_work(folder)
    return claims


def remove_work(folder: Path) -> None:
    """Nothing if a run that was killed right after its claims were written has removed it already."""
    if (folder / WORK).exists():
        shutil.rmtree(folder / WORK)


def compare(path: Path, config: dict[str, Any]) -> None:
    recorded = read_record(path)
    given = json.loads(json.dumps(config))
    for place in ("experiment", "options"):
        old, new = recorded.get(place), given.get(place)
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            key = next(key for key in {**old, **new} if old.get(key) != new.get(key))
            raise RunError(
                f"{path}: made with {key}={old.get(key)!r}, now asked for {key}={new.get(key)!r}; "
                "resume with the same options, or choose another --out"
            )
        raise RunError(f"{path}: belongs to {place} {old!r}, not {new!r}; choose another --out")


def read_record(path: Path) -> dict[str, Any]:
    try:
        recorded = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: expected the JSON record of a run, but {error}; choose another --out") from error
    if not isinstance(recorded, dict):
        raise RunError(f"{path}: expected a JSON object, found {type(recorded).__name__}; choose another --out")
    return recorded


def refuse_strangers(folder: Path) -> None:
    strangers = [path.name for path in folder.iterdir() if not path.name.startswith(OWN)]
    if strangers:
        raise RunError(f"{folder}: holds {sorted(strangers)[0]!r} but no {CONFIG}, so it is not a run to resume")


def remove_run(folder: Path) -> None:
    """Delete a run folder, its configuration last; refuse anything else."""
    if folder.is_symlink() or not folder.is_dir():
        raise RunError(f"{folder}: is not a folder itself; choose another --out")
    entries = sorted(folder.iterdir(), key=lambda path: path.name == CONFIG)
    strangers = [path.name for path in entries if not any(path.match(pattern) for pattern in WRITTEN)]
    remains = all(path.name.startswith(OWN) for path in entries)
    if strangers or not (remains or is_run(folder)):
        what = f"holds {strangers[0]!r}, which no run writes" if strangers else f"has no {CONFIG} of a run"
        raise RunError(f"{folder}: {what}, so --force does not delete it; choose another --out")
    with locked(folder):
        for path in entries:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
    (folder / LOCK).unlink(missing_ok=True)


def is_run(folder: Path) -> bool:
    if not (folder / CONFIG).exists():
        return False
    config = read_record(folder / CONFIG)
    return config.get("schema_version") == 1 and isinstance(config.get("experiment"), str)


def default_folder(experiment: str) -> Path:
    """``runs/NAME-TIME``, local time."""
    return Path("runs") / f"{experiment}-{time.strftime('%Y%m%d-%H%M%S')}"


def latest_folder(experiment: str) -> Path:
    """The last run under ``runs``, for ``--resume`` without a folder."""
    folders = sorted(path for path in Path("runs").glob(f"{experiment}-*") if path.is_dir())
    if not folders:
        raise RunError(f"runs: no run of {experiment} to resume there; name its folder with --out")
    return folders[-1]
