"""Whole training steps, converted and not."""

import pytest
import torch
from torch import nn

from batchnorm.benchmarks import steps
from batchnorm.benchmarks.peers import PeerUnavailableError
from batchnorm.experiments.models.inception import Inception


def small_network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)
    )


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(steps, "MODELS", {"small": small_network})
    monkeypatch.setattr(steps, "CLASSES", 5)


@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
def test_both_networks_are_timed(memory_format: str):
    records = steps.measure_steps("small", memory_format, 0.001, batch=2, size=8)
    assert [(record["kind"], record["peer"]) for record in records] == [("step", "torch"), ("step", "ours")]
    assert [record["changes"] for record in records] == [1, 1]
    assert all(record["samples"] >= 5 for record in records)


def test_a_wrong_conversion_is_reported_and_not_timed(monkeypatch: pytest.MonkeyPatch):
    def spoil(model: nn.Module, example: torch.Tensor):
        with torch.no_grad():
            model.get_parameter("5.bias").add_(0.1)
        return model, []

    monkeypatch.setattr(steps, "convert", spoil)
    monkeypatch.setattr(steps, "time_in_turn", lambda *_: pytest.fail("was timed"))
    (record,) = steps.measure_steps("small", "contiguous", 0.001, batch=2, size=8)
    assert record["kind"] == "failed"
    assert record["reason"].startswith("scores is off by 0.1")


def test_a_missing_library_is_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(steps.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(PeerUnavailableError, match=r"transformers is not installed: pip install 'batchnorm\[bench\]'"):
        steps.resnet18()
    monkeypatch.setattr(steps, "MODELS", {"small": steps.resnet18})
    assert steps.measure_steps("small", "contiguous", 0.001)[0]["kind"] == "skipped"


def test_comparing_changes_neither_network():
    network = Inception(5, fused=False)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert steps.different_scores(network, network) is None
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
