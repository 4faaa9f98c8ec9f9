"""Ratios and targets, from nothing but the records."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from batchnorm.benchmarks.cases import BOTH, LARGE_BYTES
from batchnorm.benchmarks.peers import COMPILE, COPY, JAX, MATRIX, OURS, TORCH

Record = dict[str, Any]
STEP_TARGETS = {"MobileNetV2": 1.4, "BN-Inception": 1.15, "ResNet-18": 1.1}
SUITES = ("quick", "full")


class Target(NamedTuple):
    """A promise and what was measured; ``value`` is None where the record does not tell."""

    name: str
    wanted: float
    value: float | None
    detail: str = ""

    @property
    def reached(self) -> bool | None:
        return None if self.value is None else self.value >= self.wanted


class Measured:
    """One pass of one case with the records of everybody, by peer."""

    def __init__(self) -> None:
        self.peers: dict[str, Record] = {}

    @property
    def record(self) -> Record:
        """What describes the case: any of its records."""
        return next(iter(self.peers.values()))

    def ratio(self, *others: str) -> float | None:
        """How many times as long the fastest of the others takes as ours; None where none was measured."""
        times = [self.peers[other]["microseconds"] for other in others if other in self.peers]
        return min(times) / self.peers[OURS]["microseconds"] if times and OURS in self.peers else None

    def bandwidth_share(self, peer: str = OURS) -> float | None:
        """The bytes that must move per second, as a share of those that torch's copy of the same tensor moves."""
        if peer not in self.peers or COPY not in self.peers:
            return None
        own, copied = self.peers[peer], self.peers[COPY]
        return own["tensors_moved"] / own["microseconds"] / (copied["tensors_moved"] / copied["microseconds"])

    def memory(self, name: str, peer: str = OURS) -> float | None:
        """``peak_bytes`` or ``kept_bytes`` in tensors of the case's size."""
        size = self.peers.get(peer, {}).get(name)
        return None if size is None else size / self.record["tensor_bytes"]

    def is_bn_relu(self) -> bool:
        record = self.record
        wanted = ("relu", False, "float32", BOTH)
        return (record["activation"], record["residual"], record["dtype"], record["pass"]) == wanted

    def is_large(self) -> bool:
        return self.record["tensor_bytes"] >= LARGE_BYTES


def cases_of(records: Iterable[Record], suites: Sequence[str] = SUITES) -> list[Measured]:
    """Cases that were timed, in the order of the file; a later record of the same peer replaces an earlier one."""
    found: dict[tuple[Any, ...], Measured] = {}
    for record in records:
        if record["kind"] == "time" and record["suite"] in suites:
            key = record["case"], record["pass"], record["threads"]
            found.setdefault(key, Measured()).peers[record["peer"]] = record
    return [measured for measured in found.values() if OURS in measured.peers]


def geometric_mean(values: Iterable[float | None]) -> float | None:
    """Of those that are numbers; None if there are none.

    Example:
        >>> geometric_mean([1.0, None, 4.0])
        2.0
    """
    logarithms = [math.log(value) for value in values if value is not None]
    return math.exp(math.fsum(logarithms) / len(logarithms)) if logarithms else None


def targets(records: Sequence[Record]) -> list[Target]:
    """What the package promises about speed, with what this record shows."""
    cases = cases_of(records)
    bn_relu = [case for case in cases if case.is_bn_relu()]
    compilers = [peer for peer in (COMPILE, JAX) if any(peer in case.peers for case in bn_relu)]
    compared = f"the faster of {COMPILE} and {JAX}" if len(compilers) != 1 else compilers[0]
    large = [case for case in bn_relu if case.is_large()]
    found = [
        mean_target("BN+ReLU forward+backward float32 against torch", 4.0, bn_relu, lambda case: case.ratio(TORCH)),
        mean_target(
            f"the same against {compared}",
            6.0,
            bn_relu,
            lambda case: case.ratio(COMPILE, JAX),
        ),
        lowest_target("slowest of all cases against torch", 1.0, cases, lambda case: case.ratio(TORCH)),
        lowest_target(
            "share of the copy bandwidth, BN+ReLU forward+backward, large cases", 0.8, large, Measured.bandwidth_share
        ),
    ]
    steps = step_ratios(records)
    for model, wanted in STEP_TARGETS.items():
        found.append(Target(f"training step of {model}, converted", wanted, steps.get((model, "contiguous"))))
    gains = thread_gains(records)
    lowest = min(gains, key=lambda name: gains[name], default=None)
    value = None if lowest is None else gains[lowest]
    found.append(Target("two threads against one, large cases", 1.7, value, described(lowest, gains.values())))
    if whitening := cases_of(records, ["whitening"]):
        name = "whitening against the matrix formulation of the research code"
        found.append(lowest_target(name, 1 / 3, whitening, lambda case: case.ratio(MATRIX)))
    return found


def mean_target(
    name: str, wanted: float, cases: Sequence[Measured], number: Callable[[Measured], float | None]
) -> Target:
    values = [value for case in cases if (value := number(case)) is not None]
    return Target(f"{name}, geometric mean", wanted, geometric_mean(values), f"{len(values)} cases" if values else "")


def lowest_target(
    name: str, wanted: float, cases: Sequence[Measured], number: Callable[[Measured], float | None]
) -> Target:
    """Judged by the lowest case, which the detail names."""
    values = {f"{case.record['case']}, {case.record['pass']}": value for case in cases if (value := number(case))}
    lowest = min(values, key=lambda case: values[case], default=None)
    value = None if lowest is None else values[lowest]
    return Target(f"{name}, lowest", wanted, value, described(lowest, values.values()))


def described(lowest: str | None, values: Iterable[float]) -> str:
    mean = geometric_mean(values)
    return "" if lowest is None or mean is None else f"{lowest}; geometric mean {mean:.2f}"


def step_ratios(records: Iterable[Record]) -> dict[tuple[str, str], float]:
    """How many times as long the unconverted network's step takes, by model and memory format."""
    times: dict[tuple[str, str], dict[str, float]] = {}
    for record in records:
        if record["kind"] == "step":
            key = record["model"], record["memory_format"]
            times.setdefault(key, {})[record["peer"]] = record["microseconds"]
    return {key: both[TORCH] / both[OURS] for key, both in times.items() if {TORCH, OURS} <= both.keys()}


def thread_gains(records: Sequence[Record], peer: str = OURS) -> dict[str, float]:
    """How many times as fast two threads are as one, by case."""
    times: dict[str, dict[int, float]] = {}
    for case in cases_of(records, ["threads"]):
        if peer in case.peers:
            record = case.peers[peer]
            times.setdefault(record["case"], {})[record["threads"]] = record["microseconds"]
    return {name: counts[1] / counts[2] for name, counts in times.items() if {1, 2} <= counts.keys()}
