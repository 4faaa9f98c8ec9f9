"""``functional.whiten`` is the plain formulas: outputs, every gradient, running statistics, and what is refused."""

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from batchnorm import reference
from batchnorm._ops.whitening_matrix import Method, cholesky, whitening_matrix
from batchnorm.functional import whiten
from batchnorm.relatives import whitening
from layouts import LAYOUTS, tensor_in
from tolerance import assert_within_budget, results_and_gradients

EPS, MOMENTUM = 1e-3, 0.2
methods = pytest.mark.parametrize("method", whitening.METHODS)


def op(x: Tensor, weight: Tensor | None, bias: Tensor | None, method: str, group_size: int | None, **options):
    """Output, and running statistics after one batch."""
    d = group_size or x.shape[1]
    dtype = torch.float32 if x.dtype == torch.bfloat16 else x.dtype
    mean, cov = torch.zeros(x.shape[1], dtype=dtype), torch.eye(d, dtype=dtype).repeat(x.shape[1] // d, 1, 1)
    options = {"eps": EPS, **options}
    output = whiten(x, mean, cov, weight, bias, True, MOMENTUM, method=method, group_size=group_size, **options)
    return output, mean, cov


def plain(x: Tensor, weight: Tensor | None, bias: Tensor | None, method: str, group_size: int | None, **options):
    options = {"eps": EPS, **options}
    output, mean, cov, count = whitening.whiten_train(x, weight, bias, method=method, group_size=group_size, **options)
    unbiased = reference.var_unbiased(cov.detach(), count)
    average = reference.running_average
    start = torch.eye(cov.shape[-1], dtype=cov.dtype)
    return output, average(mean.detach() * 0, mean.detach(), MOMENTUM), average(start, unbiased, MOMENTUM)


NAMES = ("output", "running_mean", "running_cov", "grad_input", "grad_weight", "grad_bias")


def assert_is_the_reference(x: Tensor, method: str, group_size: int | None = None, **options) -> None:
    weight, bias = torch.randn(x.shape[1], dtype=x.dtype), torch.randn(x.shape[1], dtype=x.dtype)
    grad_output = torch.randn(x.shape, dtype=x.dtype)

    def run(f, *tensors):
        return results_and_gradients(lambda *t: f(*t, method, group_size, **options), grad_output, *tensors)

    actual = run(op, x, weight, bias)
    exact = run(plain, x.double(), weight.double(), bias.double())
    baseline = run(plain, x, weight, bias)
    for name, result, base, true in zip(NAMES, actual, baseline, exact, strict=True):
        assert_within_budget(result, [base], true, name)


@methods
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "image_expanded"])
@pytest.mark.parametrize("group_size", [None, 1])
def test_layouts(method: str, layout: str, group_size: int | None):
    x = tensor_in(layout)
    assert_is_the_reference(x, method, group_size)
    output = op(x, None, None, method, group_size)[0]
    if layout.endswith("channels_last") or x.is_contiguous():
        assert output.stride() == x.stride()


CASES = {
    "samples as they lie": (lambda: torch.randn(3, 6, 5, 5), 3),
    "one long sample": (lambda: torch.randn(1, 6, 40), 2),
    "pieces": (lambda: torch.randn(3, 64, 40, 40), 16),
    "pieces of columns": (lambda: torch.randn(3001, 32), 16),
    "a mean of 1e4": (lambda: torch.randn(64, 4) + 1e4, None),
    "a mean of 1e4 in long samples": (lambda: torch.randn(3, 4, 64) + 1e4, 2),
    "a constant channel": (lambda: torch.cat([torch.ones(9, 1), torch.randn(9, 3)], 1), None),
    "a channel that is the sum of two": (lambda: torch.randn(9, 2) @ torch.tensor([[1.0, 0, 1], [0, 1, 1]]), None),
    "as many values as features": (lambda: torch.randn(6, 6), None),
    "one channel": (lambda: torch.randn(7, 1), None),
    "bfloat16": (lambda: torch.randn(33, 4).bfloat16(), 2),
}


