"""Repair of live models: always a copy, safe ones with the outputs of the model, and all of it or nothing."""

from typing import Any

import pytest
import torch
from torch import nn

import batchnorm
from batchnorm.doctor.fixes import model as fixes
from batchnorm.nn.batchnorm import FusedBatchNorm

X = torch.randn(64, 4, generator=torch.Generator().manual_seed(0)) * 3 + 1


def network(**options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    bias = options.pop("bias", False)
    model = nn.Sequential(nn.Linear(4, 6, bias=bias), nn.BatchNorm1d(6, **options), nn.ReLU(), nn.Linear(6, 2))
    for _ in range(3):
        model(X)
    return model


def inputs(model: Any) -> list[torch.Tensor]:
    return [X.to(model[0].weight.dtype)]


def output(model: nn.Module) -> torch.Tensor:
    mode = model.training
    with torch.no_grad():
        result = model.eval()(*inputs(model))
    model.train(mode)
    return result


def repair(model: nn.Module, code: str, **options: Any) -> Any:
    return batchnorm.repair(model, loader=inputs(model), select=code, **options)


def half(model: nn.Sequential) -> nn.Sequential:
    return model.bfloat16()


def half_frozen(model: nn.Sequential) -> nn.Sequential:
    model[1].requires_grad_(False)
    return model


def uncounted(model: nn.Sequential) -> nn.Sequential:
    model[1].num_batches_tracked.zero_()
    return model


@pytest.mark.parametrize(
    ("code", "model"),
    [
        ("BN107", half(network())),
        ("BN105", uncounted(network())),
        ("BN201", network(bias=True)),
        ("BN203", network(momentum=None)),
        ("BN302", half_frozen(network())),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_safe_repair_keeps_the_output_and_its_finding_is_gone(code: str, model: nn.Sequential):
    before, state = output(model), {name: value.clone() for name, value in model.state_dict().items()}
    assert [finding.code for finding in batchnorm.examine(model, inputs(model), select=code).findings] == [code]
    repaired = repair(model, code, batches=3)
    assert [(each.code, each.action.value, each.safe) for each in repaired.outcomes] == [(code, "fixed", True)]
    assert repaired.left.findings == []
    assert "by running both" in repaired.proof
    tolerance = 1e-2 if code == "BN107" else 1e-4
    torch.testing.assert_close(output(repaired.model), before, rtol=tolerance, atol=tolerance)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(output(model), before)


def test_the_bias_is_gone_and_the_running_mean_took_it_in():
    model = network(bias=True)
    repaired = repair(model, "BN201").model
    assert repaired[0].bias is None
    torch.testing.assert_close(repaired[1].running_mean, model[1].running_mean - model[0].bias.detach())


def test_momentum_none_becomes_our_layer():
    repaired = repair(network(momentum=None), "BN203").model
    assert isinstance(repaired[1], FusedBatchNorm)
    assert repaired[1].momentum is None


def test_a_momentum_of_the_other_sense_is_turned_only_with_leave():
    model = network(momentum=0.99)
    assert repair(model, "BN202").model[1].momentum == 0.99
    repaired = repair(model, "BN202", unsafe=True)
    assert repaired.model[1].momentum == 0.01
    assert model[1].momentum == 0.99
    refused = repair(network(momentum=1.0), "BN202", unsafe=True)
    assert [each.what for each in refused.outcomes] == ["1 - 1 is no weight of a new batch"]


def test_broken_statistics_of_a_model_are_measured_in_the_copy():
    model = network()
    model[1].running_var[2] = torch.inf
    repaired = repair(model, "BN102", unsafe=True)
    torch.testing.assert_close(repaired.model[1].running_var, model[0](X).var(0))
    assert model[1].running_var[2] == torch.inf
    assert [each.action.value for each in repaired.outcomes] == ["fixed"]


def test_a_safe_repair_that_changes_the_output_is_undone(monkeypatch: pytest.MonkeyPatch):
    def wrong(model: Any, findings: Any, batches: Any) -> Any:
        outcomes = fixes.absorb(model, findings, batches)
        model[1].running_mean += 1
        return outcomes

    monkeypatch.setitem(fixes.SAFE, "BN201", wrong)
    model = network(bias=True)
    repaired = repair(model, "BN201")
    assert torch.equal(output(repaired.model), output(model))
    assert [each.action.value for each in repaired.outcomes] == ["refused"]
    assert repaired.outcomes[0].what.startswith("undone: it changed the evaluation output by up to ")
    assert repaired.comparison.changed == []


def test_an_error_in_the_middle_leaves_the_model_alone(monkeypatch: pytest.MonkeyPatch):
    def failing(model: Any, findings: Any, batches: Any) -> Any:
        fixes.absorb(model, findings, batches)
        raise RuntimeError("in the middle")

    monkeypatch.setitem(fixes.SAFE, "BN201", failing)
    model = network(bias=True)
    before = output(model)
    with pytest.raises(RuntimeError, match="in the middle"):
        repair(model, "BN201")
    assert torch.equal(output(model), before)
    assert model[0].bias is not None


def test_a_live_model_is_not_written_by_save(tmp_path: Any):
    with pytest.raises(ValueError, match="a live model is saved with"):
        repair(network(bias=True), "BN201").save(tmp_path / "model.pt")
