"""The one training loop: steps, evaluations, atomic checkpoints, bit-exact resume.

An experiment hands over a :class:`Task`. The loop leaves two files per task in the folder of the run: ``NAME.jsonl``,
a row per evaluation, and ``NAME.checkpoint``, from which a killed run continues with the same bits. Under ``torchrun``
every process runs the loop and the first one writes.
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
from batchnorm.experiments.distributed import Team
from batchnorm.files import finite, write_atomic

CHECKPOINT_SECONDS = 10.0
# Progress and the clock are looked at every so many steps; a step of the MNIST stack is about 1.3 ms.
LOOK_EVERY = 50

PHASES = ("batch", "forward", "backward", "optimizer")


class Task(Protocol):
    """What is trained. ``batch`` must depend on its index alone, so that a resumed run sees the same data.

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

    def batch(self, index: int) -> tuple[Tensor, ...]:
        """The mini-batch of this index, counted from 0; a step takes one, or several where it accumulates."""
        ...

    @property
    def loss(self) -> Callable[..., Tensor]:
        """The scalar to minimize, of the tensors of a batch."""
        ...

    def evaluate(self, step: int) -> list[dict[str, Any]]:
        """Rows for the metrics after so many steps."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs besides model, optimizer and torch's generators: tensors and plain values."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
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
    learning_rate: Callable[[int], float] | None = None,
    accumulate: int = 1,
    team: Team | None = None,
    on_row: Callable[[dict[str, Any]], None] = lambda row: None,
    look_every: int | None = None,
    on_progress: Callable[[int], None] = lambda step: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Timing:
    """Train a task from its checkpoint, or from the start, to its last step.

    Args:
        task: what to train.
        folder: where its metrics and checkpoints are kept.
        learning_rate: of a step, counted from 0; None leaves the optimizer's.
        accumulate: mini-batches whose gradients are averaged for a step.
        team: the processes that train together; None for this one alone.
        on_row: called with every row of the metrics, once it is written.
        look_every: how many steps pass between two calls of the next; 50 by default.
        on_progress: called with the number of finished steps.
        should_stop: asked as often; True in any process saves a checkpoint and raises :class:`StoppedError`.

    Returns:
        :class:`Timing`.

    Raises:
        RunError: the checkpoint cannot be read or belongs to another task, or the metrics are shorter than it says.
        StoppedError: ``should_stop`` said so.
        OSError: the folder cannot be written; the last checkpoint stays valid.
    """
    metrics_path = folder / f"{task.name}.jsonl"
    checkpoint_path = folder / f"{task.name}.checkpoint"
    team = team or Team(torch.device("cpu"))
    look_every = look_every or LOOK_EVERY
    first, metrics_length, seconds = load_checkpoint(checkpoint_path, task, team)
    clock = time.perf_counter
    saved_at = clock()
    model, optimizer = task.model, task.optimizer
    model.train()
    with open_truncated(metrics_path if team.is_first else Path(os.devnull), metrics_length) as metrics:
        if first == task.steps:
            return Timing(*seconds)

        def evaluate(step: int) -> None:
            started = clock()
            model.eval()
            for row in map(finite, task.evaluate(step)):
                metrics.write(json.dumps(row, allow_nan=False).encode() + b"\n")
                if team.is_first:
                    on_row(row)
            model.train()
            seconds[4] += clock() - started

        def save(step: int) -> None:
            nonlocal saved_at
            started = clock()
            generators = team.gather(generator_states(team.device))
            if team.is_first:
                metrics.flush()
                os.fsync(metrics.fileno())
                save_checkpoint(checkpoint_path, task, step, metrics.tell(), seconds, generators)
            # nobody goes on, or ends, before the checkpoint is there
            team.wait()
            saved_at = clock()
            seconds[5] += saved_at - started

        if first == 0 and 0 in task.evaluation_steps:
            evaluate(0)
        for step in range(first, task.steps):
            if learning_rate is not None:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step)
            optimizer.zero_grad()
            for part in range(accumulate):
                t0 = clock()
                batch = task.batch(step * accumulate + part)
                t1 = clock()
                with team.accumulating(part == accumulate - 1):
                    loss = task.loss(*batch)
                    t2 = clock()
                    (loss if accumulate == 1 else loss / accumulate).backward()
                t3 = clock()
                seconds[0] += t1 - t0
                seconds[1] += t2 - t1
                seconds[2] += t3 - t2
            optimizer.step()
            seconds[3] += clock() - t3  # pyright: ignore[reportPossiblyUnboundVariable]
            done = step + 1
            if done in task.evaluation_steps:
                evaluate(done)
            if done % look_every == 0:
                on_progress(done)
                if team.any(should_stop()):
                    save(done)
                    raise StoppedError
                if team.any(clock() - saved_at > CHECKPOINT_SECONDS):
                    save(done)
        save(task.steps)
    on_progress(task.steps)
    return Timing(*seconds)


def generator_states(device: torch.device) -> dict[str, Tensor]:
    """Of the generators that dropout and the like draw from; data has generators of its own."""
    states = {"cpu": torch.get_rng_state()}
    return states | {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else states


def save_checkpoint(
    path: Path, task: Task, step: int, metrics_length: int, seconds: list[float], generators: list[dict[str, Tensor]]
) -> None:
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
        "state": task.state_dict(),
        "generators": generators,
    }
    torch.save(state, buffer)
    write_atomic(path, buffer.getvalue())


def load_checkpoint(path: Path, task: Task, team: Team) -> tuple[int, int, list[float]]:
    """Restore a task; the number of finished steps, the length of its metrics then, and the seconds so far."""
    if not path.exists():
        return 0, 0, list(Timing())
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        if state["task"] != task.name:
            raise RunError(f"{path}: a checkpoint of task {state['task']!r}, expected {task.name!r}")
        if state["settings"] != task.settings:
            raise RunError(f"{path}: made with other settings than {task.settings}; start over with --force")
        task.model.load_state_dict(state["model"])
        task.optimizer.load_state_dict(state["optimizer"])
        task.load_state_dict(state["state"])
        generators = state["generators"][team.rank]
        torch.set_rng_state(generators["cpu"])
        if "cuda" in generators:
            torch.cuda.set_rng_state(generators["cuda"], team.device)
        return state["step"], state["metrics_length"], state["seconds"]
    except RunError:
        raise
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RunError(f"{path}: not a readable checkpoint of this run ({reason}); start over with --force") from error


def open_truncated(path: Path, length: int) -> io.BufferedRandom:
    """Open for appending after ``length`` bytes: what a killed run wrote after its checkpoint comes again."""
    file = open(path, "r+b" if path.exists() else "w+b")  # noqa: SIM115
    if path == Path(os.devnull):
        return file
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


def describe_timing(timing: Timing, steps: int, networks: int) -> dict[str, Any]:
    """Per step of so many networks at once in microseconds; what is not a step in seconds."""
    per_step = {phase: round(getattr(timing, phase) / steps * 1e6, 1) for phase in PHASES}
    return {
        "networks": networks,
        "steps_per_second": round(1e6 / sum(per_step.values()), 1),
        "step_microseconds": per_step,
        "evaluation_seconds": round(timing.evaluation, 2),
        "checkpoint_seconds": round(timing.checkpoint, 2),
    }
