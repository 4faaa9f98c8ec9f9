"""The registered operators: schema, fakes, autograd and double backward, for every implementation behind them."""

import pytest
import torch
from torch import Tensor

from batchnorm import reference
from batchnorm._ops import batch_norm as ops
from batchnorm._ops.batch_norm import train, train_backward_op, train_op
from layouts import DENSE_LAYOUTS, LAYOUTS, tensor_in

EPS = 1e-3
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
ACTIVATIONS = (None, *reference.ACTIVATIONS)
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", list(ops.IMPLEMENTATIONS))
WITH_OR_WITHOUT_RESIDUAL = pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])


def arguments(
    x: Tensor,
    *,
    affine: str = "weight_and_bias",
    with_residual: bool = False,
    activation: str | None = None,
    implementation: str = "aten",
) -> tuple:
    """Arguments of ``train_op``, parameters in the dtype of the statistics."""
    dtype = torch.float32 if x.dtype == torch.bfloat16 else x.dtype
    weight = torch.randn(x.shape[1], dtype=dtype) if "weight" in affine else None
    bias = torch.randn(x.shape[1], dtype=dtype) if "bias" in affine else None
    residual = torch.randn_like(x) if with_residual else None
    return x, weight, bias, residual, EPS, activation, implementation


def requiring_grad(values: tuple) -> tuple:
    return tuple(v.requires_grad_() if isinstance(v, Tensor) else v for v in values)


def backward_arguments(values: tuple) -> tuple:
    output, _, _, saved = train_op(*values)
    x, weight, bias, residual, *options = values
    kept = residual if options[1] is not None else None
    return torch.randn_like(output), x, weight, bias, kept, saved, *options


def opcheck(op, values: tuple) -> None:
    torch.library.opcheck(op, values)


@IMPLEMENTATIONS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", DENSE_LAYOUTS)
def test_registration_is_right_in_every_layout_and_dtype(layout, dtype, implementation):
    values = arguments(tensor_in(layout, dtype), activation="silu", with_residual=True, implementation=implementation)
    opcheck(train_op, requiring_grad(values))
    with torch.no_grad():
        backward = backward_arguments(values)
    opcheck(train_backward_op, tuple(v.detach() if isinstance(v, Tensor) else v for v in backward))


@IMPLEMENTATIONS
@WITH_OR_WITHOUT_RESIDUAL
@pytest.mark.parametrize("affine", ["weight_and_bias", "weight", "bias", "none"])
def test_registration_is_right_without_weight_or_bias(affine, with_residual, implementation):
    values = arguments(tensor_in("image"), affine=affine, with_residual=with_residual, implementation=implementation)
    opcheck(train_op, requiring_grad(values))
    with torch.no_grad():
        opcheck(train_backward_op, backward_arguments(values))


@IMPLEMENTATIONS
@WITH_OR_WITHOUT_RESIDUAL
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_registration_is_right_with_every_activation(activation, with_residual, implementation):
    # in float64, as the tests of derivatives: so they share their kernels
    x = tensor_in("dense", torch.float64)
    values = arguments(x, activation=activation, with_residual=with_residual, implementation=implementation)
    opcheck(train_op, requiring_grad(values))


@IMPLEMENTATIONS
@pytest.mark.parametrize("layout", DENSE_LAYOUTS)
def test_fake_tensors_have_the_strides_of_real_ones(layout, implementation):
    values = arguments(tensor_in(layout), activation="relu", with_residual=True, implementation=implementation)
    with torch.no_grad():
        backward = backward_arguments(values)
        real = (*train_op(*values), *train_backward_op(*backward))
        with torch._subclasses.FakeTensorMode() as mode:
            faked, faked_backward = (
                [mode.from_tensor(v) if isinstance(v, Tensor) else v for v in given] for given in (values, backward)
            )
            fake = (*train_op(*faked), *train_backward_op(*faked_backward))
    assert [(f.shape, f.stride(), f.dtype) for f in fake] == [(r.shape, r.stride(), r.dtype) for r in real]


@IMPLEMENTATIONS
@WITH_OR_WITHOUT_RESIDUAL
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_operator_equals_reference(activation, with_residual, implementation):
    values = arguments(
        tensor_in("image", torch.float64),
        activation=activation,
        with_residual=with_residual,
        implementation=implementation,
    )
    x, weight, bias, residual, *_ = values
    expected = reference.batch_norm_train(x, weight, bias, residual=residual, activation=activation, eps=EPS)
    output, mean, var, saved = train_op(*values)
    torch.testing.assert_close((output, mean, var), expected[:3])
    torch.testing.assert_close(saved, torch.stack([expected.mean, torch.rsqrt(expected.var + EPS)]))