@methods
@pytest.mark.parametrize("case", CASES)
def test_inputs(method: str, case: str):
    make, group_size = CASES[case]
    assert_is_the_reference(make(), method, group_size)


@methods
@pytest.mark.parametrize("layout", LAYOUTS)
def test_float64_is_as_exact_as_the_formulas(method: str, layout: str):
    x, weight, bias = tensor_in(layout, torch.float64), *torch.randn(2, LAYOUTS[layout][0][1], dtype=torch.float64)
    torch.testing.assert_close(op(x, weight, bias, method, None), plain(x, weight, bias, method, None))


@methods
def test_shrinkage(method: str):
    assert_is_the_reference(torch.randn(9, 8), method, 4, shrinkage=0.2)


@methods
def test_inf_and_nan_make_their_group_nan_and_no_other(method: str):
    x = torch.randn(9, 6)
    x[2, 1], x[3, 4] = torch.inf, torch.nan
    clean = torch.randn(9, 6)
    clean[:, 2:4] = x[:, 2:4]
    output, mean, cov = op(x.requires_grad_(), None, None, method, 2)
    assert output[:, [0, 1, 4, 5]].isnan().all()
    torch.testing.assert_close(output[:, 2:4], op(clean, None, None, method, 2)[0][:, 2:4])
    (grad,) = torch.autograd.grad(output, x, torch.ones_like(output))
    assert grad[:, 2:4].isfinite().all()
    assert grad[:, [0, 1, 4, 5]].isnan().all()
    assert torch.equal(mean, torch.zeros(6))
    assert torch.equal(cov, torch.eye(2).repeat(3, 1, 1))


@methods
def test_two_values_become_plus_and_minus_one_in_their_direction(method: str):
    x = torch.tensor([[1.0, 2.0], [3.0, 8.0]], dtype=torch.float64)
    output = whiten(x, None, None, training=True, method=method, eps=1e-9, iterations=60)
    torch.testing.assert_close(output.sum(0), torch.zeros(2).double(), atol=1e-7, rtol=0)
    torch.testing.assert_close(output.norm(dim=1), torch.ones(2).double(), atol=1e-7, rtol=0)


@methods
@pytest.mark.parametrize("shape", [(0, 4), (0, 4, 5), (3, 4, 0)])
@pytest.mark.parametrize("training", [True, False])
def test_an_empty_batch_gives_an_empty_output_and_changes_nothing(method: str, shape: tuple[int, ...], training: bool):
    mean, cov = torch.ones(4), torch.eye(2).repeat(2, 1, 1)
    x = torch.zeros(shape, requires_grad=True)
    output = whiten(x, mean, cov, training=training, method=method, group_size=2)
    assert output.shape == shape
    output.sum().backward()
    assert torch.equal(mean, torch.ones(4))
    assert torch.equal(cov, torch.eye(2).repeat(2, 1, 1))


# Gradients

SHAPES = [((6, 4), 2), ((7, 3), None), ((2, 2, 9), None), ((3, 4, 2, 2), 2), ((4, 6), None)]


@methods
@pytest.mark.parametrize(("shape", "group_size"), SHAPES, ids=str)
def test_gradients_are_those_of_finite_differences(method: str, shape: tuple[int, ...], group_size: int | None):
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in (shape, shape[1], shape[1])]
    options = {"method": method, "group_size": group_size, "eps": 0.1, "shrinkage": 0.1}
    assert gradcheck(lambda *t: whiten(t[0], None, None, *t[1:], training=True, **options), inputs)


@methods
def test_second_derivatives_are_those_of_finite_differences(method: str):
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((7, 4), 4, 4)]
    options = {"method": method, "group_size": 2, "eps": 0.1}
    assert gradgradcheck(lambda *t: whiten(t[0], None, None, *t[1:], training=True, **options), inputs)


def white_design() -> Tensor:
    """Its covariance is exactly the identity: all eigenvalues are equal."""
    return torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("method", ["zca", "cholesky", "newton_schulz"])
