"""What running statistics cost: every case checks, is timed in turn, and ends in records."""

from typing import Any

import pytest
import torch
from torch import nn

from batchnorm.benchmarks import statistics
from batchnorm.benchmarks.peers import PeerUnavailableError


class Block(nn.Module):
    """A convolution and the BN behind it, by the names of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.normalization = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.normalization(self.convolution(images))


def small_network() -> nn.Module:
    return nn.Sequential(Block(), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 1000))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(statistics, "resnet18", small_network)


def measure(case: str) -> list[dict[str, Any]]:
    return statistics.measure_statistics(case, 0.001, batch=2, size=8)


@pytest.mark.parametrize("case", statistics.CASES)
def test_every_case_is_timed_beside_the_same_without_it(case: str):
    records = measure(case)
    peers = ["without", "torch", "ours"] if case.startswith("fold") else ["without", "ours"]
    assert [(record["kind"], record["peer"]) for record in records] == [("cost", peer) for peer in peers]
    assert all(record["samples"] >= 5 for record in records)


def test_torchs_own_folding_leaves_no_layer_and_the_same_scores():
    model, images = small_network().eval(), torch.randn(2, 3, 8, 8)
    fused = statistics.fused_by_torch(model)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    assert any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    torch.testing.assert_close(fused(images), model(images))


def test_a_wrong_fold_is_reported_and_not_timed(monkeypatch: pytest.MonkeyPatch):
    def spoil(model: nn.Module, example: torch.Tensor) -> tuple[nn.Module, list[Any]]:
        return nn.Sequential(model, nn.Threshold(torch.inf, 1.0)), []

    monkeypatch.setattr(statistics, "fold", spoil)
    monkeypatch.setattr(statistics, "time_in_turn", lambda *_: pytest.fail("was timed"))
    (record,) = measure("fold of torch")
    assert record["kind"] == "failed"
    assert record["reason"].startswith("scores is off by")


def test_a_missing_library_is_said(monkeypatch: pytest.MonkeyPatch):
    def missing() -> nn.Module:
        raise PeerUnavailableError("transformers is not installed")

    monkeypatch.setattr(statistics, "resnet18", missing)
    (record,) = measure("fold of torch")
    assert (record["kind"], record["reason"]) == ("skipped", "transformers is not installed")
