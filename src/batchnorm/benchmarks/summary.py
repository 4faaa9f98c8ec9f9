"""Ratios and targets, from nothing but the records."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from batchnorm.benchmarks.cases import BOTH, LARGE_BYTES
from batchnorm.benchmarks.peers import COMPILE, COPY, JAX, MATRIX, OURS, TORCH, WITHOUT

Record = dict[str, Any]
STEP_TARGETS = {"MobileNetV2": 1.4, "BN-Inception": 1.15, "ResNet-18": 1.1}
SUITES = ("quick", "full")
# name, wanted, cases, and who is compared
COST_TARGETS = (
    ("evaluation against recalibration, ResNet-18", 1 / 1.05, "recalibrate", WITHOUT),
    ("training step without deferred_stats against with it, ResNet-18", 1 / 1.02, "deferred_stats", WITHOUT),
    ("folded ResNet-18 against torch's own folding", 1.0, "fold", TORCH),
)


class Target(NamedTuple):
    """A promise and what was measured."""

    name: str
    wanted: float
    value: float
    detail: str = ""

    @property
    def reached(self) -> bool:
        return self.value >= self.wanted


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
    """What the package promises about speed and this record can tell, with what it shows."""
    cases, whitening = cases_of(records), cases_of(records, ["whitening"])
    bn_relu = [case for case in cases if case.is_bn_relu()]
    large = [case for case in bn_relu if case.is_large()]
    compilers = [peer for peer in (COMPILE, JAX) if any(peer in case.peers for case in bn_relu)]
    compared = f"the faster of {COMPILE} and {JAX}" if len(compilers) != 1 else compilers[0]
    found = [
        mean_target("BN+ReLU forward+backward float32 against torch", 4.0, by_case(bn_relu, lambda c: c.ratio(TORCH))),
        mean_target(f"the same against {compared}", 6.0, by_case(bn_relu, lambda c: c.ratio(COMPILE, JAX))),
        lowest_target("slowest of all cases against torch", 1.0, by_case(cases, lambda c: c.ratio(TORCH))),
        lowest_target(
            "share of the copy bandwidth, BN+ReLU forward+backward, large cases",
            0.8,
            by_case(large, Measured.bandwidth_share),
        ),
        *(
            lowest_target(f"training step of {model}, converted", wanted, {"": value})
            for model, wanted in STEP_TARGETS.items()
            if (value := step_ratios(records).get((model, "contiguous"))) is not None
        ),
        lowest_target("two threads against one, large cases", 1.7, thread_gains(records)),
        lowest_target(
            "whitening against the matrix formulation of the research code",
            1 / 3,
            by_case(whitening, lambda c: c.ratio(MATRIX)),
        ),
        *(lowest_target(name, wanted, cost_ratios(records, what, peer)) for name, wanted, what, peer in COST_TARGETS),
    ]
    return [target for target in found if target is not None]


def by_case(cases: Sequence[Measured], number: Callable[[Measured], float | None]) -> dict[str, float]:
    """A number of each case and pass that has it."""
    return {f"{c.record['case']}, {c.record['pass']}": value for c in cases if (value := number(c)) is not None}


def mean_target(name: str, wanted: float, values: dict[str, float]) -> Target | None:
    mean = geometric_mean(values.values())
    return None if mean is None else Target(f"{name}, geometric mean", wanted, mean, f"{len(values)} cases")


def lowest_target(name: str, wanted: float, values: dict[str, float]) -> Target | None:
    """Judged by the lowest case, which the detail names."""
    if not values:
        return None
    lowest = min(values, key=lambda case: values[case])
    if len(values) == 1:
        return Target(name, wanted, values[lowest], lowest)
    detail = f"{lowest}; geometric mean {geometric_mean(values.values()):.2f}"
    return Target(f"{name}, lowest", wanted, values[lowest], detail)


def step_ratios(records: Iterable[Record]) -> dict[tuple[str, str], float]:
    """How many times as long the unconverted network's step takes, by model and memory format."""
    times: dict[tuple[str, str], dict[str, float]] = {}
    for record in records:
        if record["kind"] == "step":
            key = record["model"], record["memory_format"]
            times.setdefault(key, {})[record["peer"]] = record["microseconds"]
    return {key: both[TORCH] / both[OURS] for key, both in times.items() if {TORCH, OURS} <= both.keys()}


def cost_ratios(records: Iterable[Record], what: str, peer: str) -> dict[str, float]:
    """How many times as long the peer takes as ours, by case of one kind, such as "fold"."""
    times: dict[str, dict[str, float]] = {}
    for record in records:
        if record["kind"] == "cost" and record["case"].startswith(f"{what} of "):
            times.setdefault(record["case"], {})[record["peer"]] = record["microseconds"]
    return {case: both[peer] / both[OURS] for case, both in times.items() if {peer, OURS} <= both.keys()}


def thread_gains(records: Sequence[Record], peer: str = OURS) -> dict[str, float]:
    """How many times as fast two threads are as one, by case."""
    times: dict[str, dict[int, float]] = {}
    for case in cases_of(records, ["threads"]):
        if peer in case.peers:
            record = case.peers[peer]
            times.setdefault(record["case"], {})[record["threads"]] = record["microseconds"]
    return {name: counts[1] / counts[2] for name, counts in times.items() if {1, 2} <= counts.keys()}
