"""Conditional batch normalization: shared statistics, gamma and beta of the class of each sample."""

import pytest
import torch
import torch.nn.functional as F

import batchnorm.nn as bnn
from batchnorm import reference
from batchnorm._ops import choice
from batchnorm.relatives.conditional import scale_and_shift_by_label
from tolerance import assert_within_budget, results_and_gradients

SHAPES = {(6, 3): bnn.ConditionalBatchNorm1d, (5, 3, 4): bnn.ConditionalBatchNorm1d}
SHAPES |= {(3, 3, 2, 5): bnn.ConditionalBatchNorm2d, (2, 3, 2, 1, 2): bnn.ConditionalBatchNorm3d}
SHAPES |= {(2, 1): bnn.ConditionalBatchNorm1d}
NAMES = ("output", "grad_input", "grad_weight", "grad_bias")


@pytest.mark.parametrize("implementation", choice.IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_results_and_gradients_stay_within_the_budget(shape, offset, dtype, implementation):
    layer = SHAPES[shape](shape[1], num_classes=4, implementation=implementation)
    labels = torch.tensor([0, 2, 2, 3, 0, 0])[: shape[0]]

    def by_layer(x, weight, bias):
        return (torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x, labels)),)

    def formulas(x, weight, bias):
        normalized = reference.batch_norm_train(x).output
        return (scale_and_shift_by_label(normalized, weight, bias, labels).to(x.dtype),)

    def by_aten(x, weight, bias):
        normalized = F.batch_norm(x, torch.zeros(x.shape[1]), torch.ones(x.shape[1]), None, None, True)
        return (scale_and_shift_by_label(normalized, weight, bias, labels).to(x.dtype),)

    tensors = ((torch.randn(shape) + offset).to(dtype), *torch.randn(2, 4, shape[1]))
    grad_output = torch.randn(shape).to(dtype)
    actual = results_and_gradients(by_layer, grad_output, *tensors)
    baselines = [results_and_gradients(f, grad_output, *tensors) for f in (formulas, by_aten)]
    exact = results_and_gradients(formulas, grad_output.double(), *(tensor.double() for tensor in tensors))
    for name, result, target, *others in zip(NAMES, actual, exact, *baselines, strict=True):
        assert_within_budget(result, others, target, name)
    assert not actual[2][1].any()  # a class that is not in the batch


def test_statistics_are_batch_norms_and_evaluation_uses_them():
    layer, plain = bnn.ConditionalBatchNorm2d(3, num_classes=2), torch.nn.BatchNorm2d(3, affine=False)
    labels = torch.tensor([0, 1, 1, 0])
    for _ in range(3):
        x = torch.randn(4, 3, 2, 5) + 2
        layer(x, labels)
        plain(x)
    torch.testing.assert_close(dict(layer.norm.state_dict()), dict(plain.state_dict()))
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    x = torch.randn(1, 3, 2, 5)
    for label in (0, 1):
        z = plain.eval()(x) * layer.weight[label][:, None, None] + layer.bias[label][:, None, None]
        torch.testing.assert_close(layer.eval()(x, torch.tensor([label])), z)


def test_a_new_layer_is_batch_normalization_for_every_label():
    x = torch.randn(4, 3, 5)
    layer = bnn.ConditionalBatchNorm1d(3, num_classes=9, activation="relu", bias=False)
    expected = bnn.BatchNorm1d(3, activation="relu")(x)
    torch.testing.assert_close(layer(x, torch.tensor([0, 8, 3, 3])), expected)


def test_gradients_are_those_of_finite_differences():
    layer = bnn.ConditionalBatchNorm1d(2, num_classes=3, dtype=torch.float64, track_running_stats=False)
    x, labels = torch.randn(5, 2, dtype=torch.float64, requires_grad=True), torch.tensor([0, 2, 2, 0, 2])
    assert torch.autograd.gradcheck(lambda x: layer(x, labels), x)
    assert torch.autograd.gradgradcheck(lambda x: layer(x, labels), x)


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (torch.tensor([0, 1, 2, 0]), IndexError, "labels should be 0 to 1, got 2"),
        (torch.tensor([0, 1, -1, 0]), IndexError, "labels should be 0 to 1, got -1"),
        (torch.tensor([0, 1, 1]), ValueError, r"labels should be torch.int64 of shape \(4,\).*shape \(3,\)"),
        (torch.zeros(4), ValueError, "got torch.float32"),
        (torch.tensor([[0], [1], [1], [0]]), ValueError, r"got torch.int64 of shape \(4, 1\)"),
    ],
    ids=["too_large", "negative", "too_few", "float", "two_dimensional"],
)
def test_what_is_no_label_is_refused_untouched(labels, error, message):
    layer = bnn.ConditionalBatchNorm1d(3, num_classes=2)
    with pytest.raises(error, match=message):
        layer(torch.randn(4, 3), labels)
    torch.testing.assert_close(dict(layer.state_dict()), dict(bnn.ConditionalBatchNorm1d(3, 2).state_dict()))


def test_no_class_at_all_is_refused():
    with pytest.raises(ValueError, match="num_classes should be at least 1, got 0"):
        bnn.ConditionalBatchNorm2d(3, num_classes=0)
