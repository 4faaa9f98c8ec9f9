"""The formulas of the paper against each other, finite differences, autograd and torch.nn, in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from batchnorm import reference

DENSE, CONVOLUTIONAL = (7, 3), (3, 2, 4, 5)
SHAPES = pytest.mark.parametrize("shape", [DENSE, CONVOLUTIONAL], ids=["dense", "convolutional"])
EPS = 1e-3


def problem(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Input, gamma, beta and the gradient of the output, in float64."""
    channels = shape[1]
    x = torch.randn(shape, dtype=torch.float64) * 2 + 3
    return x, torch.randn(channels).double(), torch.randn(channels).double(), torch.randn(shape).double()


def finite_differences(f, x: Tensor, step: float = 1e-6) -> Tensor:
    gradient = torch.empty_like(x)
    for i in range(x.numel()):
        moved = x.flatten().clone()
        moved[i] += step
        above = f(moved.view_as(x))
        moved[i] -= 2 * step
        gradient.view(-1)[i] = (above - f(moved.view_as(x))) / (2 * step)
    return gradient


# Algorithm 1


@SHAPES
def test_train_equals_torch_layer(shape):
    x, weight, bias, _ = problem(shape)
    expected = F.batch_norm(x, None, None, weight, bias, training=True, eps=EPS)
    torch.testing.assert_close(reference.batch_norm_train(x, weight, bias, eps=EPS).output, expected)


@SHAPES
def test_inference_equals_torch_layer(shape):
    x, weight, bias, _ = problem(shape)
    mean, var = torch.randn(shape[1]).double(), torch.rand(shape[1]).double() + 0.1
    expected = F.batch_norm(x, mean, var, weight, bias, eps=EPS)
    torch.testing.assert_close(reference.batch_norm_inference(x, mean, var, weight, bias, eps=EPS), expected)


def test_convolution_counts_every_position():
    x, *_ = problem(CONVOLUTIONAL)
    result = reference.batch_norm_train(x)
    assert result.count == 3 * 4 * 5
    as_dense = x.transpose(0, 1).flatten(1).mT
    torch.testing.assert_close(result.mean, as_dense.mean(0))
    torch.testing.assert_close(result.var, as_dense.var(0, correction=0))


@SHAPES
def test_normalized_sums_to_zero(shape):
    x, *_ = problem(shape)
    mean = reference.batch_mean(x)
    normalized = reference.normalize(x, mean, reference.batch_var(x, mean), EPS)
    torch.testing.assert_close(normalized.sum(reference.reduced_dims(x)), torch.zeros(shape[1]).double())


@SHAPES
def test_normalized_mean_square_is_var_over_var_plus_eps(shape):
    x, *_ = problem(shape)
    mean = reference.batch_mean(x)
    var = reference.batch_var(x, mean)
    mean_square = reference.normalize(x, mean, var, EPS).square().mean(reference.reduced_dims(x))
    torch.testing.assert_close(mean_square, var / (var + EPS))


@SHAPES
def test_transform_can_represent_the_identity(shape):
    x, *_ = problem(shape)
    mean = reference.batch_mean(x)
    gamma = (reference.batch_var(x, mean) + EPS).sqrt()
    torch.testing.assert_close(reference.batch_norm_train(x, gamma, mean, eps=EPS).output, x)


@pytest.mark.parametrize("a", [0.25, 3.0, -2.0])
def test_scale_of_the_weights_cancels_and_divides_their_gradient(a):
    # section 3.3: BN((aW)u) = BN(Wu) for a > 0; for a < 0 the normalized value changes its sign
    u, w, _, _ = problem((9, 4))
    w = torch.randn(4, 5).double().requires_grad_()
    grad_output = torch.randn(9, 5).double()
    scaled = (a * w).detach().requires_grad_()
    plain, moved = (reference.batch_norm_train(u @ v, eps=0.0).output for v in (w, scaled))
    sign = math.copysign(1, a)
    torch.testing.assert_close(moved, sign * plain)
    (grad,) = torch.autograd.grad(plain, w, grad_output)
    (grad_scaled,) = torch.autograd.grad(moved, scaled, sign * grad_output)
    torch.testing.assert_close(grad_scaled, grad / a)
    assert abs((w * grad).sum().item()) < 1e-12  # Euler: a scale-invariant loss has no gradient along W