def test_gradients_are_right_where_eigenvalues_are_equal(method: str):
    assert gradcheck(lambda x: whiten(x, None, None, training=True, method=method), white_design())


def test_gradient_of_pca_is_right_at_equal_eigenvalues_for_a_loss_without_directions():
    x, weights = white_design(), torch.randn(4, dtype=torch.float64)
    assert gradcheck(lambda x: whiten(x, None, None, training=True, method="pca").square().sum(1) @ weights, x)


def test_gradient_of_pca_is_finite_at_equal_eigenvalues_for_any_loss():
    x = white_design()
    (grad,) = torch.autograd.grad(whiten(x, None, None, training=True, method="pca").pow(3).sum(), x)
    assert grad.isfinite().all()


@pytest.mark.parametrize("method", ["zca", "pca"])
def test_second_derivative_at_equal_eigenvalues_is_refused(method: str):
    x = white_design()
    output = whiten(x, None, None, training=True, method=method)
    with pytest.raises(RuntimeError, match=f"gradient of {method} whitening cannot be differentiated again"):
        torch.autograd.grad(output.pow(3).sum(), x, create_graph=True)


@methods
def test_gradient_of_a_singular_covariance_is_finite(method: str):
    x = torch.randn(3, 16, requires_grad=True)
    for shrinkage in (0.0, 0.1):
        output = whiten(x, None, None, training=True, method=method, shrinkage=shrinkage)
        (grad,) = torch.autograd.grad(output.pow(3).sum(), x)
        assert grad.isfinite().all()


@pytest.mark.parametrize("method", ["zca", "pca", "cholesky"])
def test_shrinkage_bounds_the_matrix_of_a_singular_covariance(method: str):
    cov = reference.covariance(torch.randn(3, 16).double() * 1e3)[None]
    matrix, _ = whitening_matrix(cov, Method(method, 0.0, 5, 0.1))
    smallest = 0.1 * cov[0].trace() / 16
    torch.testing.assert_close(torch.linalg.matrix_norm(matrix, ord=2)[0], smallest.rsqrt())


def test_cholesky_of_a_covariance_that_rounding_left_indefinite():
    vectors = torch.linalg.qr(torch.randn(2, 4, 4).double()).Q
    values = torch.tensor([[2.0, 1.0, 0.5, -1e-3], [1.0, 1.0, 1.0, 1.0]], dtype=torch.float64)
    matrix, _ = cholesky(vectors * values[:, None] @ vectors.mT, Method("cholesky", 1e-5, 5, 0.0))
    clamped = vectors * (values.clamp(min=0) + 1e-5)[:, None] @ vectors.mT
    torch.testing.assert_close(matrix @ clamped @ matrix.mT, torch.eye(4).double().expand(2, 4, 4))
    assert torch.equal(matrix, matrix.tril())
    assert (matrix.diagonal(dim1=-2, dim2=-1) > 0).all()


# Evaluation


@methods
@pytest.mark.parametrize("shape", [(5, 4), (3, 4, 5, 5), (1, 4)])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_evaluation_whitens_by_the_running_statistics(method: str, shape: tuple[int, ...], offset: float):
    x, mean = torch.randn(shape) + offset, torch.randn(4) + offset
    factors = torch.randn(2, 2, 2)
    cov, grad_output = factors @ factors.mT, torch.randn(shape)
    weight, bias = torch.randn(4), torch.randn(4)
    before = mean.clone(), cov.clone()

    def exact(x, weight, bias):
        args = mean.to(x.dtype), cov.to(x.dtype), weight, bias
        return [whitening.whiten_inference(x, *args, method=method, shrinkage=0.1)]

    def actual(x, weight, bias):
        return [whiten(x, mean, cov, weight, bias, method=method, group_size=2, shrinkage=0.1)]

    tensors = x, weight, bias
    baseline = results_and_gradients(exact, grad_output, *tensors)
    true = results_and_gradients(exact, grad_output, *(t.double() for t in tensors))
    for result, base, expected in zip(
        results_and_gradients(actual, grad_output, *tensors), baseline, true, strict=True
    ):
        assert_within_budget(result, [base], expected)
    assert torch.equal(mean, before[0])
    assert torch.equal(cov, before[1])


