"""Layers that keep a mask instead of what went into them, under every use that autograd allows."""

import copy
import pickle

import pytest
import torch
from torch import Tensor
from torch.nn.utils import parametrize

import batchnorm.nn
from batchnorm import functional


def contiguous(x: Tensor) -> Tensor:
    return x


def channel_innermost(x: Tensor) -> Tensor:
    """channels_last where there are four dimensions."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def away_from_bends(*shape: int) -> Tensor:
    """Sums that no small step brings across 0 or 6."""
    x = torch.randn(*shape, dtype=torch.float64)
    return x + 3 * torch.where(torch.rand_like(x) < 0.5, -1.0, 1.0)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
def test_first_and_second_derivatives_with_a_mask_in_training(activation):
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    weight, bias = torch.tensor([[1.5, -0.7], [0.2, 0.1]], dtype=torch.float64)
    residual = away_from_bends(4, 2, 3)
    leaves = [t.requires_grad_() for t in (x, weight, bias, residual)]

    def f(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return functional.batch_norm_train(
            x, weight, bias, residual=residual, activation=activation, implementation="kernel"
        ).output

    assert torch.autograd.gradcheck(f, leaves)
    assert torch.autograd.gradgradcheck(f, leaves)


@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
def test_first_and_second_derivatives_of_a_frozen_layer(with_residual):
    layer = batchnorm.nn.BatchNorm1d(2, activation="relu6", implementation="kernel", dtype=torch.float64)
    layer.eval().requires_grad_(False)
    layer.weight.copy_(torch.tensor([1.5, -0.7]))
    leaves = [away_from_bends(4, 2, 3).requires_grad_() for _ in range(1 + with_residual)]
    assert torch.autograd.gradcheck(layer, leaves)
    assert torch.autograd.gradgradcheck(layer, leaves)


FORMS = [(40, 3), (701, 5), (3, 600), (5, 3, 100), (3, 7, 2, 3), (2, 2, 17000)]


@pytest.mark.parametrize("shape", FORMS, ids=str)
@pytest.mark.parametrize("arrange", [contiguous, channel_innermost])
def test_gradient_with_a_graph_equals_the_one_without_in_every_form(shape, arrange):
    x, residual = (arrange(tensor) for tensor in torch.randn(2, *shape))
    leaves = [x.requires_grad_(), residual.requires_grad_()]
    output, *_ = functional.batch_norm_train(leaves[0], residual=leaves[1], activation="relu", implementation="kernel")
    grad_output = torch.randn(shape)
    plain = torch.autograd.grad(output, leaves, grad_output, retain_graph=True)
    again = torch.autograd.grad(output, leaves, grad_output, create_graph=True)
    torch.testing.assert_close(plain, tuple(t.detach() for t in again), rtol=1e-4, atol=1e-5)
    assert torch.equal(plain[1], torch.where(output > 0, grad_output, 0.0))


def block() -> batchnorm.nn.BatchNorm2d:
    layer = batchnorm.nn.BatchNorm2d(4, activation="relu", implementation="kernel")
    with torch.no_grad():
        layer.weight.normal_()
        layer.bias.normal_()
    return layer


def plain_block(layer: torch.nn.Module, x: Tensor, residual: Tensor, weight: Tensor | None = None) -> Tensor:
    weight = layer.weight if weight is None else weight
    z = torch.nn.functional.batch_norm(x, None, None, weight, layer.bias, True, 0.0, layer.eps)
    return torch.relu(z + residual)


@pytest.fixture
def tensors():
    return tuple(torch.randn(3, 4, 5, 6).requires_grad_() for _ in range(2))


def close(actual, expected) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_weight_that_is_computed_receives_its_gradient(tensors):
    class Exponential(torch.nn.Module):
        def forward(self, raw: Tensor) -> Tensor:
            return raw.exp()

    layer = block()
    parametrize.register_parametrization(layer, "weight", Exponential())
    raw = layer.parametrizations.weight.original
    output = layer(*tensors)
    expected = torch.autograd.grad(plain_block(layer, *tensors).pow(2).sum(), (raw, *tensors))
    close(torch.autograd.grad(output.pow(2).sum(), (raw, *tensors)), expected)
    assert layer.running_mean.abs().sum() > 0


def test_parameters_given_by_functional_call_receive_their_gradient(tensors):
    layer = block()
    given = {"weight": torch.randn(4, requires_grad=True), "bias": torch.randn(4, requires_grad=True)}
    output = torch.func.functional_call(layer, given, tensors)
    assert output.requires_grad
    grads = torch.autograd.grad(output.pow(2).sum(), [*given.values(), *tensors])
    z = torch.nn.functional.batch_norm(tensors[0], None, None, *given.values(), True, 0.0, layer.eps)
    expected = torch.autograd.grad(torch.relu(z + tensors[1]).pow(2).sum(), [*given.values(), *tensors])
    close(grads, expected)
    assert layer.weight.grad is None


def test_weight_replaced_by_a_plain_tensor(tensors):
    layer = block()
    del layer.weight
    layer.weight = torch.randn(4)
    close(layer(*tensors), plain_block(layer, *tensors))
    layer.weight = torch.randn(4, 2)[:, 0].requires_grad_()
    grads = torch.autograd.grad(layer(*tensors).pow(2).sum(), (layer.weight, *tensors))
    close(grads, torch.autograd.grad(plain_block(layer, *tensors).pow(2).sum(), (layer.weight, *tensors)))


@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["deepcopy", "pickle"]
)
def test_copies_after_use_behave_as_the_layer_does(again, tensors):
    layer = block()
    layer(*tensors).sum().backward()
    other = again(layer)
    assert torch.equal(layer(*tensors), other(*tensors))
    assert torch.equal(layer.running_var, other.running_var)
    assert layer.num_batches_tracked == other.num_batches_tracked == 2


def test_hooks_see_the_gradients(tensors):
    layer, seen = block(), {}
    layer.register_full_backward_hook(lambda _m, grad_input, grad_output: seen.update(full=(grad_input, grad_output)))
    layer.register_forward_hook(lambda _m, _args, output: seen.update(output=output))
    output = layer(*tensors)
    output.register_hook(lambda grad: grad * 2)
    output.retain_grad()
    layer.weight.register_hook(lambda grad: seen.update(weight=grad))
    output.sum().backward()
    expected = torch.autograd.grad(2 * plain_block(layer, *tensors).sum(), (*tensors, layer.weight))
    close((tensors[0].grad, tensors[1].grad, seen["weight"]), expected)
    close(seen["full"][0], (tensors[0].grad, tensors[1].grad))
    assert seen["output"].shape == output.shape


@pytest.mark.parametrize("kind", ["expanded", "strided", "transposed", "channels_last"])
def test_grad_output_in_any_layout(kind, tensors):
    layer = block()
    output = layer(*tensors)
    g = torch.randn(output.shape)
    grad_output = {
        "expanded": torch.randn(1, 4, 1, 1).expand_as(g),
        "strided": torch.randn(3, 4, 5, 12)[..., ::2],
        "transposed": torch.randn(4, 3, 5, 6).transpose(0, 1),
        "channels_last": g.to(memory_format=torch.channels_last),
    }[kind]
    expected = torch.autograd.grad(plain_block(layer, *tensors), tensors, grad_output)
    close(torch.autograd.grad(output, tensors, grad_output), expected)


def test_graph_that_is_retained_yields_the_same_twice(tensors):
    output = block()(*tensors).pow(2).sum()
    first = torch.autograd.grad(output, tensors, retain_graph=True)
    second = torch.autograd.grad(output, tensors, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    torch.autograd.grad(output, tensors)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(output, tensors)


def test_input_changed_before_backward_is_noticed(tensors):
    x = tensors[0] * 1
    output = block()(x, tensors[1])
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


NAMES = ("input", "residual", "weight", "bias")


CASES = {
    "training": (True, None),
    "training_relu": (True, "relu"),
    "training_silu": (True, "silu"),
    "evaluation": (False, None),
    "evaluation_relu": (False, "relu"),
}


@pytest.mark.parametrize(("training", "activation"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("only", NAMES)
def test_gradient_for_one_tensor_alone(only, training, activation, tensors):
    x, residual = (t.detach() for t in tensors)
    weight, bias = torch.randn(2, 4)
    values = dict(zip(NAMES, (x, residual, weight, bias), strict=True))
    values[only].requires_grad_()
    statistics = (torch.randn(4), torch.rand(4) + 0.5)
    output = functional.batch_norm(
        x, *statistics, weight, bias, training, 0.0, residual=residual, activation=activation, implementation="kernel"
    )
    z = torch.nn.functional.batch_norm(x, *statistics, weight, bias, training, 0.0) + residual
    expected = z if activation is None else getattr(torch.nn.functional, activation)(z)
    close(
        torch.autograd.grad(output.pow(2).sum(), values[only]), torch.autograd.grad(expected.pow(2).sum(), values[only])
    )


@pytest.mark.parametrize("name", ["input", "residual", "weight", "bias"])
def test_gradient_asked_for_one_of_all(name, tensors):
    layer = block()
    asked = {"input": tensors[0], "residual": tensors[1], "weight": layer.weight, "bias": layer.bias}[name]
    expected = torch.autograd.grad(plain_block(layer, *tensors).pow(2).sum(), asked)
    close(torch.autograd.grad(layer(*tensors).pow(2).sum(), asked), expected)
    # with a graph, too
    close(torch.autograd.grad(layer(*tensors).pow(2).sum(), asked, create_graph=True), expected)
