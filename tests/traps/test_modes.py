"""What modes and freezing do in torch that people do not expect, and what ours does."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchnorm
import batchnorm.nn as bnn

MAKES = pytest.mark.parametrize("make", [nn.BatchNorm1d, bnn.BatchNorm1d], ids=["torch", "ours"])


def saved_bytes(call: Callable[[], Tensor], own: list[Tensor]) -> int:
    """What autograd keeps for the backward pass, without parameters and buffers."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in {t.data_ptr() for t in own}:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = call()
    assert output.requires_grad
    return sum(kept.values())


def test_requires_grad_false_does_not_freeze_statistics_and_freeze_does():
    torchs, ours = nn.BatchNorm1d(3).requires_grad_(False), nn.BatchNorm1d(3)
    batchnorm.freeze(ours, affine=True)
    x = torch.randn(8, 3) + 5
    torchs(x)
    ours(x)
    assert torchs.running_mean.min() > 0.3
    assert not ours.running_mean.any()


def test_train_of_the_model_wakes_a_layer_in_evaluation_mode_and_not_a_frozen_one():
    torchs, ours = (nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)) for _ in range(2))
    torchs[1].eval()
    batchnorm.freeze(ours)
    for model in (torchs, ours):
        model.train()
        model(torch.randn(8, 3))
    assert torchs[1].num_batches_tracked == 1
    assert ours[1].num_batches_tracked == 0


def test_track_running_stats_switched_off_stops_the_updates_but_evaluation_still_uses_the_buffers():
    torchs, ours = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    torchs.track_running_stats = False
    x = torch.randn(8, 3) + 5
    torchs(x)
    assert torchs.num_batches_tracked == 0
    # as of the paper's evaluation, by a mean of 0 and a variance of 1: not by the batch, as people hope
    torch.testing.assert_close(torchs.eval()(x), x / (1 + torchs.eps) ** 0.5)
    batchnorm.normalize_by(ours, "batch")
    torch.testing.assert_close(ours.eval()(x), nn.functional.batch_norm(x, None, None, training=True))
    assert ours.num_batches_tracked == 0


@MAKES
def test_evaluation_mode_still_trains_gamma_and_beta_until_they_are_frozen(make: Any):
    layer, x = make(3).eval(), torch.randn(8, 3)
    layer(x).square().sum().backward()
    assert layer.weight.grad.any()
    assert layer.bias.grad.any()
    batchnorm.freeze(layer, affine=True)
    assert not layer(x).requires_grad


@MAKES
def test_the_gradient_of_a_frozen_layer_has_no_terms_of_the_batch(make: Any):
    training, frozen = make(3), make(3)
    batchnorm.freeze(frozen)
    x = torch.randn(8, 3)
    grads = []
    for layer in (training, frozen):
        leaf = x.clone().requires_grad_()
        layer.train()(leaf).sum().backward()
        grads.append(leaf.grad)
    # what is normalized by its own mean does not notice a shift
    torch.testing.assert_close(grads[0], torch.zeros_like(x), rtol=0, atol=1e-5)
    torch.testing.assert_close(grads[1], torch.full_like(x, (1 + frozen.eps) ** -0.5))


def test_torchs_frozen_layer_keeps_its_input_for_the_backward_pass_and_ours_does_not():
    x = torch.randn(64, 16, requires_grad=True)
    hidden = x * 1
    sizes = []
    for layer in (nn.BatchNorm1d(16), bnn.BatchNorm1d(16)):
        batchnorm.freeze(layer, affine=True)
        own = [*layer.parameters(), *layer.buffers()]
        sizes.append(saved_bytes(lambda layer=layer: layer.train()(hidden), own))
    assert sizes[0] >= hidden.untyped_storage().nbytes()
    assert sizes[1] < 1024


def test_update_bn_overwrites_a_layer_in_evaluation_mode_and_not_a_frozen_one():
    torchs, ours = nn.BatchNorm1d(3).eval(), nn.BatchNorm1d(3)
    batchnorm.freeze(ours)
    for layer in (torchs, ours):
        nn.init.constant_(layer.running_mean, 7.0)
        torch.optim.swa_utils.update_bn([torch.randn(8, 3) for _ in range(2)], layer)
    assert torchs.running_mean.max() < 2
    assert ours.running_mean.eq(7.0).all()
    assert ours.num_batches_tracked == 0


@contextmanager
def statistics_off_without_gradient(model: nn.Module) -> Iterator[None]:
    """What fairscale's wrapper for activation checkpointing does: no updates in a forward pass under no_grad."""

    def before(layer: Any, args: Any) -> None:
        layer.track_running_stats = layer.track_running_stats and torch.is_grad_enabled()

    def after(layer: Any, args: Any, output: Any) -> None:
        layer.track_running_stats = True

    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    handles = [hook for n in norms for hook in (n.register_forward_pre_hook(before), n.register_forward_hook(after))]
    yield
    for handle in handles:
        handle.remove()


def test_update_bn_does_nothing_where_a_library_stops_updates_without_gradient_and_recalibrate_measures():
    torchs, ours = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    data = [torch.randn(8, 3) + 5 for _ in range(2)]
    with statistics_off_without_gradient(torchs), statistics_off_without_gradient(ours):
        torch.optim.swa_utils.update_bn(data, torchs)
        batchnorm.recalibrate(ours, data)
    assert not torchs.running_mean.any()
    torch.testing.assert_close(ours.running_mean, torch.cat(data).mean(0))


@MAKES
@pytest.mark.parametrize("frozen", [False, True], ids=["training", "frozen"])
def test_first_and_second_derivatives_are_right_in_training_and_frozen(make: Any, frozen: bool):
    layer = make(3, dtype=torch.float64)
    layer(torch.randn(8, 3, dtype=torch.float64) * 2 + 1)
    if frozen:
        batchnorm.freeze(layer)
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,), fast_mode=True)
    assert torch.autograd.gradgradcheck(layer, (x,), fast_mode=True)
