"""Times that can be compared: all peers in turn, round after round, so that other work on the machine hits all."""

import contextlib
import gc
import math
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

# A sample of a short call repeats it until the sample is this long; the clock and the loop then cost less than 1 %
SAMPLE_SECONDS = 200e-6
FEWEST_ROUNDS, MOST_ROUNDS = 5, 400

STAT = Path("/proc/stat")

Calls = Mapping[str, Callable[[], Any]]


class Times(NamedTuple):
    """Seconds of one call: median, 10 % and 90 % quantile of so many samples, each the mean of ``repeats`` calls."""

    median: float
    low: float
    high: float
    samples: int
    repeats: int


def time_in_turn(calls: Calls, seconds: float) -> dict[str, Times]:
    """Time several calls in rounds; within a round each is called once untimed, then timed, in an order that is drawn.

    The untimed call leaves caches, memory and threads as a series of such calls would, not as the call before did: the
    threads of one library still spin for a moment when the next one starts.

    Args:
        calls: by name. Each was called before, so that nothing is compiled or loaded any more.
        seconds: stop after the round in which so much time has passed, at least :data:`FEWEST_ROUNDS` rounds.

    Example:
        >>> times = time_in_turn({"nothing": lambda: None}, seconds=0.01)
        >>> times["nothing"].low <= times["nothing"].median <= times["nothing"].high
        True
    """
    order = random.Random(0)
    names = list(calls)
    samples: dict[str, list[float]] = {name: [] for name in names}
    with collector_off():
        repeats = {name: repeats_of(call) for name, call in calls.items()}
        begin = time.perf_counter()
        for done in range(MOST_ROUNDS):
            if done >= FEWEST_ROUNDS and time.perf_counter() - begin > seconds:
                break
            for name in order.sample(names, len(names)):
                samples[name].append(sample(calls[name], repeats[name]))
    return {name: summarize(samples[name], repeats[name]) for name in names}


def sample(call: Callable[[], Any], repeats: int) -> float:
    """Seconds per call, after one that is not timed."""
    call()
    start = time.perf_counter_ns()
    for _ in range(repeats):
        call()
    return (time.perf_counter_ns() - start) / repeats / 1e9


def repeats_of(call: Callable[[], Any]) -> int:
    """Calls in a sample; where that may be more than one, by the fastest of three, as the first can be slow."""
    first = sample(call, 1)
    if first > 10 * SAMPLE_SECONDS:
        return 1
    fastest = min(first, sample(call, 1), sample(call, 1))
    return max(1, math.ceil(SAMPLE_SECONDS / max(fastest, 1e-9)))


def summarize(samples: list[float], repeats: int) -> Times:
    deciles = quantiles(samples, n=10, method="inclusive")
    return Times(median(samples), deciles[0], deciles[-1], len(samples), repeats)


@contextlib.contextmanager
def collector_off() -> Iterator[None]:
    """No garbage collection in the middle of a sample."""
    gc.collect()
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def watch_others() -> Callable[[], float | None]:
    """Begin to watch; the returned function tells how many cores the rest of the machine has used since.

    More than a few hundredths, and the times are those of a busy machine. None where the system cannot tell.
    """
    begin, start = cpu_seconds_of_others(), time.perf_counter()

    def so_far() -> float | None:
        end = cpu_seconds_of_others()
        if begin is None or end is None:
            return None
        return round(max(end - begin, 0.0) / max(time.perf_counter() - start, 1e-9), 3)

    return so_far


def cpu_seconds_of_others() -> float | None:
    """Seconds of all cores since the start of the machine, less our own: user, nice, system, irq, softirq, steal."""
    try:
        ticks = [int(word) for word in STAT.read_text().split("\n", 1)[0].split()[1:9]]
    except (OSError, ValueError):
        return None
    own = os.times()
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK") - sum(own[:4])
