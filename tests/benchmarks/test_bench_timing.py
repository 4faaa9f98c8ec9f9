"""Clock and memory: taking turns, enough samples, bytes that are really there."""

import gc
import time

import pytest
import torch

from batchnorm.benchmarks import memory, timing
from batchnorm.benchmarks.memory import memory_of
from batchnorm.benchmarks.timing import FEWEST_ROUNDS, cpu_seconds_of_others, time_in_turn, watch_others

MIB = 2**20


def test_everybody_is_called_in_every_round():
    called: list[str] = []
    calls = {name: lambda name=name: called.append(name) or time.sleep(0.0003) for name in "abc"}
    times = time_in_turn(calls, seconds=0)
    assert {t.samples for t in times.values()} == {FEWEST_ROUNDS}
    assert {t.repeats for t in times.values()} == {1}
    # an untimed and a timed call each
    rounds = called[-6 * FEWEST_ROUNDS :]
    for i in range(FEWEST_ROUNDS):
        assert sorted(rounds[6 * i : 6 * i + 6]) == list("aabbcc")


def test_a_sample_of_a_short_call_is_long_enough():
    times = time_in_turn({"short": lambda: None}, seconds=0.001)["short"]
    assert times.repeats > 10
    assert times.low <= times.median <= times.high


def test_the_budget_ends_the_rounds():
    slow = {"slow": lambda: time.sleep(0.002)}
    assert time_in_turn(slow, seconds=0.1)["slow"].samples < 100


def test_no_collection_while_timing_and_the_collector_comes_back():
    seen: list[bool] = []

    def call():
        seen.append(gc.isenabled())
        if len(seen) > 20:
            raise ValueError("in the middle")

    with pytest.raises(ValueError, match="in the middle"):
        time_in_turn({"call": call}, seconds=1)
    assert not any(seen)
    assert gc.isenabled()


def test_memory_is_what_was_held_at_most_and_in_the_end():
    def call():
        # the C library may hold 64 MiB that earlier tests have freed, and give these from there
        first = torch.ones(96 * MIB, dtype=torch.uint8)
        second = torch.ones(128 * MIB, dtype=torch.uint8)
        del second
        return first

    measured = memory_of(call)
    assert measured is not None
    assert abs(measured.peak - 224 * MIB) < 4 * MIB
    assert abs(measured.kept - 96 * MIB) < 4 * MIB


def test_memory_is_unknown_where_the_system_has_no_counter(monkeypatch: pytest.MonkeyPatch, tmp_path):
    monkeypatch.setattr(memory, "CLEAR_REFS", tmp_path / "absent")
    assert memory_of(lambda: pytest.fail("was called")) is None


def test_what_others_use_is_counted_without_us():
    so_far = watch_others()
    time.sleep(0.01)
    used = so_far()
    assert used is not None
    assert used >= 0


def test_what_others_use_is_unknown_without_statistics(monkeypatch: pytest.MonkeyPatch, tmp_path):
    monkeypatch.setattr(timing, "STAT", tmp_path / "absent")
    assert cpu_seconds_of_others() is None
    assert watch_others()() is None