def test_autocast_leaves_the_input_dtype():
    x, mean, cov = torch.randn(64, 4, requires_grad=True), torch.zeros(4), torch.eye(4)[None]
    expected = whiten(x, mean.clone(), cov.clone(), training=True)
    (expected_grad,) = torch.autograd.grad(expected.pow(3).sum(), x)
    with torch.autocast("cpu", torch.bfloat16):
        output = whiten(x, mean, cov, training=True)
        (grad,) = torch.autograd.grad(output.pow(3).sum(), x)
        evaluated = whiten(x, mean, cov)
    assert torch.equal(output, expected)
    assert torch.equal(grad, expected_grad)
    assert torch.equal(evaluated, whiten(x, mean, cov))


def test_bfloat16_input_has_float32_statistics():
    x = torch.randn(64, 4).bfloat16()
    output, mean, cov = op(x, torch.ones(4), torch.zeros(4), "zca", None)
    assert (output.dtype, mean.dtype, cov.dtype) == (torch.bfloat16, torch.float32, torch.float32)


# What is refused

X, MEAN, COV = torch.arange(20.0).view(5, 4), torch.zeros(4), torch.eye(4)[None]
REFUSED = {
    "one value": (ValueError, r"more than 1 value per channel when training, got input size torch.Size\(\[1, 4\]\)",
                  {"input": X[:1]}),
    "an unknown method": (ValueError, "unknown method 'svd': expected one of zca, pca, cholesky, newton_schulz",
                          {"method": "svd"}),
    "a group size that does not divide": (ValueError, "must divide the number of features, but got 3 for 4 features",
                                          {"group_size": 3}),
    "a group size of 0": (ValueError, "must divide the number of features, but got 0 for 4", {"group_size": 0}),
    "eps of 0": (ValueError, "eps must be positive during training, but got 0.0", {"eps": 0.0}),
    "a negative eps": (ValueError, "eps must be non-negative, but got -1", {"eps": -1, "training": False}),
    "no iterations": (ValueError, "iterations must be at least 1, but got 0", {"iterations": 0}),
    "a shrinkage above 1": (ValueError, "shrinkage must lie between 0 and 1, but got 1.5", {"shrinkage": 1.5}),
    "half of the statistics": (ValueError, "must either both be None or neither be None", {"running_mean": None}),
    "no statistics": (RuntimeError, "running_cov must be defined in evaluation",
                      {"running_cov": None, "training": False}),
    "another group size": (RuntimeError, r"should have shape \(2, 2, 2\), got \(1, 4, 4\): 4 features in groups of 2",
                           {"group_size": 2}),
    "a covariance of another dtype": (RuntimeError, "running_cov is torch.float64, but the input is torch.float32",
                                      {"running_cov": COV.double()}),
    "a covariance that is no tensor": (TypeError, "running_cov must be Tensor, not list", {"running_cov": [1.0]}),
    "a weight of another size": (RuntimeError, "weight should contain 4 elements not 3", {"weight": torch.ones(3)}),
    "statistics with a gradient": (RuntimeError, "cannot require a gradient",
                                   {"running_cov": COV.clone().requires_grad_()}),
    "no features": (RuntimeError, r"size \(N, C, \*\), got input size \(5,\)", {"input": X[:, 0]}),
    "integers": (NotImplementedError, "not implemented for 'torch.int64'", {"input": X.long()}),
    "no tensor": (TypeError, "input must be Tensor, not list", {"input": [1.0]}),
    "a momentum that is no number": (TypeError, "momentum must be float, not NoneType", {"momentum": None}),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_the_value_and_untouched_statistics(case: str):
    error, message, arguments = REFUSED[case]
    mean, cov = MEAN.clone(), COV.clone()
    with pytest.raises(error, match=message):
        whiten(**{"input": X, "running_mean": mean, "running_cov": cov, "training": True, **arguments})
    assert torch.equal(mean, MEAN)
    assert torch.equal(cov, COV)
