"""The cases: names, bytes, inputs, and that nobody is timed who computes something else."""

import pytest
import torch

import batchnorm.nn
from batchnorm.benchmarks import run
from batchnorm.benchmarks.cases import BOTH, EVALUATION, FORWARD, PASSES, Case, make_inputs, tensors_moved
from batchnorm.benchmarks.correctness import (
    budget,
    doubled,
    reference_results,
    result_names,
    without_gradient_near_bends,
)
from batchnorm.benchmarks.peers import INPLACE, OURS, TORCH, prepare, serves
from batchnorm.benchmarks.suites import FULL, SIZE_CASES, SUITES, THREAD_CASES
from batchnorm.reference import batch_norm_train


def test_names_are_unique():
    names = [case.name for case in FULL]
    assert len(set(names)) == len(names)


def test_the_quick_suite_has_every_kind_of_case():
    quick = SUITES["quick"]
    assert {case.where for case in quick} >= {"ResNet-50", "MobileNetV2", "MNIST network", "very small"}
    assert {pass_ for case in quick for pass_ in case.passes} == set(PASSES)
    assert {case.dtype for case in quick} == {"float32", "bfloat16"}


@pytest.mark.parametrize(
    ("activation", "residual", "pass_", "tensors"),
    [
        ("relu", False, FORWARD, 2),
        ("relu", False, BOTH, 5),
        (None, False, BOTH, 5),
        ("silu", False, BOTH, 5),
        (None, True, BOTH, 6),
        ("relu", True, BOTH, 7),
        ("silu", True, BOTH, 8),
        ("relu", True, EVALUATION, 3),
    ],
)
def test_bytes_that_must_move(activation: str | None, residual: bool, pass_: str, tensors: int):
    assert tensors_moved(Case("", (2, 3), activation, residual), pass_) == tensors


@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
def test_inputs_are_as_the_case_says(memory_format: str):
    case = Case("", (4, 3, 5, 2), residual=True, dtype="bfloat16", memory_format=memory_format)
    inputs = make_inputs(case)
    strides = (30, 10, 2, 1) if memory_format == "contiguous" else (30, 1, 6, 3)
    for tensor in (inputs.x, inputs.residual, inputs.grad_output):
        assert tensor is not None
        assert (tensor.shape, tensor.dtype, tensor.stride()) == ((4, 3, 5, 2), torch.bfloat16, strides)
    assert make_inputs(Case("", (4, 3))).residual is None


def test_no_gradient_where_rounding_decides():
    case = Case("", (1024, 8), "relu6")
    inputs = without_gradient_near_bends(case, make_inputs(case))
    z = batch_norm_train(inputs.x, inputs.weight, inputs.bias).output
    near = torch.minimum(z.abs(), (z - 6).abs()) < torch.finfo(torch.float32).eps ** (1 / 3)
    assert near.any()
    assert torch.equal(inputs.grad_output == 0, near)


VARIANTS = [
    Case("", (16, 3)),
    Case("", (6, 3, 4, 2), "relu6", residual=True, memory_format="channels_last"),
    Case("", (8, 3, 5), None, residual=True, dtype="float64"),
    Case("", (32, 4), dtype="bfloat16"),
]


@pytest.mark.parametrize("pass_", [BOTH, EVALUATION])
@pytest.mark.parametrize("case", VARIANTS, ids=lambda case: case.name)
def test_everybody_computes_the_same(case: Case, pass_: str):
    inputs = without_gradient_near_bends(case, make_inputs(case))
    runners, records = run.checked_runners(case, pass_, inputs, [TORCH, INPLACE])
    assert records == []
    assert set(runners) == {TORCH, OURS} | ({INPLACE} if serves(INPLACE, case) else set())


def test_results_are_named_in_their_order():
    case = Case("", (16, 3), residual=True)
    inputs = make_inputs(case)
    results = dict(zip(result_names(case, BOTH), reference_results(case, BOTH, doubled(inputs)), strict=True))
    assert results["grad_input"].shape == results["grad_residual"].shape == (16, 3)
    assert torch.allclose(results["running_mean"], 0.9 * inputs.running_mean.double() + 0.1 * inputs.x.double().mean(0))


