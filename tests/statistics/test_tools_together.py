"""Freezing, choosing what normalizes, recalibrating and deferring, on one model."""

import copy

import torch
from torch import nn

from batchnorm.statistics import deferred_stats, freeze, normalize_by, recalibrate


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4)).double()


def batches() -> list[torch.Tensor]:
    return [torch.randn(8, 3, dtype=torch.float64) + 2 for _ in range(3)]


def test_a_frozen_layer_is_reported_by_recalibrate_and_keeps_its_statistics():
    model, data = network(), batches()
    model(data[0])
    freeze(model, "1")
    before = copy.deepcopy(model[1].state_dict())
    done = recalibrate(model, data)
    assert done.frozen == ["1"]
    assert all(torch.equal(value, before[name]) for name, value in model[1].state_dict().items())
    seen = model.eval()[:3](torch.cat(data))
    torch.testing.assert_close(model[3].running_var, seen.var(0))


def test_deferring_moves_no_frozen_layer():
    model, data = network(), batches()
    freeze(model, "1")
    with deferred_stats(model.train()):
        for batch in data:
            model(batch)
    assert [model[i].num_batches_tracked.item() for i in (1, 3)] == [0, 1]


def test_what_is_deferred_does_not_depend_on_what_normalizes():
    model, data = network(), batches()
    chosen = copy.deepcopy(model)
    normalize_by(chosen, "running", "1")
    for each in (model, chosen):
        with deferred_stats(each):
            for batch in data:
                each(batch)
    assert torch.equal(model[1].running_mean, chosen[1].running_mean)
    assert torch.equal(model[1].running_var, chosen[1].running_var)
