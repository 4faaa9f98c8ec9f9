"""Measure: check a case, time it beside its peers, and make one record per pass and peer."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from batchnorm.benchmarks.cases import EVALUATION, LARGE_BYTES, Case, Inputs, make_inputs, tensors_moved
from batchnorm.benchmarks.correctness import (
    another_function,
    beyond_budget,
    doubled,
    reference_results,
    result_names,
    without_gradient_near_bends,
)
from batchnorm.benchmarks.memory import memory_of
from batchnorm.benchmarks.peers import COPY, OURS, TORCH, Runner, one_line, prepare, serves
from batchnorm.benchmarks.timing import Times, time_in_turn, watch_others

Record = dict[str, Any]


def measure_case(case: Case, peers: Sequence[str], seconds: float, suite: str) -> list[Record]:
    """Records of one case, pass by pass: what was skipped, what was timed, ours last.

    Args:
        case: what to run.
        peers: whom to compare with, names of :data:`~batchnorm.benchmarks.peers.PEERS`.
        seconds: of timing, per pass.
        suite: goes into the records.
    """
    inputs = without_gradient_near_bends(case, make_inputs(case))
    records: list[Record] = []
    for pass_ in case.passes:
        runners, refused = checked_runners(case, pass_, inputs, peers)
        records += refused
        if OURS not in runners:
            continue
        others = watch_others()
        times = time_in_turn(calls_of(runners, inputs), seconds)
        busy = others()
        for name in sorted(times, key=ours_last):
            record = timed(case, pass_, name, times[name])
            records.append({**record, **extras(case, runners.get(name)), "others_cores": busy})
    return [{**record, "suite": suite} for record in records]


def measure_threads(case: Case, counts: Sequence[int], seconds: float, suite: str) -> list[Record]:
    """Records of one case with different numbers of threads, in turn; ours and torch."""
    inputs = without_gradient_near_bends(case, make_inputs(case))
    before = torch.get_num_threads()
    records: list[Record] = []
    for pass_ in case.passes:
        runners, refused = checked_runners(case, pass_, inputs, [TORCH])
        records += refused
        if OURS not in runners:
            continue
        calls = calls_of(runners, inputs)
        others = watch_others()
        try:
            keys = {f"{n} {name}": (n, name) for n in counts for name in sorted(calls, key=ours_last)}
            times = time_in_turn({key: with_threads(n, calls[name]) for key, (n, name) in keys.items()}, seconds)
        finally:
            torch.set_num_threads(before)
        busy = others()
        for key, (n, name) in keys.items():
            records.append({**timed(case, pass_, name, times[key]), "threads": n, "others_cores": busy})
    return [{**record, "suite": suite} for record in records]


def calls_of(runners: Mapping[str, Runner], inputs: Inputs) -> dict[str, Callable[[], Any]]:
    """What is timed: the peers, and torch's copy between two tensors that exist, which reads one and writes one."""
    destination = torch.empty_like(inputs.x)
    return {COPY: lambda: destination.copy_(inputs.x), **{name: runner.call for name, runner in runners.items()}}


def with_threads(count: int, call: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        torch.set_num_threads(count)
        return call()

    return run


def ours_last(name: str) -> bool:
    """A record of ours says that its case is complete."""
    return name == OURS


def checked_runners(
    case: Case, pass_: str, inputs: Inputs, peers: Sequence[str]
) -> tuple[dict[str, Runner], list[Record]]:
    """Whoever computes what they should; records of those who do not. Without ours there is nothing to time."""
    names = result_names(case, pass_)
    exact = reference_results(case, pass_, doubled(inputs))
    baselines = [reference_results(case, pass_, inputs)]
    runners: dict[str, Runner] = {}
    records: list[Record] = []
    # ours after torch, whose error belongs to the budget
    for name in [TORCH, OURS, *(peer for peer in peers if peer != TORCH and serves(peer, case))]:
        try:
            runner = prepare(name, case, pass_, inputs)
            results = runner.as_tensors(runner.call())
            results += [] if pass_ == EVALUATION else [value.clone() for value in runner.statistics()]
            wrong = (
                beyond_budget(names, results, baselines, exact)
                if name == OURS
                else another_function(names, results, exact)
            )
        except Exception as error:
            wrong = one_line(error)
        else:
            if name == TORCH and wrong is None:
                baselines.append(results)
            if wrong is None and (name == OURS or name in peers):
                runners[name] = runner
        if wrong is not None:
            kind = "failed" if name == OURS else "skipped"
            records.append({"kind": kind, "case": case.name, "pass": pass_, "peer": name, "reason": wrong})
        if name == OURS and wrong is not None:
            break
    return runners, records


def timed(case: Case, pass_: str, peer: str, times: Times) -> Record:
    """One line of the record."""
    return {
        "kind": "time",
        "case": case.name,
        "where": case.where,
        "shape": list(case.shape),
        "activation": case.activation,
        "residual": case.residual,
        "dtype": case.dtype,
        "memory_format": case.memory_format,
        "pass": pass_,
        "peer": peer,
        "threads": torch.get_num_threads(),
        "tensor_bytes": case.tensor_bytes,
        "tensors_moved": 2 if peer == COPY else tensors_moved(case, pass_),
        **as_microseconds(times),
    }


def extras(case: Case, runner: Runner | None) -> Record:
    """The runner's notes, and for a large case how much memory a call takes."""
    if runner is None:
        return {}
    memory = memory_of(runner.call) if case.tensor_bytes >= LARGE_BYTES else None
    return runner.notes if memory is None else {**runner.notes, "peak_bytes": memory.peak, "kept_bytes": memory.kept}


def as_microseconds(times: Times) -> Record:
    return {
        "microseconds": round(times.median * 1e6, 3),
        "microseconds_10": round(times.low * 1e6, 3),
        "microseconds_90": round(times.high * 1e6, 3),
        "samples": times.samples,
        "repeats": times.repeats,
    }