@IMPLEMENTATIONS
def test_operator_writes_to_none_of_its_inputs(implementation):
    values = arguments(tensor_in("image"), activation="relu", with_residual=True, implementation=implementation)
    before = [v.clone() for v in values if isinstance(v, Tensor)]
    train_op(*values)
    assert all(torch.equal(a, b) for a, b in zip(before, (v for v in values if isinstance(v, Tensor)), strict=True))


def differentiable(x: Tensor, activation: str | None, with_residual: bool, implementation: str, gamma: Tensor):
    """A function of the tensors alone, and these tensors, for gradcheck."""
    bias, residual = torch.randn_like(gamma), torch.randn_like(x)
    tensors = [x, gamma, bias, residual] if with_residual else [x, gamma, bias]

    def f(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
        return train(x, weight, bias, residual, EPS, activation, implementation)[0]

    return f, [t.requires_grad_() for t in tensors]


@IMPLEMENTATIONS
@WITH_OR_WITHOUT_RESIDUAL
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_first_and_second_derivatives(activation, with_residual, implementation):
    gamma = torch.tensor([1.5, -0.7]).double()
    x = torch.randn(4, 2, dtype=torch.float64)
    f, tensors = differentiable(x, activation, with_residual, implementation, gamma)
    assert torch.autograd.gradcheck(f, tensors)
    assert torch.autograd.gradgradcheck(f, tensors)


@IMPLEMENTATIONS
@pytest.mark.parametrize("activation", [None, "silu"])
def test_derivatives_where_gamma_is_zero(activation, implementation):
    gamma = torch.tensor([0.0, -2.0]).double()
    x = torch.randn(3, 2, 2, dtype=torch.float64)
    f, tensors = differentiable(x, activation, True, implementation, gamma)
    assert torch.autograd.gradcheck(f, tensors)
    assert torch.autograd.gradgradcheck(f, tensors)
    f(*tensors).square().sum().backward()
    assert (tensors[0].grad[:, 0] == 0).all()
    assert (tensors[1].grad != 0).all()


@IMPLEMENTATIONS
def test_third_derivative(implementation):
    x = torch.randn(4, 1, dtype=torch.float64)
    f, tensors = differentiable(x, "sigmoid", False, implementation, torch.ones(1).double())

    def slope(*tensors: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(f(*tensors).pow(3).sum(), tensors, create_graph=True)

    assert torch.autograd.gradgradcheck(slope, tensors)


@IMPLEMENTATIONS
@pytest.mark.parametrize("activation", [None, "tanh"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_of_input_residual_and_grad_output(layout, activation, implementation):
    shape, arrange = LAYOUTS[layout]
    x, residual, grad_output = (arrange(torch.randn(shape, dtype=torch.float64)) for _ in range(3))
    weight, bias = torch.randn(2, shape[1], dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (x, weight, bias, residual)]
    output, *_ = train(*leaves, EPS, activation, implementation)
    expected = reference.batch_norm_train(*leaves[:3], residual=residual, activation=activation, eps=EPS).output
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(
        torch.autograd.grad(output, leaves, grad_output), torch.autograd.grad(expected, leaves, grad_output)
    )


@IMPLEMENTATIONS
@pytest.mark.parametrize("layout", ["image_channels_last", "volume_channels_last"])
def test_channels_last_goes_in_and_out(layout, implementation):
    x = tensor_in(layout).requires_grad_()
    output, *_ = train(x, None, None, None, EPS, "relu", implementation)
    output.sum().backward()
    assert output.stride() == x.stride() == x.grad.stride()


@IMPLEMENTATIONS
def test_gradient_reaches_only_what_asks_for_it(implementation):
    x, weight, bias, residual, *_ = arguments(tensor_in("image"), with_residual=True)
    bias.requires_grad_()
    output, mean, var = train(x, weight, bias, residual, EPS, "relu", implementation)
    output.sum().backward()
    assert bias.grad is not None
    assert x.grad is weight.grad is residual.grad is None
    assert not mean.requires_grad
    assert not var.requires_grad


@IMPLEMENTATIONS
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 2, 2), (2, 3, 0), (4, 0)])
def test_empty_input_has_zero_parameter_gradients(shape, implementation):
    x = torch.randn(shape, requires_grad=True)
    weight, bias = (torch.randn(shape[1], requires_grad=True) for _ in range(2))
    output, *_ = train(x, weight, bias, torch.randn(shape), EPS, "relu", implementation)
    output.sum().backward()
    assert output.shape == x.grad.shape == shape
    assert torch.equal(weight.grad, torch.zeros(shape[1]))
    assert torch.equal(bias.grad, torch.zeros(shape[1]))
