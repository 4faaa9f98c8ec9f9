"""The training loop continues with the same bits after any stop, and says so when it cannot."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from tiny_task import OPTIMIZERS, TinyTask, bits, metrics

from batchnorm.errors import RunError
from batchnorm.experiments import training
from batchnorm.experiments.training import StoppedError, read_rows, train


@pytest.fixture(autouse=True)
def look_often(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(training, "LOOK_EVERY", 3)


@pytest.fixture
def checkpoint_at_every_look(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)


def stop_after(step: int):
    """What ``train`` takes as ``on_progress`` and ``should_stop`` to stop at the first look after a step."""
    seen = []
    return {"on_progress": seen.append, "should_stop": lambda: seen[-1] >= step}


def uninterrupted(folder: Path, optimizer: str = "adam") -> tuple[list[bytes], bytes]:
    folder.mkdir()
    task = TinyTask(optimizer)
    train(task, folder)
    return bits(task), metrics(folder)


@pytest.mark.parametrize("stops", [[1], [20], [38], [3, 6, 9, 12, 30], list(range(3, 40, 3))], ids=str)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_stopped_run_resumes_bit_for_bit(tmp_path: Path, optimizer: str, stops: list[int]):
    expected = uninterrupted(tmp_path / "whole", optimizer)
    for stop in stops:
        with pytest.raises(StoppedError):
            train(TinyTask(optimizer), tmp_path, **stop_after(stop))
        torch.manual_seed(stop)
    task = TinyTask(optimizer)
    train(task, tmp_path)
    assert (bits(task), metrics(tmp_path)) == expected


class KilledError(Exception):
    """Stands for the end of the process."""


@pytest.mark.parametrize("moment", range(0, 40, 4))
def test_a_run_that_dies_anywhere_resumes_bit_for_bit(tmp_path: Path, checkpoint_at_every_look, moment: int):
    expected = uninterrupted(tmp_path / "whole")
    task = TinyTask()
    batch = task.batch

    def batch_or_die(step: int) -> tuple[torch.Tensor, ...]:
        if step == moment:
            raise KilledError
        return batch(step)

    task.batch = batch_or_die
    with pytest.raises(KilledError):
        train(task, tmp_path)
    resumed = TinyTask()
    train(resumed, tmp_path)
    assert (bits(resumed), metrics(tmp_path)) == expected


def test_the_time_of_all_resumptions_adds_up(tmp_path: Path):
    with pytest.raises(StoppedError):
        train(TinyTask(), tmp_path, **stop_after(20))
    before = torch.load(tmp_path / "tiny.checkpoint", weights_only=True)["seconds"]
    timing = train(TinyTask(), tmp_path)
    assert all(total > part >= 0 for total, part in zip(timing, before, strict=True))


def test_a_finished_task_is_not_trained_again(tmp_path: Path):
    first, written = uninterrupted(tmp_path / "whole")
    again = TinyTask()
    steps = []
    train(again, tmp_path / "whole", on_progress=steps.append)
    assert (bits(again), metrics(tmp_path / "whole")) == (first, written)
    assert steps == []


def test_each_evaluation_is_one_row_in_the_order_of_the_steps(tmp_path: Path):
    train(TinyTask(), tmp_path)
    assert [row["step"] for row in read_rows(tmp_path / "tiny.jsonl")] == [0, 7, 14, 21, 28, 35, 40]


def test_evaluation_does_not_change_training(tmp_path: Path):
    finals = []
    for every in (1, 7, 39):
        folder = tmp_path / str(every)
        folder.mkdir()
        task = TinyTask(every=every)
        train(task, folder)
        finals.append(bits(task))
    assert finals[0] == finals[1] == finals[2]


def test_progress_is_told_at_every_look_and_at_the_end(tmp_path: Path):
    steps = []
    train(TinyTask(), tmp_path, on_progress=steps.append)
    assert steps == [*range(3, 40, 3), 40]


def test_nan_and_infinity_are_null_in_the_metrics(tmp_path: Path):
    task = TinyTask()
    task.loss_scale = 1e38
    train(task, tmp_path)
    text = metrics(tmp_path).decode()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert [json.loads(line)["error"] for line in text.splitlines()][-1] is None


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    with pytest.raises(StoppedError):
        train(TinyTask(), tmp_path, **stop_after(20))
    return tmp_path


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[: len(data) // 2],
        lambda data: b"not a checkpoint",
        lambda data: data[:100] + b"\xff" * 100 + data[200:],
    ],
    ids=["empty", "truncated", "text", "overwritten"],
)
def test_a_damaged_checkpoint_is_refused(stopped: Path, damage):
    path = stopped / "tiny.checkpoint"
    path.write_bytes(damage(path.read_bytes()))
    message = r"tiny\.checkpoint: not a readable checkpoint of this run \(.+\); start over with --force"
    with pytest.raises(RunError, match=message) as error:
        train(TinyTask(), stopped)
    assert "\n" not in str(error.value)


def test_a_checkpoint_of_another_task_is_refused(stopped: Path):
    (stopped / "tiny.checkpoint").rename(stopped / "other.checkpoint")
    with pytest.raises(RunError, match=r"other\.checkpoint: a checkpoint of task 'tiny', expected 'other'"):
        train(TinyTask(name="other"), stopped)


def test_a_checkpoint_of_another_model_is_refused(stopped: Path):
    task = TinyTask()
    task.model[0] = torch.nn.Linear(3, 8, bias=False)
    with pytest.raises(RunError, match=r"not a readable checkpoint of this run \(Error\(s\) in loading state_dict"):
        train(task, stopped)


def test_a_checkpoint_without_its_fields_is_refused(stopped: Path):
    torch.save({"step": 3}, stopped / "tiny.checkpoint")
    with pytest.raises(RunError, match=r"not a readable checkpoint of this run \('task'\)"):
        train(TinyTask(), stopped)


def test_metrics_shorter_than_the_checkpoint_says_are_refused(stopped: Path):
    length = len(metrics(stopped))
    (stopped / "tiny.jsonl").write_bytes(metrics(stopped)[:-1])
    with pytest.raises(RunError, match=rf"tiny\.jsonl: shorter than the {length} bytes its checkpoint knows of"):
        train(TinyTask(), stopped)


def test_shorter_metrics_of_a_finished_task_are_refused(tmp_path: Path):
    train(TinyTask(), tmp_path)
    (tmp_path / "tiny.jsonl").unlink()
    with pytest.raises(RunError, match=r"tiny\.jsonl: shorter than the \d+ bytes"):
        train(TinyTask(), tmp_path)


@pytest.mark.parametrize("call", range(1, 8))
def test_a_full_disk_stops_with_an_os_error_and_resumes_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint_at_every_look, call: int
):
    expected = uninterrupted(tmp_path / "whole")
    fsync, calls = os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        train(TinyTask(), tmp_path)
    monkeypatch.undo()
    task = TinyTask()
    train(task, tmp_path)
    assert (bits(task), metrics(tmp_path)) == expected
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_checkpoint_made_with_other_settings_is_refused(tmp_path: Path):
    train(TinyTask(steps=40), tmp_path)
    with pytest.raises(RunError, match="made with other settings than adam, 60 steps; start over with --force"):
        train(TinyTask(steps=60), tmp_path)
