"""Traps of statistics that every forward moves: torch's wrong result, and with ``deferred_stats`` the right one."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from batchnorm import deferred_stats

X = torch.tensor([[0.0], [2.0], [4.0], [10.0]])


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_counts_every_batch_twice(use_reentrant: bool):
    torchs, ours = (nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1, momentum=0.5)) for _ in range(2))
    for model in (torchs, ours):
        nn.init.eye_(model[0].weight)
        nn.init.zeros_(model[0].bias)

    def step(model: nn.Module) -> None:
        checkpoint(model, X.clone().requires_grad_(), use_reentrant=use_reentrant).square().sum().backward()

    step(torchs)
    assert torchs[1].num_batches_tracked == 2
    assert torchs[1].running_mean.item() == pytest.approx(0.75 * 4)
    with deferred_stats(ours):
        step(ours)
    assert ours[1].num_batches_tracked == 1
    assert ours[1].running_mean.item() == pytest.approx(0.5 * 4)


def test_accumulated_batches_are_not_the_big_batch():
    whole, torchs, ours = (nn.BatchNorm1d(1, momentum=0.5) for _ in range(3))
    whole(X)
    for part in X.split(2):
        torchs(part)
    with deferred_stats(ours):
        for part in X.split(2):
            ours(part)
    assert (whole.running_mean.item(), whole.running_var.item()) == pytest.approx((2, 0.5 + X.var().item() / 2))
    assert torchs.running_mean.item() == pytest.approx(0.25 * 1 + 0.5 * 7)
    assert torchs.num_batches_tracked == 2
    torch.testing.assert_close(dict(ours.named_buffers()), dict(whole.named_buffers()))


def scaled_step(model: nn.Module, scaler: Any, optimizer: Any, x: Tensor) -> bool:
    """A step of mixed-precision training; whether the scaler found inf or NaN and skipped it."""
    optimizer.zero_grad()
    scaler.scale(model(x).square().mean()).backward()
    before = scaler.get_scale()
    scaler.step(optimizer)
    scaler.update()
    return scaler.get_scale() < before


def test_a_step_that_amp_skips_has_moved_the_statistics():
    x = X.clone()
    x[0] = 1e30
    for deferring in (False, True):
        model = nn.Sequential(nn.BatchNorm1d(1), nn.Linear(1, 1))
        # a loss that overflows, as a too large scale makes it
        nn.init.constant_(model[1].weight, 1e25)
        scaler = torch.amp.GradScaler("cpu")
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        weight = model[1].weight.clone()
        if deferring:
            with deferred_stats(model) as tx:
                skipped = scaled_step(model, scaler, optimizer, x)
                if skipped:
                    tx.rollback()
        else:
            skipped = scaled_step(model, scaler, optimizer, x)
        assert skipped
        assert model[1].weight.equal(weight)
        assert model[0].num_batches_tracked == (0 if deferring else 1)
        assert (model[0].running_mean == 0).all() == deferring


def test_one_batch_with_inf_poisons_the_statistics_for_ever():
    torchs, ours = (nn.Sequential(nn.BatchNorm1d(1)) for _ in range(2))
    bad = torch.cat([X, torch.tensor([[torch.inf]])])
    for x in (bad, *[X] * 500):
        torchs(x)
    assert torchs[0].running_mean.isinf().all()
    assert torchs[0].running_var.isnan().all()

    with deferred_stats(ours) as tx:
        ours(bad)
        with pytest.raises(ValueError, match="layer '0' received inf or NaN"):
            tx.commit()
        tx.rollback()
        for x in [X] * 500:
            ours(x)
            tx.commit()
    assert ours[0].running_mean.item() == pytest.approx(4, rel=1e-5)
    assert ours[0].num_batches_tracked == 500


def test_a_training_forward_changes_the_gradient_of_an_evaluation_before_it():
    """Torch keeps no copy of the running statistics for the backward pass, and does not notice that they moved."""
    x = X.clone().requires_grad_()
    assert gradient_of_evaluation(nn.BatchNorm1d(1), x) < 0.1
    layer = nn.BatchNorm1d(1)
    with deferred_stats(layer):
        assert gradient_of_evaluation(layer, x) == pytest.approx(1.0, rel=1e-4)


def gradient_of_evaluation(layer: nn.Module, x: Tensor) -> float:
    """The mean of the output's gradient, 1 / sqrt(running_var + eps) of a new layer."""
    output = layer.eval()(x).sum()
    layer.train()(X * 100)
    (gradient,) = torch.autograd.grad(output, x)
    return gradient.mean().item()
