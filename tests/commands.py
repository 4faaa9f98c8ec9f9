"""Start the command in processes of its own, and look at what they did."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

SMALL_RUN = Path(__file__).with_name("small_run.py")
BATCHNORM = [sys.executable, "-c", "from batchnorm.cli.main import main; main()"]
PATIENCE = 120.0


def small_run(*arguments: object) -> list[str]:
    return [sys.executable, str(SMALL_RUN), "reproduce", "mnist", *map(str, arguments)]


def run_command(
    command: list[str],
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
    patience: float = PATIENCE,
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, **(environment or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=patience,
    )


def start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Start in a session of its own, with standard error in a file; end it with :func:`kill_group`."""
    with open(log, "wb") as file:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=file, start_new_session=True
        )


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL for a process and everything that it started."""
    if session_of(process):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait_for(condition: Callable[[], object], seconds: float = PATIENCE) -> bool:
    """Whether a condition came true in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.01)
    return False


def session_of(leader: subprocess.Popen[bytes]) -> list[int]:
    """The living processes of the session that a process leads or led."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, session = path.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(session) == leader.pid and state != "Z":
            found.append(int(path.parent.name))
    return found


def evidence(folder: Path) -> dict[str, bytes]:
    """What two runs with the same options must have in common, byte for byte."""
    files = [folder / "metrics.jsonl", folder / "claims.json", *folder.glob("checkpoints/*")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
