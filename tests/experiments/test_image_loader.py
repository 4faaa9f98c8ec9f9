"""Processes prepare the same batches ahead, with one thread each, and a process that dies is named."""

import multiprocessing
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from pictures import ReadingImages, write_shards

from batchnorm.errors import DataError, RunError
from batchnorm.experiments.data.batches import EvalBatches, Loader, TrainBatches
from batchnorm.experiments.data.images import open_images


@pytest.fixture
def loaders() -> Iterator[list[Loader]]:
    """Closed at the end, whatever happens."""
    opened: list[Loader] = []
    yield opened
    for loader in opened:
        loader.close()


def test_processes_make_the_same_batches_and_leave_this_one_alone(tmp_path: Path, loaders: list[Loader]):
    batches = TrainBatches(open_images(write_shards(tmp_path)).train, size=8, batch_size=4, seed=0)
    loader = Loader(batches, workers=2)
    loaders.append(loader)
    state, handler = torch.get_rng_state(), signal.getsignal(signal.SIGCHLD)
    before = multiprocessing.active_children()
    # a run that is resumed at step 3, goes back, and goes on
    for step in (3, 4, 5, 6, 0, 1, 9):
        batch, expected = loader.batch(step), batches[step]
        assert batch.images.equal(expected.images)
        assert batch.labels.equal(expected.labels)
    assert torch.get_rng_state().equal(state)
    assert signal.getsignal(signal.SIGCHLD) is handler
    children = [child for child in multiprocessing.active_children() if child not in before]
    loader.close()
    assert [child.exitcode for child in children] == [0, 0]


def test_an_evaluation_ends_begins_again_and_computes_with_one_thread(loaders: list[Loader]):
    loader = Loader(EvalBatches(ReadingImages(5), size=8, batch_size=2), workers=1)
    loaders.append(loader)
    for _ in range(2):
        batches = [loader.batch(step) for step in range(3)]
        assert [batch.labels.tolist() for batch in batches] == [[0, 1], [2, 3], [4]]
        with pytest.raises(IndexError, match="batch 3 of 3"):
            loader.batch(3)
    assert ((batches[0].images[:, 0] + 1) * 127.5).round().unique().tolist() == [1]


def test_without_processes_batches_are_made_when_they_are_asked_for():
    loader = Loader(EvalBatches(ReadingImages(5), size=8, batch_size=2), workers=0)
    assert loader.batch(2).labels.tolist() == [4]
    assert loader.batch(0).labels.tolist() == [0, 1]
    loader.close()


def test_a_process_that_dies_is_named_and_the_others_end(loaders: list[Loader]):
    loader = Loader(EvalBatches(ReadingImages(40, deadly=30), size=8, batch_size=1), workers=1)
    loaders.append(loader)
    before = multiprocessing.active_children()
    loader.batch(0)
    [child] = [child for child in multiprocessing.active_children() if child not in before]
    with pytest.raises(RunError, match=rf"process that prepares images ended .*{child.pid}.*; continue with --resume"):
        list(map(loader.batch, range(1, 40)))
    assert child not in multiprocessing.active_children()
    # asked again, it begins again
    assert loader.batch(3).labels.tolist() == [3]


def test_a_process_that_was_killed_between_two_evaluations_is_named(loaders: list[Loader]):
    loader = Loader(EvalBatches(ReadingImages(4), size=8, batch_size=2), workers=1)
    loaders.append(loader)
    before = multiprocessing.active_children()
    loader.batch(0)
    [child] = [child for child in multiprocessing.active_children() if child not in before]
    child.kill()
    child.join()
    with pytest.raises(RunError, match=rf"process that prepares images ended .*{child.pid}.*; continue with --resume"):
        loader.batch(0)


def test_a_step_that_raised_is_not_taken_for_the_next_one(loaders: list[Loader]):
    loader = Loader(EvalBatches(ReadingImages(6, faulty=2), size=8, batch_size=2), workers=1)
    loaders.append(loader)
    loader.batch(0)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="cannot read 2"):
            loader.batch(1)
    assert loader.batch(2).labels.tolist() == [4, 5]


def test_a_set_that_was_used_here_goes_to_a_process(tmp_path: Path, loaders: list[Loader]):
    batches = TrainBatches(open_images(write_shards(tmp_path)).train, size=8, batch_size=4, seed=0)
    expected = batches[0]
    loader = Loader(batches, workers=1)
    loaders.append(loader)
    assert loader.batch(0).images.equal(expected.images)


def test_an_error_of_the_data_comes_as_it_is(tmp_path: Path, loaders: list[Loader]):
    data = open_images(write_shards(tmp_path))
    os.unlink(tmp_path / "val-000000.tar")
    loader = Loader(EvalBatches(data.val, size=8, batch_size=2), workers=1)
    loaders.append(loader)
    with pytest.raises(DataError, match=rf"^{re.escape(str(tmp_path))}/val-000000\.tar: .*No such file") as raised:
        loader.batch(0)
    assert "\n" not in str(raised.value)
