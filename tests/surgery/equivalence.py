"""Whether two models do the same: outputs, gradients and buffers over steps in both modes, within the error budget."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from tolerance import assert_within_budget

STEPS = 2
# runs of the original on values that are rounded elsewhere: one alone may be right by chance in a tensor of few values
DRAWS = 4


def rounded_elsewhere(tensor: Tensor, draw: int) -> Tensor:
    """The same values, each off by at most one rounding."""
    signs = torch.randint(-1, 2, tensor.shape, generator=torch.Generator().manual_seed(draw))
    return tensor * (1 + signs * torch.finfo(tensor.dtype).eps)


def first_tensor(output: Any) -> Tensor:
    while not isinstance(output, Tensor):
        output = output[0]
    return output


def history(model: nn.Module, *inputs: Tensor, **kwargs: Any) -> dict[str, Tensor]:
    """Everything that steps in training and one in evaluation mode give: outputs, gradients, buffers."""
    result = {}
    for step, training in enumerate([*[True] * STEPS, False]):
        torch.manual_seed(step)
        model.train(training)
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        output = first_tensor(model(*leaves, **kwargs))
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
        grads = torch.autograd.grad(output, [*leaves, *parameters.values()], weights, allow_unused=True)
        names = [*(f"input {k}" for k in range(len(leaves))), *parameters]
        values = {"output": output, **{f"grad of {n}": g for n, g in zip(names, grads, strict=True) if g is not None}}
        values |= dict(model.named_buffers())
        result |= {f"step {step}, {name}": value.detach().clone() for name, value in values.items()}
    return result


def assert_same_model(original: nn.Module, converted: nn.Module, *inputs: Tensor, **kwargs: Any) -> None:
    """Both models are run, and so changed."""
    exact = history(copy.deepcopy(original).double(), *(x.double() for x in inputs), **kwargs)
    baselines = []
    for draw in range(DRAWS):
        other = copy.deepcopy(original)
        for parameter in other.parameters():
            parameter.data = rounded_elsewhere(parameter.data, draw)
        baselines.append(history(other, *(rounded_elsewhere(x, draw) for x in inputs), **kwargs))
    baselines.append(history(original, *inputs, **kwargs))
    actual = history(converted, *inputs, **kwargs)
    assert list(actual) == list(baselines[0])
    for name, value in actual.items():
        if value.is_floating_point():
            assert_within_budget(value, [b[name] for b in baselines], exact[name], name)
        else:
            assert torch.equal(value, baselines[0][name]), name
