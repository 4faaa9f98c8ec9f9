"""Traps around running averages and ``torch.optim.swa_utils.update_bn``: torch's wrong result, and ours beside it."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from batchnorm import recalibrate
from batchnorm.statistics import deferred_stats

# two batches of one channel whose means differ
FIRST, SECOND = torch.tensor([[0.0], [2.0]]), torch.tensor([[10.0], [12.0], [14.0], [16.0]])
ALL = torch.cat([FIRST, SECOND])


def test_update_bn_averages_the_variances_within_batches_and_loses_that_between_them():
    torchs, ours = nn.BatchNorm1d(1), nn.BatchNorm1d(1)
    update_bn([FIRST, SECOND], torchs)
    recalibrate(ours, [FIRST, SECOND])
    assert torchs.running_mean.item() == pytest.approx(7)
    assert torchs.running_var.item() == pytest.approx((FIRST.var() + SECOND.var()).item() / 2)
    assert ours.running_mean.item() == pytest.approx(ALL.mean().item()) == pytest.approx(9)
    assert ours.running_var.item() == pytest.approx(ALL.var().item()) == pytest.approx(42.8)


def test_a_loaded_counter_of_0_lets_the_cumulative_average_overwrite_good_statistics():
    good = {
        "running_mean": torch.tensor([5.0]),
        "running_var": torch.tensor([2.0]),
        "num_batches_tracked": torch.tensor(0),
    }
    torchs = nn.BatchNorm1d(1, momentum=None, affine=False)
    torchs.load_state_dict(good)
    torchs(FIRST)
    assert torchs.running_mean.item() == 1.0

    ours = nn.BatchNorm1d(1, momentum=None, affine=False)
    ours.load_state_dict(good)
    recalibrate(ours, [FIRST + 4] * 9)
    assert ours.num_batches_tracked == 9
    ours(FIRST)
    assert ours.running_mean.item() == pytest.approx(5 - 0.4)


def test_momentum_0_keeps_the_statistics_but_counts_on():
    torchs, ours = (nn.BatchNorm1d(1, momentum=0.0) for _ in range(2))
    torchs(FIRST)
    assert (torchs.running_mean.item(), torchs.num_batches_tracked.item()) == (0, 1)
    with deferred_stats(ours) as tx:
        ours(FIRST)
        tx.rollback()
    assert (ours.running_mean.item(), ours.num_batches_tracked.item()) == (0, 0)


@pytest.mark.parametrize(("momentum", "steps"), [(0.1, 10), (0.1, 44), (0.01, 100)])
def test_after_k_steps_a_share_of_the_initial_0_and_1_is_left(momentum: float, steps: int):
    torchs, ours = nn.BatchNorm1d(1, momentum=momentum), nn.BatchNorm1d(1, momentum=momentum)
    for _ in range(steps):
        torchs(SECOND)
    share = (1 - momentum) ** steps
    assert torchs.running_mean.item() == pytest.approx((1 - share) * 13, rel=1e-5)
    assert torchs.running_var.item() == pytest.approx(share + (1 - share) * SECOND.var().item(), rel=1e-5)
    recalibrate(ours, [SECOND] * 2)
    assert ours.running_mean.item() == 13


def trained() -> nn.Sequential:
    model = nn.Sequential(nn.BatchNorm1d(1, momentum=0.3), nn.BatchNorm1d(1, momentum=0.3)).eval()
    for layer in model:
        layer.running_mean.fill_(5.0)
        layer.running_var.fill_(2.0)
    return model


def test_an_empty_loader_wipes_the_statistics():
    torchs, ours = trained(), trained()
    update_bn([], torchs)
    assert (torchs[0].running_mean.item(), torchs[0].running_var.item()) == (0, 1)
    with pytest.raises(ValueError, match="the loader yielded nothing, so the running statistics stay as they were"):
        recalibrate(ours, [])
    assert (ours[0].running_mean.item(), ours[0].running_var.item()) == (5, 2)


def test_a_frozen_layer_is_overwritten_and_left_in_training():
    torchs, ours = trained().train(), trained().train()
    for model in (torchs, ours):
        model[0].eval()
        model[0].frozen_statistics = True
    update_bn([FIRST], torchs)
    assert torchs[0].running_mean.item() == 1.0
    assert torchs[0].training
    assert recalibrate(ours, [FIRST]).frozen == ["0"]
    assert ours[0].running_mean.item() == 5.0
    assert not ours[0].training
    assert ours[1].training


def broken() -> Iterator[Tensor]:
    yield FIRST
    raise ConnectionError("gone")


def state(model: Any) -> list[Any]:
    return [(layer.running_mean.item(), layer.momentum, layer.training) for layer in model]


def test_an_exception_leaves_another_momentum_and_mode():
    torchs, ours = trained(), trained()
    with pytest.raises(ConnectionError, match="gone"):
        update_bn(broken(), torchs)
    assert state(torchs) == [(1.0, None, True), (0.0, None, True)]
    with pytest.raises(ConnectionError, match="gone"):
        recalibrate(ours, broken())
    assert state(ours) == [(5.0, 0.3, False)] * 2


def test_dropout_is_on_and_widens_the_statistics():
    x = torch.ones(4000, 1) + torch.linspace(-0.1, 0.1, 4000)[:, None]
    torchs, ours = (nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(1)) for _ in range(2))
    update_bn([x], torchs)
    assert torchs[1].running_var.item() > 0.9
    recalibrate(ours, [x])
    assert ours[1].running_var.item() == pytest.approx(x.var().item(), rel=1e-5)
