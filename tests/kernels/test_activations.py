"""Activations inside the kernels, and their derivatives, against torch in float64."""

import numpy as np
import pytest
import torch
from torch import Tensor

from batchnorm import reference
from tolerance import assert_within_budget

numba = pytest.importorskip("numba")

DTYPES = {torch.float32: np.float32, torch.float64: np.float64}
ACTIVATIONS = list(reference.ACTIVATIONS)
EDGES = [3.0, -3.0, 6.0, -6.0, 20.0, -20.0, 100.0, -100.0]
# Their derivatives multiply a number near 0, the rounded rest of something near 1, by z.
TIMES_Z = ("silu", "mish", "gelu")
COMPILED: dict[tuple[str, torch.dtype], object] = {}


def kernel_values(name: str, z: Tensor) -> tuple[Tensor, Tensor]:
    """The activation and its derivative, in a loop compiled as those of the kernels are."""
    from batchnorm._kernels.cpu.activations import activation_functions

    real = DTYPES[z.dtype]
    if (name, z.dtype) not in COMPILED:
        forward, backward = activation_functions(name, real)
        one = real(1)

        @numba.njit(fastmath={"contract"}, error_model="numpy")
        def loop(z, y, slope, n):
            for i in range(n):
                y[i] = forward(z[i])
                slope[i] = backward(z[i], one)

        COMPILED[name, z.dtype] = loop
    y, slope = torch.empty_like(z), torch.empty_like(z)
    COMPILED[name, z.dtype](z.numpy(), y.numpy(), slope.numpy(), z.numel())
    return y, slope


def torch_values(name: str, z: Tensor) -> tuple[Tensor, Tensor]:
    z = z.clone().requires_grad_()
    y = reference.ACTIVATIONS[name](z)
    (slope,) = torch.autograd.grad(y, z, torch.ones_like(z))
    return y.detach(), slope


def grid(dtype: torch.dtype) -> Tensor:
    """Dense where activations bend, sparse to both ends, with the neighbours of 0 down to the smallest."""
    dense = torch.linspace(-20, 20, 100_001, dtype=torch.float64)
    ends = torch.logspace(0, 4, 2001, dtype=torch.float64)
    tiny = torch.logspace(-300 if dtype is torch.float64 else -44, 0, 2001, dtype=torch.float64)
    return torch.cat([dense, ends, -ends, tiny, -tiny]).to(dtype)


EACH = pytest.mark.parametrize("name", ACTIVATIONS)
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@EACH
@EACH_DTYPE
def test_values_and_derivatives_are_right_to_a_few_roundings_of_their_scale(name, dtype):
    z = grid(dtype)
    eps = torch.finfo(dtype).eps
    # float64 has no wider type here: torch's own rounding counts, too
    exact = torch_values(name, z.double())
    for what, ours, true in zip(("value", "derivative"), kernel_values(name, z), exact, strict=True):
        scale = true.abs().clamp(min=1.0)
        if what == "derivative" and name in TIMES_Z:
            scale = scale.maximum(z.double().abs().clamp(max=20))
        error = (ours.double() - true).abs() / scale
        worst = error.argmax()
        assert error[worst] <= 3 * eps, f"{what} at {z[worst]}: {ours[worst]} instead of {true[worst]}"


@EACH
def test_values_and_derivatives_are_no_worse_than_those_of_torch(name):
    z = grid(torch.float32)
    z = z[z.abs() <= 20]
    theirs, exact = torch_values(name, z), torch_values(name, z.double())
    for what, ours, baseline, true in zip(("value", "derivative"), kernel_values(name, z), theirs, exact, strict=True):
        assert_within_budget(ours, [baseline], true, what)


@EACH
@EACH_DTYPE
@pytest.mark.parametrize("edge", EDGES)
def test_edges_have_the_values_and_derivatives_of_torch(edge, name, dtype):
    z = torch.tensor([edge], dtype=dtype)
    for ours, theirs in zip(kernel_values(name, z), torch_values(name, z), strict=True):
        torch.testing.assert_close(
            ours, theirs, rtol=0, atol=3 * torch.finfo(dtype).eps * max(1, abs(edge)), equal_nan=True
        )


@EACH
@EACH_DTYPE
@pytest.mark.parametrize("edge", [0.0, -0.0, float("inf"), -float("inf"), float("nan")])
def test_zero_inf_and_nan_have_exactly_the_values_and_derivatives_of_torch(edge, name, dtype):
    ours = [result[:1] for result in kernel_values(name, torch.full((64,), edge, dtype=dtype))]
    # torch's SIMD code, its code for the rest of a row and that for other dtypes differ at inf and NaN among themselves
    ways = [torch.full((64,), edge, dtype=dtype), torch.tensor([edge], dtype=dtype), torch.full((64,), edge).double()]
    theirs = [[result[:1].to(dtype) for result in torch_values(name, z)] for z in ways]
    for k, what in enumerate(("value", "derivative")):
        found = [torch.equal(ours[k].nan_to_num(), way[k].nan_to_num()) and same_nan(ours[k], way[k]) for way in theirs]
        assert any(found), f"{what}: {ours[k].item()}, and torch has {[way[k].item() for way in theirs]}"


def same_nan(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.isnan(), b.isnan())


@pytest.mark.parametrize("name", ["relu", "relu6", "leaky_relu", "hardswish"])
@EACH_DTYPE
def test_derivative_at_a_bend_is_exactly_that_of_torch(name, dtype):
    bends = torch.tensor([0.0, -0.0, 3.0, -3.0, 6.0, -6.0], dtype=dtype)
    around = [torch.nextafter(bends, torch.full_like(bends, to)) for to in (-9.0, 9.0)]
    z = torch.cat([bends, *around])
    for ours, theirs in zip(kernel_values(name, z), torch_values(name, z), strict=True):
        if name == "hardswish":
            torch.testing.assert_close(ours, theirs, rtol=2 * torch.finfo(dtype).eps, atol=0)
        else:
            assert torch.equal(ours, theirs)
