"""Any shape, stride, offset and scale: every result within the error budget, for every implementation."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from batchnorm import functional, reference
from batchnorm._ops import choice
from tolerance import assert_within_budget, results_and_gradients

EPS = 1e-5
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", choice.IMPLEMENTATIONS)
NAMES = ("output", "mean", "var", "grad_input", "grad_weight", "grad_bias")

odd_sizes = st.sampled_from([1, 2, 3, 5, 7, 17, 33])
shapes = st.tuples(odd_sizes, st.sampled_from([1, 2, 3, 7]), st.lists(odd_sizes, max_size=3)).map(
    lambda parts: (parts[0], parts[1], *parts[2])
)
usable_shapes = shapes.filter(lambda shape: 2 <= torch.Size(shape).numel() // shape[1] <= 4096)
offsets = st.sampled_from([0.0, -3.0, 1e2, 1e4])
scales = st.sampled_from([1e-4, 1.0, 1e4])
dtypes = st.sampled_from([torch.float32, torch.bfloat16])
arrangements = st.sampled_from(["contiguous", "channels_last", "strided", "transposed"])
searched = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def arrange(x: Tensor, how: str) -> Tensor:
    """The same values in another memory layout."""
    if how == "channels_last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if how == "transposed":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if how == "strided":
        return x.repeat_interleave(2, 0)[::2]
    return x


def by_aten(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """torch's own kernel; momentum 1 hands out its statistics."""
    count = reference.values_per_channel(x)
    dtype = reference.widen(x).dtype
    mean, var = torch.zeros(2, x.shape[1], dtype=dtype)
    output = torch.nn.functional.batch_norm(x, mean, var, weight, bias, True, 1.0, EPS)
    return output, mean, var * ((count - 1) / count)


def by_reference(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return reference.batch_norm_train(x, weight, bias, eps=EPS)[:3]


def ours(implementation: str):
    def f(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return functional.batch_norm_train(x, weight, bias, eps=EPS, implementation=implementation)[:3]

    return f


def check(implementation: str, x: Tensor, weight: Tensor, bias: Tensor, grad_output: Tensor) -> None:
    """Output, statistics and all gradients of one implementation against float64."""
    tensors = (x, weight, bias)
    actual = results_and_gradients(ours(implementation), grad_output, *tensors)
    baselines = [results_and_gradients(f, grad_output, *tensors) for f in (by_aten, by_reference)]
    exact = results_and_gradients(by_reference, grad_output.double(), *(t.double() for t in tensors))
    for name, result, target, *others in zip(NAMES, actual, exact, *baselines, strict=True):
        assert_within_budget(result, others, target, name)


def problem(shape: tuple[int, ...], dtype: torch.dtype, offset: float, scale: float) -> tuple[Tensor, ...]:
    """Input of the given mean / std and std, parameters, and the gradient of the output."""
    x = ((torch.randn(shape) + offset) * scale).to(dtype)
    weight, bias = torch.randn(2, shape[1])
    return x, weight, bias, torch.randn(shape).to(dtype)


@IMPLEMENTATIONS
@searched
@given(shape=usable_shapes, dtype=dtypes, offset=offsets, scale=scales, how=arrangements, seed=st.integers(0, 2**31))
def test_results_and_gradients_stay_within_the_budget(implementation, shape, dtype, offset, scale, how, seed):
    torch.manual_seed(seed)
    x, weight, bias, grad_output = problem(shape, dtype, offset, scale)
    check(implementation, arrange(x, how), weight, bias, arrange(grad_output, how))


@IMPLEMENTATIONS
@searched
@given(shape=usable_shapes, dtype=dtypes, offset=offsets, seed=st.integers(0, 2**31))
def test_evaluation_stays_within_the_budget(implementation, shape, dtype, offset, seed):
    torch.manual_seed(seed)
    x, weight, bias, grad_output = problem(shape, dtype, offset, 1.0)
    mean, var = torch.full((shape[1],), offset), torch.rand(shape[1]) + 0.1

    def evaluate(name: str):
        def f(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor]:
            statistics = (mean.to(weight.dtype), var.to(weight.dtype))
            if name == "torch":
                return (torch.nn.functional.batch_norm(x, *statistics, weight, bias, eps=EPS),)
            return (functional.batch_norm_inference(x, *statistics, weight, bias, eps=EPS, implementation=name),)

        return f

    tensors = (x, weight, bias)
    actual = results_and_gradients(evaluate(implementation), grad_output, *tensors)
    baselines = [results_and_gradients(evaluate(name), grad_output, *tensors) for name in ("torch", "reference")]
    exact = results_and_gradients(evaluate("torch"), grad_output.double(), *(t.double() for t in tensors))
    for name, result, target, *others in zip(
        ("output", "grad_input", "grad_weight", "grad_bias"), actual, exact, *baselines, strict=True
    ):
        assert_within_budget(result, others, target, name)


@IMPLEMENTATIONS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 1), (2, 3), (1, 1, 2), (3, 2, 5, 7), (2, 3, 3, 1, 5)], ids=str)
@pytest.mark.parametrize("offset", [0.0, 1e4], ids=["centered", "mean_over_std_1e4"])
def test_small_and_odd_shapes(shape, offset, dtype, implementation):
    check(implementation, *problem(shape, dtype, offset, 1.0))


@IMPLEMENTATIONS
@pytest.mark.parametrize("value", [0.0, 3.0, -1e4, 1e-40], ids=["zero", "three", "large", "denormal"])
def test_constant_channel_yields_the_bias(value, implementation):
    x = torch.full((8, 2, 4), value)
    weight, bias = torch.randn(2, 2)
    output, mean, var, _ = functional.batch_norm_train(x, weight, bias, implementation=implementation)
    # ATen computes x * scale + shift with scale = weight / sqrt(0 + eps): a rounding of that product remains
    roundings = 2 * torch.finfo(torch.float32).eps * abs(value) * weight.abs().max().item() / EPS**0.5
    torch.testing.assert_close(output, bias[:, None].expand_as(x), rtol=1e-6, atol=roundings)
    torch.testing.assert_close(mean, torch.full((2,), value))
    assert (var <= 1e-12).all()
    check(implementation, x, weight, bias, torch.randn(8, 2, 4))


@IMPLEMENTATIONS
@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_inf_and_nan_spread_over_their_channel_as_in_torch(bad, training, implementation):
    x = torch.randn(4, 3, 5)
    x[1, 2, 3] = bad
    leaves, outputs, grads, statistics = [], [], [], []
    for f in (functional.batch_norm, torch.nn.functional.batch_norm):
        leaves.append(x.clone().requires_grad_())
        statistics.append([torch.zeros(3), torch.ones(3)])
        options = {"implementation": implementation} if f is functional.batch_norm else {}
        output = f(leaves[-1], *statistics[-1], training=training, **options)
        grads.append(torch.autograd.grad(output.sum(), leaves[-1]))
        outputs.append(output.detach())
    torch.testing.assert_close(*outputs, equal_nan=True)
    torch.testing.assert_close(*statistics, equal_nan=True)
    torch.testing.assert_close(*grads, equal_nan=True)
    assert outputs[0][:, :2].isfinite().all()


@IMPLEMENTATIONS
def test_float64_agrees_with_the_formulas_to_fifteen_digits(implementation):
    x, weight, bias, grad_output = (t.double() for t in problem((9, 3, 5), torch.float32, 1e4, 1.0))
    actual = results_and_gradients(ours(implementation), grad_output, x, weight, bias)
    expected = results_and_gradients(by_reference, grad_output, x, weight, bias)
    # mean / std of 1e4 costs four of sixteen digits
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