def test_the_budget_is_twice_the_error_and_one_rounding():
    exact = torch.tensor([1.0, 4.0], dtype=torch.float64)
    assert budget([exact.float() + 0.5, exact.float()], exact, torch.float32) == 2 * (
        0.5 + torch.finfo(torch.float32).eps * 4
    )


@pytest.mark.parametrize("amount", [0.01, float("nan")])
@pytest.mark.parametrize("wrong", ["output", "grad_weight", "running_var"])
def test_a_wrong_layer_is_reported_and_not_timed(wrong: str, amount: float, monkeypatch: pytest.MonkeyPatch):
    def spoiled(peer, case, pass_, inputs):
        runner = prepare(peer, case, pass_, inputs)
        names = result_names(case, pass_)
        if peer == OURS:
            call, statistics = runner.call, runner.statistics
            runner.call = lambda: off(names, call())
            runner.statistics = lambda: off(names[-2:], statistics())
        return runner

    def off(names, results):
        return [r + amount if name == wrong else r for name, r in zip(names, results, strict=False)]

    monkeypatch.setattr(run, "prepare", spoiled)
    monkeypatch.setattr(run, "time_in_turn", lambda *_: pytest.fail("was timed"))
    records = run.measure_case(Case("", (16, 3)), [TORCH], 0.01, "quick")
    assert [(record["kind"], record["peer"]) for record in records] == [("failed", OURS)]
    assert records[0]["reason"].startswith(wrong)


def test_a_wrong_or_broken_peer_is_left_out(monkeypatch: pytest.MonkeyPatch):
    def spoiled(peer, case, pass_, inputs):
        if peer == INPLACE:
            raise RuntimeError("no compiler\nand much more")
        runner = prepare(peer, case, pass_, inputs)
        call = runner.call
        runner.call = (lambda: [r + 0.1 for r in call()]) if peer == TORCH else call
        return runner

    monkeypatch.setattr(run, "prepare", spoiled)
    case = Case("", (16, 3))
    runners, records = run.checked_runners(case, FORWARD, make_inputs(case), [TORCH, INPLACE])
    assert list(runners) == [OURS]
    assert [record["kind"] for record in records] == ["skipped", "skipped"]
    assert records[0]["reason"].startswith("output is off by 0.1")
    assert records[1]["reason"] == "RuntimeError: no compiler"


def test_a_layer_that_raises_has_failed(monkeypatch: pytest.MonkeyPatch):
    def forward(*_):
        raise ZeroDivisionError("by nothing")

    monkeypatch.setattr(batchnorm.nn.BatchNorm1d, "forward", forward)
    records = run.measure_case(Case("", (16, 3)), [], 0.01, "quick")
    assert records[0]["reason"] == "ZeroDivisionError: by nothing"


def test_a_record_holds_what_the_tables_need():
    records = run.measure_case(Case("here", (16, 3), passes=(BOTH, EVALUATION)), [TORCH], 0.001, "quick")
    assert [(r["pass"], r["peer"]) for r in records] == [
        (pass_, peer) for pass_ in (BOTH, EVALUATION) for peer in ("copy", TORCH, OURS)
    ]
    for record in records:
        assert record["microseconds_10"] <= record["microseconds"] <= record["microseconds_90"]
        assert record["samples"] >= 5
        assert (record["kind"], record["where"], record["shape"], record["tensor_bytes"]) == (
            "time", "here", [16, 3], 192,
        )  # fmt: skip
    assert records[-1]["implementation"] in ("kernel", "aten")


def test_threads_are_measured_in_turn_and_given_back():
    before = torch.get_num_threads()
    records = run.measure_threads(Case("", (16, 3)), [1, 2], 0.001, "threads")
    assert {(r["threads"], r["peer"]) for r in records} == {(n, peer) for n in (1, 2) for peer in ("copy", TORCH, OURS)}
    assert torch.get_num_threads() == before


def test_cases_of_the_scaling_are_small_to_large():
    sizes = [case.tensor_bytes for case in SIZE_CASES]
    assert sizes == sorted(sizes)
    assert all(case.tensor_bytes >= 2**25 for case in THREAD_CASES)