def test_half_precision_is_normalized_in_float32():
    x = (torch.randn(64, 2) + 10).bfloat16()
    result = reference.batch_norm_train(x)
    assert result.output.dtype == torch.bfloat16
    assert result.mean.dtype == result.var.dtype == torch.float32
    torch.testing.assert_close(result.mean, x.float().mean(0))


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_activation_follows_residual(activation):
    x, weight, bias, residual = problem(DENSE)
    plain = reference.batch_norm_train(x, weight, bias).output
    fused = reference.batch_norm_train(x, weight, bias, residual=residual, activation=activation).output
    torch.testing.assert_close(fused, getattr(F, activation)(plain + residual))


# Section 3: the backward pass


@SHAPES
@pytest.mark.parametrize("eps", [0.0, EPS])
def test_six_equations_equal_the_simplified_form(shape, eps):
    x, weight, _, grad_output = problem(shape)
    printed = reference.batch_norm_backward(grad_output, x, weight, eps)
    simplified = reference.batch_norm_backward_simplified(grad_output, x, weight, eps)
    torch.testing.assert_close(printed, simplified)


@SHAPES
def test_six_equations_equal_autograd_and_torch(shape):
    x, weight, bias, grad_output = (t.requires_grad_() for t in problem(shape))
    printed = reference.batch_norm_backward(grad_output, x, weight, EPS)
    for output in (
        reference.batch_norm_train(x, weight, bias, eps=EPS).output,
        F.batch_norm(x, None, None, weight, bias, training=True, eps=EPS),
    ):
        torch.testing.assert_close(printed, torch.autograd.grad(output, (x, weight, bias), grad_output.detach()))


@SHAPES
def test_six_equations_equal_finite_differences(shape):
    x, weight, bias, grad_output = problem(shape)

    def loss(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return (reference.batch_norm_train(x, weight, bias, eps=EPS).output * grad_output).sum()

    printed = reference.batch_norm_backward(grad_output, x, weight, EPS)
    measured = (
        finite_differences(lambda v: loss(v, weight, bias), x),
        finite_differences(lambda v: loss(x, v, bias), weight),
        finite_differences(lambda v: loss(x, weight, v), bias),
    )
    # central differences: step^2 = 1e-12 of truncation, 1e-16 / step = 1e-10 of rounding, times the size of the loss
    torch.testing.assert_close(tuple(printed), measured, rtol=1e-6, atol=1e-8)


@SHAPES
def test_intermediate_gradients_equal_autograd(shape):
    # with mean and var as leaves, autograd yields dl/dvar and the first term of dl/dmu one by one
    x, weight, _, grad_output = problem(shape)
    mean = reference.batch_mean(x).requires_grad_()
    var = reference.batch_var(x, mean.detach()).requires_grad_()
    d_normalized = reference.grad_normalized(grad_output, weight)
    normalized = reference.normalize(x, mean, var, EPS)
    d_mean, d_var = torch.autograd.grad(normalized, (mean, var), d_normalized)
    centered = x - reference.per_channel(mean, x)
    torch.testing.assert_close(reference.grad_batch_var(d_normalized, centered, var, EPS), d_var)
    torch.testing.assert_close(reference.grad_batch_mean(d_normalized, d_var, centered, var, EPS), d_mean)


@SHAPES
def test_second_term_of_grad_batch_mean_is_zero(shape):
    x, *_ = problem(shape)
    mean = reference.batch_mean(x)
    centered, no_direct_gradient = x - reference.per_channel(mean, x), torch.zeros_like(x)
    only_second = reference.grad_batch_mean(no_direct_gradient, torch.ones(shape[1]), centered, mean.square(), EPS)
    torch.testing.assert_close(only_second, torch.zeros(shape[1]).double())


@SHAPES
def test_grad_input_sums_to_zero(shape):
    x, weight, _, grad_output = problem(shape)
    grad_input = reference.batch_norm_backward(grad_output, x, weight, EPS).grad_input
    torch.testing.assert_close(grad_input.sum(reference.reduced_dims(x)), torch.zeros(shape[1]).double())


@SHAPES
def test_grad_input_along_normalized_vanishes_only_without_eps(shape):
    x, weight, _, grad_output = problem(shape)
    mean = reference.batch_mean(x)
    var = reference.batch_var(x, mean)
    for eps in (0.0, EPS):
        normalized = reference.normalize(x, mean, var, eps)
        grads = reference.batch_norm_backward(grad_output, x, weight, eps)
        along = (grads.grad_input * normalized).sum(reference.reduced_dims(x))
        torch.testing.assert_close(along, weight * torch.rsqrt(var + eps) * grads.grad_weight * eps / (var + eps))


# Section 3.1 and Algorithm 2


def test_running_average_weighs_the_new_batch_by_momentum():
    running = reference.running_average(torch.tensor([1.0]), torch.tensor([11.0]), momentum=0.1)
    torch.testing.assert_close(running, torch.tensor([2.0]))


def test_population_var_is_unbiased():
    # 4000 batches of 5 values with variance 4: the mean of var is 3.2, m / (m - 1) times that is 4
    batches = torch.randn(4000, 5, dtype=torch.float64) * 2
    variances = [reference.batch_var(batch[:, None], batch.mean()[None]) for batch in batches]
    estimate = reference.population_var(variances, count=5).item()
    standard_error = 4 * math.sqrt(2 / 4 / 4000)
    assert abs(estimate - 4) < 4 * standard_error
    torch.testing.assert_close(reference.var_unbiased(torch.tensor([3.2]), 5), torch.tensor([4.0]))


def test_population_mean_averages_batch_means():
    means = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 6.0])]
    torch.testing.assert_close(reference.population_mean(means), torch.tensor([2.0, 4.0]))


