"""Rules for live models on values that no training makes: they say something or nothing, but never fail."""

import json

import pytest
import torch
from torch import nn

import batchnorm
from batchnorm.doctor.examine import examine

VALUES = [0.0, 1e-45, 1e30, -1e30, float("inf"), -float("inf"), float("nan")]


@pytest.mark.parametrize("seed", range(12))
def test_no_value_makes_a_rule_fail(seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.tensor(VALUES)[torch.randint(len(VALUES), shape, generator=generator)]

    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1, bias=False), batchnorm.nn.BatchNorm2d(4), nn.Flatten()
    )
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point() and torch.rand((), generator=generator) < 0.5:
                tensor.copy_(draw(*tensor.shape))
    model[1].momentum, model[3].momentum = draw().item(), draw().item()
    data = [torch.randn(4, 3, 2, 2), draw(4, 3, 2, 2)]
    for one in examine(model.train(seed % 2 == 0), data, torch.optim.SGD(model.parameters(), 0.1)).findings:
        json.dumps([one.measured, one.threshold], allow_nan=False)
