"""Traps of averaged models and replicas: averages of buffers are not the statistics of anything."""

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from batchnorm import copy_running_stats, merge_running_stats, recalibrate


def test_average_of_variances_forgets_how_far_the_means_are_apart():
    data = [torch.randn(500, 1), torch.randn(500, 1) + 4]
    replicas = [nn.BatchNorm1d(1) for _ in data]
    for replica, x in zip(replicas, data, strict=True):
        recalibrate(replica, [x])
    averaged = torch.stack([replica.running_var for replica in replicas]).mean(0)
    merged = merge_running_stats(replicas, counts=[500, 500])
    torch.testing.assert_close(averaged, torch.ones(1), atol=0.2, rtol=0)
    torch.testing.assert_close(merged["running_var"], torch.cat(data).var(0))
    torch.testing.assert_close(merged["running_var"], torch.full((1,), 5.0), atol=0.4, rtol=0)


def test_average_of_counters_is_not_whole():
    states = [nn.BatchNorm1d(1).state_dict() for _ in range(2)]
    states[1]["num_batches_tracked"] += 3
    averaged = {key: sum(state[key] for state in states) / 2 for key in states[0]}
    model = nn.BatchNorm1d(1)
    model.load_state_dict(averaged)
    assert averaged["num_batches_tracked"] == 1.5
    assert model.num_batches_tracked == 1
    model.load_state_dict(merge_running_stats(states), strict=False)
    assert model.num_batches_tracked == 3


def moving_average(use_buffers: bool) -> tuple[nn.Module, AveragedModel]:
    """After five steps of training in which the data move away."""
    model = nn.BatchNorm1d(1, momentum=0.5)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=use_buffers)
    for step in range(5):
        model(torch.randn(50, 1) + step)
        average.update_parameters(model)
    return model, average


def test_counter_of_a_moving_average_stays_at_one():
    model, average = moving_average(use_buffers=True)
    assert average.module.num_batches_tracked == 1
    copy_running_stats(model, average)
    assert average.module.num_batches_tracked == 5


def test_moving_average_of_moving_averages_lags_twice():
    model, average = moving_average(use_buffers=True)
    assert average.module.running_mean < model.running_mean - 1
    copy_running_stats(model, average)
    assert average.module.running_mean.equal(model.running_mean)


@pytest.mark.parametrize("use_buffers", [False, True])
def test_neither_setting_has_the_statistics_of_the_averaged_weights(use_buffers: bool):
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1, momentum=1.0))
    average = AveragedModel(model, use_buffers=use_buffers)
    x = torch.randn(200, 1)
    for weight in (1.0, 3.0):
        nn.init.constant_(model[0].weight, weight)
        model(x)
        average.update_parameters(model)
    # the averaged weight is 2
    measured = average.module[1].running_var / x.var()
    torch.testing.assert_close(measured, torch.full((1,), 5.0 if use_buffers else 9.0))
    recalibrate(average, [x])
    torch.testing.assert_close(average.module[1].running_var / x.var(), torch.full((1,), 4.0))