def test_population_var_of_equal_batches_misses_what_pooling_counts():
    # two batches {0, 2} and {10, 12}: variance within is 2 each, that of all four values is 34.67
    batches = [torch.tensor([[0.0], [2.0]]), torch.tensor([[10.0], [12.0]])]
    means = [reference.batch_mean(b) for b in batches]
    variances = [reference.batch_var(b, m) for b, m in zip(batches, means, strict=True)]
    assert reference.population_var(variances, 2).item() == 2.0
    pooled = reference.pooled_statistics(means, variances, [2, 2])
    torch.testing.assert_close(pooled, (torch.tensor([6.0]), torch.cat(batches).var(0)))


@pytest.mark.parametrize("offset", [0.0, 1e4], ids=["centered", "mean_over_std_1e4"])
def test_pooled_statistics_equal_those_of_all_data(offset):
    batches = [torch.randn(n, 3, dtype=torch.float64) + offset + n for n in (2, 7, 30, 1)]
    means = [reference.batch_mean(b) for b in batches]
    variances = [reference.batch_var(b, m) for b, m in zip(batches, means, strict=True)]
    mean, var = reference.pooled_statistics(means, variances, [len(b) for b in batches])
    torch.testing.assert_close(mean, torch.cat(batches).mean(0))
    torch.testing.assert_close(var, torch.cat(batches).var(0))


def test_pooled_statistics_keep_their_digits_in_float32():
    # E[x^2] - E[x]^2 would have no correct digit here: 1e8 has a rounding of 8 in float32
    batches = [torch.randn(n, 3) + 1e4 for n in (16, 64, 50)]
    means = [reference.batch_mean(b) for b in batches]
    variances = [reference.batch_var(b, m) for b, m in zip(batches, means, strict=True)]
    _, var = reference.pooled_statistics(means, variances, [len(b) for b in batches])
    exact = torch.cat(batches).double().var(0)
    rounding_of_a_mean = 1e4 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(var.double(), exact, rtol=2 * rounding_of_a_mean, atol=0)


@SHAPES
def test_inference_affine_equals_inference(shape):
    x, weight, bias, _ = problem(shape)
    mean, var = torch.randn(shape[1]).double(), torch.rand(shape[1]).double()
    scale, shift = reference.inference_affine(mean, var, weight, bias, EPS)
    expected = reference.batch_norm_inference(x, mean, var, weight, bias, eps=EPS)
    torch.testing.assert_close(reference.scale_and_shift(x, scale, shift), expected)


# Section 2


def test_whitened_covariance_is_the_identity():
    x = torch.randn(50, 4, dtype=torch.float64) @ torch.randn(4, 4).double() + 5
    torch.testing.assert_close(reference.covariance(reference.whiten(x, eps=0.0)), torch.eye(4).double())


