"""Jobs to be run in worker processes."""

import os
import signal
import time
from pathlib import Path

import torch

from batchnorm.experiments.workers import report_progress, should_stop


def double(value: int) -> int:
    return 2 * value


def threads() -> int:
    return torch.get_num_threads()


def report(name: str, steps: int) -> None:
    for step in range(steps):
        report_progress(name, step)


def fail(message: str) -> None:
    raise ArithmeticError(message)


def fail_after(path: Path, message: str) -> None:
    while not path.exists():
        time.sleep(0.01)
    raise ArithmeticError(message)


def die_after(path: Path) -> None:
    while not path.exists():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)


def work_until_asked_to_stop(folder: Path) -> str:
    """Leaves ``started``, and ``stopped`` when it was asked to end; a minute at most."""
    (folder / "started").touch()
    for step in range(6000):
        report_progress("work", step)
        if should_stop():
            (folder / "stopped").touch()
            return "stopped"
        time.sleep(0.01)
    return "never asked"


def work_without_looking(folder: Path) -> None:
    (folder / "started").touch()
    time.sleep(60)
