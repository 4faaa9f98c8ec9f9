"""Batch Renormalization: corrected towards the running statistics, as far as the step allows."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import batchnorm.nn
from against_oracle import STEPS, assert_follows
from batchnorm._ops import choice
from batchnorm.nn import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d
from batchnorm.reference import TrainOutput
from batchnorm.relatives.renorm import Limits, batch_renorm_train, correction, relaxed
from layouts import LAYOUTS, tensor_in
from tolerance import assert_within_budget

IMPLEMENTATIONS = pytest.mark.parametrize("implementation", choice.IMPLEMENTATIONS)
CLASSES = {2: BatchRenorm1d, 3: BatchRenorm1d, 4: BatchRenorm2d, 5: BatchRenorm3d}
# the limits move in every one of ten steps, and clip in most
SCHEDULE = {"rmax": 1.5, "dmax": 0.5, "warmup_steps": 1, "rmax_steps": 6, "dmax_steps": 4}
AT_ONCE = {"warmup_steps": 0, "rmax_steps": 0, "dmax_steps": 0}
EPS = 1e-5


def formulas(x, step, running_mean, running_var, weight, bias) -> TrainOutput:
    limits = relaxed(Limits(1.5, 0.5), step, 1, 6, 4)
    return batch_renorm_train(x, running_mean, running_var, limits, weight, bias)


def by_aten(x, step, running_mean, running_var, weight, bias) -> TrainOutput:
    exact = formulas(x, step, running_mean, running_var, weight, bias)
    r, d = correction(exact.mean, exact.var, running_mean, running_var, relaxed(Limits(1.5, 0.5), step, 1, 6, 4), EPS)
    return exact._replace(output=F.batch_norm(x, None, None, weight * r, weight * d + bias, True))


@IMPLEMENTATIONS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_follows_the_formulas(layout, dtype, implementation):
    batches = [tensor_in(layout, dtype) for _ in range(3)]
    layer = CLASSES[batches[0].dim()](batches[0].shape[1], implementation=implementation, **SCHEDULE)
    assert_follows(layer, formulas, by_aten, batches)


@IMPLEMENTATIONS
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("steps", STEPS)
def test_statistics_and_evaluation_after_k_steps(steps, offset, momentum, implementation):
    batches = [torch.randn(2 + step % 3, 31, 5) * 2 + offset for step in range(steps)]
    layer = BatchRenorm1d(31, momentum=momentum, implementation=implementation, **SCHEDULE)
    assert_follows(layer, formulas, by_aten, batches)
    assert layer.num_batches_tracked == layer.schedule_step == steps


@pytest.mark.parametrize("affine", [True, False])
def test_unclipped_training_normalizes_as_evaluation_would(affine):
    layer = BatchRenorm1d(3, affine=affine, rmax=1e6, dmax=1e6, dtype=torch.float64, **AT_ONCE)
    layer.running_mean.normal_()
    layer.running_var.uniform_(0.5, 2)
    if affine:
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
    x = torch.randn(6, 3, 2).double() * 3 + 1
    evaluated = layer.eval()(x)
    torch.testing.assert_close(layer.train()(x), evaluated)


def test_correction_lets_no_gradient_pass():
    # unclipped, and yet the gradient is that of BN with r and d as numbers: it sums to 0 over the batch
    layer = BatchRenorm1d(2, rmax=1e6, dmax=1e6, dtype=torch.float64, **AT_ONCE)
    x = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad((layer(x) * torch.randn(5, 2)).sum(), x)
    assert gradient.abs().max() > 0.01
    torch.testing.assert_close(gradient.sum(0), torch.zeros(2).double(), atol=1e-12, rtol=0)


def test_warm_up_is_batch_normalization_bit_for_bit():
    layer, plain = BatchRenorm2d(3, momentum=0.1), batchnorm.nn.BatchNorm2d(3)
    for _ in range(3):
        x = torch.randn(4, 3, 5, 5) + 3
        assert torch.equal(layer(x), plain(x))
    assert torch.equal(layer.running_var, plain.running_var)


def test_schedule_is_the_papers():
    layer = BatchRenorm1d(1)
    assert layer.momentum == 0.01
    limits = {}
    for step in (1, 5000, 15_000, 22_500, 25_000, 40_000, 10**7):
        layer.schedule_step.fill_(step - 1)
        limits[step] = tuple(limit.item() for limit in layer.limits(torch.float64))
        assert limits[step] == pytest.approx(relaxed(Limits(3.0, 5.0), step, 5000, 40_000, 25_000))
    assert limits[1] == limits[5000] == (1.0, 0.0)
    assert limits[22_500] == pytest.approx((2.0, 4.375))
    assert limits[25_000][1] == 5.0
    assert limits[40_000] == limits[10**7] == (3.0, 5.0)


def test_limits_without_a_warm_up_hold_from_the_first_step():
    assert [limit.item() for limit in BatchRenorm1d(1, **AT_ONCE).limits(torch.float64)] == [3.0, 5.0]


def test_a_resumed_training_goes_on_where_the_schedule_was():
    whole = BatchRenorm1d(3, **SCHEDULE)
    batches = [torch.randn(4, 3) + 1 for _ in range(6)]
    outputs = [whole(x) for x in batches]
    first, second = BatchRenorm1d(3, **SCHEDULE), BatchRenorm1d(3, **SCHEDULE)
    for x in batches[:3]:
        first(x)
    second.load_state_dict(first.state_dict())
    assert second.schedule_step == 3
    for x, expected in zip(batches[3:], outputs[3:], strict=True):
        assert torch.equal(second(x), expected)


@pytest.mark.parametrize("strict", [True, False])
def test_a_checkpoint_of_batch_norm_loads_and_begins_the_schedule(strict):
    trained, layer = nn.BatchNorm1d(3), BatchRenorm1d(3)
    trained(torch.randn(4, 3) + 2)
    layer.schedule_step.fill_(7)
    nn.Sequential(layer).load_state_dict(nn.Sequential(trained).state_dict(), strict=strict)
    assert layer.schedule_step == 0
    assert layer.num_batches_tracked == 1
    x = torch.randn(4, 3)
    torch.testing.assert_close(layer.eval()(x), trained.eval()(x))
    back = trained.load_state_dict(layer.state_dict(), strict=False)
    assert back.unexpected_keys == ["schedule_step"]


def test_reset_parameters_restarts_the_schedule_and_reset_running_stats_does_not():
    layer = BatchRenorm1d(3)
    layer(torch.randn(4, 3))
    layer.reset_running_stats()
    assert (layer.num_batches_tracked, layer.schedule_step) == (0, 1)
    layer.reset_parameters()
    assert layer.schedule_step == 0


def test_without_running_statistics_training_is_batch_normalization():
    layer = BatchRenorm1d(3, track_running_stats=False, **AT_ONCE)
    x = torch.randn(4, 3) + 5
    assert torch.equal(layer(x), batchnorm.nn.BatchNorm1d(3)(x))
    assert layer.schedule_step == 0


def test_residual_and_activation_follow_the_correction():
    x, residual = torch.randn(2, 5, 3).double()
    layer = BatchRenorm1d(3, activation="relu", dtype=torch.float64, **AT_ONCE)
    expected = batch_renorm_train(x, layer.running_mean.clone(), layer.running_var.clone(), Limits(3.0, 5.0)).output
    torch.testing.assert_close(layer(x, residual), (expected + residual).relu())


def test_bfloat16_layer_corrects_in_float32():
    layer = BatchRenorm1d(3, dtype=torch.bfloat16, **AT_ONCE)
    layer.running_mean.fill_(0.3)
    layer.running_var.fill_(1.7)
    mean, var, x = layer.running_mean.clone(), layer.running_var.clone(), torch.randn(64, 3).bfloat16()
    expected = batch_renorm_train(x, mean, var, Limits(3.0, 5.0)).output
    exact = batch_renorm_train(x.double(), mean.double(), var.double(), Limits(3.0, 5.0)).output
    assert_within_budget(layer(x), [expected], exact)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rmax": 0.5}, "rmax of at least 1 and dmax of at least 0, got rmax=0.5 and dmax=5.0"),
        ({"dmax": -1.0}, "got rmax=3.0 and dmax=-1.0"),
        ({"rmax": float("nan")}, "got rmax=nan"),
        ({"warmup_steps": 50_000}, "got warmup_steps=50000, rmax_steps=40000 and dmax_steps=25000"),
        ({"warmup_steps": -1}, "got warmup_steps=-1"),
    ],
)
def test_impossible_limits_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        BatchRenorm1d(3, **arguments)


def test_gradients_are_those_of_finite_differences_where_all_is_clipped():
    # a clipped r and d are constants, so finite differences see what autograd sees
    layer = BatchRenorm1d(2, rmax=1.1, dmax=0.1, momentum=0.0, dtype=torch.float64, **AT_ONCE)
    layer.running_var.fill_(100.0)
    x = (torch.randn(5, 2, dtype=torch.float64) + 50).requires_grad_()
    assert torch.autograd.gradcheck(layer, x)
    assert torch.autograd.gradgradcheck(layer, x)