def test_whitening_rotates_nothing():
    # ZCA: the whitening matrix is symmetric, so data that is white already stays where it is
    white = reference.whiten(torch.randn(50, 4, dtype=torch.float64), eps=0.0)
    torch.testing.assert_close(reference.whiten(white, eps=0.0), white)


def test_whiten_backward_equals_autograd():
    x = torch.randn(20, 4, dtype=torch.float64, requires_grad=True)
    grad_output = torch.randn(20, 4, dtype=torch.float64)
    (expected,) = torch.autograd.grad(reference.whiten(x, EPS), x, grad_output)
    torch.testing.assert_close(reference.whiten_backward(grad_output, x.detach(), EPS), expected)


class Whiten(torch.autograd.Function):
    """whiten with the gradient under test, for gradcheck."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return reference.whiten(x, EPS)

    @staticmethod
    def backward(ctx, grad_output):
        return reference.whiten_backward(grad_output, *ctx.saved_tensors, EPS)


def test_whiten_backward_passes_gradcheck():
    assert torch.autograd.gradcheck(Whiten.apply, torch.randn(6, 3, dtype=torch.float64, requires_grad=True))


def test_whiten_backward_is_right_at_equal_eigenvalues():
    # the covariance of this design is exactly the identity: autograd of eigh divides by 0, ours must not
    x = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64, requires_grad=True)
    assert torch.equal(reference.covariance(x), torch.eye(2).double())
    assert torch.autograd.gradcheck(Whiten.apply, x)
    (through_eigh,) = torch.autograd.grad(reference.whiten(x, EPS).pow(3).sum(), x)
    assert not through_eigh.isfinite().all()


def test_normalization_outside_the_gradient_lets_the_bias_drift():
    # section 2: x = u + b, normalized; b grows at every step while the loss does not move
    u, target = torch.randn(32, 1, dtype=torch.float64), torch.randn(32, 1, dtype=torch.float64) + 1
    b = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    losses, path = [], []
    for _ in range(5):
        loss = (reference.normalize_outside_gradient(u + b, EPS) - target).square().mean()
        (grad,) = torch.autograd.grad(loss, b)
        b = (b - 0.1 * grad).detach().requires_grad_()
        losses.append(loss.detach())
        path.append(b.item())
    torch.testing.assert_close(torch.stack(losses), losses[0].expand(5))
    steps = torch.tensor(path).diff()
    assert (steps > 0).all()
    torch.testing.assert_close(steps, steps[:1].expand(4))


def test_normalization_inside_the_gradient_keeps_the_bias():
    u, target = torch.randn(32, 1, dtype=torch.float64), torch.randn(32, 1, dtype=torch.float64) + 1
    b = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    loss = (reference.batch_norm_train(u + b, eps=EPS).output - target).square().mean()
    torch.testing.assert_close(torch.autograd.grad(loss, b), (torch.zeros(1).double(),))


@pytest.mark.parametrize("shape", [(8, 16), (60, 100)], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e2, 1e6])
def test_whitening_of_fewer_examples_than_features_is_finite(shape: tuple[int, int], scale: float):
    x = torch.randn(shape, dtype=torch.float64) * scale
    assert reference.whiten(x, 1e-5).isfinite().all()
    assert reference.whiten_backward(torch.randn_like(x), x, 1e-5).isfinite().all()
    assert reference.whiten(x.float(), 1e-5).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backward", [reference.batch_norm_backward, reference.batch_norm_backward_simplified])
def test_backward_of_half_precision_is_computed_in_float32(dtype: torch.dtype, backward):
    # the variance is 9e4, beyond float16
    x, grad_output = (torch.randn(64, 2) * 300).to(dtype), torch.randn(64, 2).to(dtype)
    weight = torch.ones(2, dtype=dtype)
    expected = backward(grad_output.double(), x.double(), weight.double(), 1e-5)
    torch.testing.assert_close(
        backward(grad_output, x, weight, 1e-5), expected, check_dtype=False, rtol=1e-4, atol=1e-5
    )


def test_pooled_statistics_of_large_counts_in_float16_do_not_overflow():
    means, variances = [torch.full((1,), 2.0).half()] * 2, [torch.ones(1).half()] * 2
    mean, var = reference.pooled_statistics(means, variances, [60_000, 60_000])
    assert (mean.item(), var.item()) == (2.0, 1.0)
