"""The oracles of BN's relatives against torch, against each other, and against finite differences."""

import pytest
import torch
import torch.nn.functional as F

from batchnorm import reference
from batchnorm.relatives.conditional import scale_and_shift_by_label
from batchnorm.relatives.ghost import ghost_batch_norm_train
from batchnorm.relatives.masked import masked_batch_norm_train
from batchnorm.relatives.renorm import Limits, batch_renorm_train, correction, relaxed

EPS = 1e-5
FREE = Limits(1e9, 1e9)


def doubles(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("shape", [(9, 3), (9, 1, 2), (9, 3, 2, 5)], ids=str)
def test_ghost_is_torchs_batch_norm_on_each_part(shape):
    x, weight, bias = doubles(*shape), doubles(shape[1]), doubles(shape[1])
    output, mean, var, count = ghost_batch_norm_train(x, 4, weight, bias)
    parts = [F.batch_norm(part, None, None, weight, bias, True) for part in (x[:5], x[5:])]
    torch.testing.assert_close(output, torch.cat(parts))
    whole = reference.batch_norm_train(x)
    torch.testing.assert_close((mean, var), (whole.mean, whole.var))
    assert count == whole.count


def test_ghost_of_one_part_is_batch_normalization():
    x = doubles(5, 3)
    torch.testing.assert_close(ghost_batch_norm_train(x, 5).output, reference.batch_norm_train(x).output)


def test_free_renorm_is_normalization_by_the_running_statistics():
    x, mean, var = doubles(6, 3, 2), torch.randn(3).double(), torch.rand(3).double() + 0.5
    output = batch_renorm_train(x, mean, var, FREE, eps=EPS).output
    torch.testing.assert_close(output, reference.batch_norm_inference(x, mean, var, eps=EPS))


def test_renorm_with_limits_of_one_and_zero_is_batch_normalization():
    x = doubles(6, 3, 2)
    output = batch_renorm_train(x, torch.full((3,), 9.0), torch.full((3,), 7.0), Limits(1.0, 0.0)).output
    torch.testing.assert_close(output, reference.batch_norm_train(x).output)


def test_correction_is_clipped_on_both_sides():
    zero, one = torch.zeros(3), torch.ones(3)
    variances = torch.tensor([0.01, 1.44, 100.0])
    r, _ = correction(zero, variances, zero, one, Limits(2.0, 5.0), 0.0)
    torch.testing.assert_close(r, torch.tensor([0.5, 1.2, 2.0]))
    _, d = correction(torch.tensor([-20.0, 4.0, 20.0]), one, zero, 4 * one, Limits(2.0, 5.0), 0.0)
    torch.testing.assert_close(d, torch.tensor([-5.0, 2.0, 5.0]))


def test_renorm_gradient_is_batch_norms_times_r():
    x, grad_output = doubles(6, 3), torch.randn(6, 3).double()
    mean, var = torch.zeros(3).double(), torch.full((3,), 4.0).double()
    renormed = batch_renorm_train(x, mean, var, FREE, eps=EPS)
    r, _ = correction(renormed.mean, renormed.var, mean, var, FREE, EPS)
    (gradient,) = torch.autograd.grad(renormed.output, x, grad_output)
    expected = reference.batch_norm_backward(grad_output, x.detach(), r, EPS).grad_input
    torch.testing.assert_close(gradient, expected)


def test_limits_of_the_paper():
    assert relaxed(Limits(3.0, 5.0), 5000, 5000, 40_000, 25_000) == Limits(1.0, 0.0)
    assert relaxed(Limits(3.0, 5.0), 15_000, 5000, 40_000, 25_000).dmax == 2.5
    assert relaxed(Limits(3.0, 5.0), 40_000, 5000, 40_000, 25_000) == Limits(3.0, 5.0)


@pytest.mark.parametrize("shape", [(6, 3), (4, 3, 5)], ids=str)
def test_masked_is_batch_normalization_of_the_packed_values(shape):
    x, weight, bias = doubles(*shape), doubles(3), doubles(3)
    mask = torch.rand(len(x), *shape[2:]) < 0.6
    masked = masked_batch_norm_train(x, mask, weight, bias)
    packed = reference.batch_norm_train(x.movedim(1, -1)[mask], weight, bias)
    torch.testing.assert_close(masked.output.movedim(1, -1)[mask], packed.output)
    torch.testing.assert_close(masked[1:3], packed[1:3])
    assert masked.count == packed.count
    assert not masked.output.movedim(1, -1)[~mask].any()


def test_every_sample_gets_gamma_and_beta_of_its_label():
    x, weight, bias = doubles(3, 2, 4), doubles(5, 2), doubles(5, 2)
    output = scale_and_shift_by_label(x, weight, bias, torch.tensor([4, 0, 4]))
    for sample, label in enumerate((4, 0, 4)):
        expected = reference.scale_and_shift(x[sample : sample + 1], weight[label], bias[label])
        torch.testing.assert_close(output[sample : sample + 1], expected)


MASK = torch.tensor([[True, True, False, True], [True, False, False, False], [True, True, True, True]])
DIFFERENTIABLE = {
    "ghost": lambda x, weight, bias: ghost_batch_norm_train(x, 1, weight, bias).output,
    # clipped on all sides, where finite differences see that r and d are constants
    "renorm": lambda x, weight, bias: (
        batch_renorm_train(x, torch.full((2,), 50.0), torch.full((2,), 100.0), Limits(1.1, 0.1), weight, bias).output
    ),
    "masked": lambda x, weight, bias: masked_batch_norm_train(x, MASK, weight, bias).output,
}


@pytest.mark.parametrize("f", DIFFERENTIABLE.values(), ids=DIFFERENTIABLE)
def test_gradients_are_those_of_finite_differences(f):
    tensors = doubles(3, 2, 4), doubles(2), doubles(2)
    assert torch.autograd.gradcheck(f, tensors)
    assert torch.autograd.gradgradcheck(f, tensors)
