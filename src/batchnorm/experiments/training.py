"""The one training loop: steps, evaluations, atomic checkpoints, bit-exact resume.

An experiment hands over a :class:`Task`. The loop leaves two files per task in the folder of the run: ``NAME.jsonl``,
a row per evaluation, and ``NAME.checkpoint``, from which a killed run continues with the same bits.
"""

import io
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from batchnorm.errors import RunError
from batchnorm.files import finite, write_atomic

CHECKPOINT_SECONDS = 10.0
# Progress and the clock are looked at every so many steps; a step of the MNIST stack is about 1.3 ms.
LOOK_EVERY = 50

PHASES = ("batch", "forward", "backward", "optimizer")


class Task(Protocol):
    """What is trained. ``batch`` must depend on the step alone, so that a resumed run sees the same data.

    ``settings`` is a text of all that determines the numbers: a checkpoint made with others is refused.
    """

    name: str
    settings: str
    steps: int
    evaluation_steps: set[int]

    @property
    def model(self) -> nn.Module:
        """What is trained; its whole state is kept."""
        ...

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Of the model's parameters; its state is kept too."""
        ...

    def batch(self, step: int) -> tuple[Tensor, ...]:
        """The data of a step, counted from 0."""
        ...

    @property
    def loss(self) -> Callable[..., Tensor]:
        """The scalar to minimize, of the tensors of a batch."""
        ...

    def evaluate(self, step: int) -> list[dict[str, Any]]:
        """Rows for the metrics after so many steps."""
        ...


class Timing(NamedTuple):
    """Where the time of a task went, in seconds, over all its steps and resumptions."""

    batch: float = 0.0
    forward: float = 0.0
    backward: float = 0.0
    optimizer: float = 0.0
    evaluation: float = 0.0
    checkpoint: float = 0.0


class StoppedError(Exception):
    """Training was asked to stop; everything up to then is in the checkpoint."""


def train(
    task: Task,
    folder: Path,
    *,
    on_progress: Callable[[int], None] = lambda step: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Timing:
    """Train a task from its checkpoint, or from the start, to its last step.

    Args:
        task: what to train.
        folder: where its metrics and checkpoints are kept.
        on_progress: called with the number of finished steps, every 50 steps.
        should_stop: asked as often; True saves a checkpoint and raises :class:`StoppedError`.

    Returns:
        :class:`Timing`.

    Raises:
        RunError: the checkpoint cannot be read or belongs to another task, or the metrics are shorter than it says.
        StoppedError: ``should_stop`` said so.
        OSError: the folder cannot be written; the last checkpoint stays valid.
    """
    metrics_path = folder / f"{task.name}.jsonl"
    checkpoint_path = folder / f"{task.name}.checkpoint"
    first, metrics_length, seconds = load_checkpoint(checkpoint_path, task)
    clock = time.perf_counter
    saved_at = clock()
    model, optimizer = task.model, task.optimizer
    model.train()
    with open_truncated(metrics_path, metrics_length) as metrics:
        if first == task.steps:
            return Timing(*seconds)

        def evaluate(step: int) -> None:
            started = clock()
            model.eval()
            for row in task.evaluate(step):
                metrics.write(json.dumps(finite(row), allow_nan=False).encode() + b"\n")
            model.train()
            seconds[4] += clock() - started

        def save(step: int) -> None:
            nonlocal saved_at
            started = clock()
            metrics.flush()
            os.fsync(metrics.fileno())
            save_checkpoint(checkpoint_path, task, step, metrics.tell(), seconds)
            saved_at = clock()
            seconds[5] += saved_at - started

        if first == 0 and 0 in task.evaluation_steps:
            evaluate(0)
        for step in range(first, task.steps):
            t0 = clock()
            batch = task.batch(step)
            t1 = clock()
            loss = task.loss(*batch)
            t2 = clock()
            optimizer.zero_grad()
            loss.backward()
            t3 = clock()
            optimizer.step()
            t4 = clock()
            seconds[0] += t1 - t0
            seconds[1] += t2 - t1
            seconds[2] += t3 - t2
            seconds[3] += t4 - t3
            done = step + 1
            if done in task.evaluation_steps:
                evaluate(done)
            if done % LOOK_EVERY == 0:
                on_progress(done)
                if should_stop():
                    save(done)
                    raise StoppedError
                if clock() - saved_at > CHECKPOINT_SECONDS:
                    save(done)
        save(task.steps)
    on_progress(task.steps)
    return Timing(*seconds)


def save_checkpoint(path: Path, task: Task, step: int, metrics_length: int, seconds: list[float]) -> None:
    """Everything that the next step depends on, in one file that is whole or absent."""
    buffer = io.BytesIO()
    state = {
        "task": task.name,
        "settings": task.settings,
        "step": step,
        "metrics_length": metrics_length,
        "seconds": list(seconds),
        "model": task.model.state_dict(),
        "optimizer": task.optimizer.state_dict(),
        "generator": torch.get_rng_state(),
    }
    torch.save(state, buffer)
    write_atomic(path, buffer.getvalue())


def load_checkpoint(path: Path, task: Task) -> tuple[int, int, list[float]]:
    """Restore a task; the number of finished steps, the length of its metrics then, and the seconds so far."""
    if not path.exists():
        return 0, 0, list(Timing())
    try:
        state = torch.load(path, weights_only=True)
        if state["task"] != task.name:
            raise RunError(f"{path}: a checkpoint of task {state['task']!r}, expected {task.name!r}")
        if state["settings"] != task.settings:
            raise RunError(f"{path}: made with other settings than {task.settings}; start over with --force")
        task.model.load_state_dict(state["model"])
        task.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["generator"])
        return state["step"], state["metrics_length"], state["seconds"]
    except RunError:
        raise
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RunError(f"{path}: not a readable checkpoint of this run ({reason}); start over with --force") from error


def open_truncated(path: Path, length: int) -> io.BufferedRandom:
    """Open for appending after ``length`` bytes: what a killed run wrote after its checkpoint comes again."""
    file = open(path, "r+b" if path.exists() else "w+b")  # noqa: SIM115
    if os.fstat(file.fileno()).st_size < length:
        file.close()
        raise RunError(f"{path}: shorter than the {length} bytes its checkpoint knows of; start over with --force")
    file.truncate(length)
    file.seek(length)
    return file


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a metrics file."""
    with open(path) as file:
        for line in file:
            yield json.loads(line)
