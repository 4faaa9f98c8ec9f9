"""A layer against its oracle: every output, every gradient, running statistics and evaluation, within the budget."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from batchnorm import reference
from batchnorm.reference import TrainOutput
from tolerance import assert_within_budget

STEPS = (0, 1, 2, 10)
# one step of an oracle: (x, step from 1, running_mean, running_var, weight, bias)
Train = Callable[[Tensor, int, Tensor, Tensor, Tensor, Tensor], TrainOutput]
Call = Callable[[Any, Tensor, int], Tensor]
NAMES = ("output", "grad_input", "grad_weight", "grad_bias", "running_mean", "running_var", "evaluation")


def results_of_step(output: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    """The output, and the gradients of input, weight and bias."""
    direction = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return [output.detach(), *torch.autograd.grad(output, leaves, direction)]


def of_all_steps(results: Sequence[list[Tensor]]) -> list[Tensor]:
    """Output and gradients of all steps in one tensor each: in a few values a computation is right by chance."""
    return [torch.cat([tensor.flatten() for tensor in tensors]) for tensors in zip(*results, strict=True)]


def by_oracle(
    train: Train,
    evaluate: Callable[..., Tensor],
    batches: Sequence[Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    momentum: float | None,
) -> list[Tensor]:
    """By the formulas, in the dtype of the tensors; running averages receive the unbiased variance."""
    mean, var, results = torch.zeros_like(bias), torch.ones_like(bias), []
    for step, batch in enumerate(batches, start=1):
        leaves = [tensor.detach().clone().requires_grad_() for tensor in (batch, weight, bias)]
        output, new_mean, new_var, count = train(leaves[0], step, mean, var, *leaves[1:])
        results.append(results_of_step(output, leaves))
        share = 1 / step if momentum is None else momentum
        mean = reference.running_average(mean, new_mean.detach(), share)
        var = reference.running_average(var, reference.var_unbiased(new_var.detach(), count), share)
    return [*of_all_steps(results), mean, var, evaluate(x, mean, var, weight, bias)]


def by_layer(layer: Any, call: Call, batches: Sequence[Tensor], x: Tensor) -> list[Tensor]:
    results = []
    for step, batch in enumerate(batches, start=1):
        leaf = batch.detach().requires_grad_()
        results.append(results_of_step(call(layer.train(), leaf, step), [leaf, layer.weight, layer.bias]))
    return [*of_all_steps(results), layer.running_mean, layer.running_var, layer.eval()(x).detach()]


def assert_follows(
    layer: Any,
    formulas: Train,
    by_aten: Train,
    batches: Sequence[Tensor],
    call: Call = lambda layer, x, step: layer(x),
) -> None:
    """The layer, new, does in these steps and in an evaluation after them what the formulas do in float64.

    The budget is that of the formulas in the dtype of the batches, and of the same by ATen's kernels.
    """
    with torch.no_grad():
        layer.weight.normal_()
        layer.bias.normal_()
    x = torch.randn_like(batches[0]) + batches[0].mean() if batches else torch.randn(4, layer.num_features, 5)
    tensors = x, layer.weight.detach(), layer.bias.detach()
    actual = by_layer(layer, call, batches, x)
    ways = ((formulas, reference.batch_norm_inference), (by_aten, F.batch_norm))
    baselines = [by_oracle(*way, batches, *tensors, layer.momentum) for way in ways]
    wide = [batch.double() for batch in batches]
    exact = by_oracle(*ways[0], wide, *(tensor.double() for tensor in tensors), layer.momentum)
    names = NAMES if batches else NAMES[4:]
    for name, result, target, *others in zip(names, actual, exact, *baselines, strict=True):
        assert_within_budget(result, others, target, name)
