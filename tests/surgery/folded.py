"""Models whose statistics are worth folding, and whether a folded one does the same in evaluation."""

import copy
from typing import Any

import torch
from equivalence import DRAWS, first_tensor, rounded_elsewhere
from torch import Tensor, nn

import batchnorm
from batchnorm.surgery import Folds
from tolerance import assert_within_budget


def with_statistics(model: nn.Module) -> nn.Module:
    """In evaluation mode, with gamma, beta, mean and variance as if trained."""
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and isinstance(layer.running_var, Tensor):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.3, 3)
            layer.num_batches_tracked.fill_(7)
            if layer.weight is not None:
                nn.init.normal_(layer.weight)
            if layer.bias is not None:
                nn.init.normal_(layer.bias)
    return model.eval()


@torch.no_grad()
def assert_same_evaluation(model: nn.Module, folded: nn.Module, *inputs: Tensor, **kwargs: Any) -> None:
    """The folded model is as near to the unfolded in float64 as that one is, if its values are rounded elsewhere."""
    exact = first_tensor(copy.deepcopy(model).double()(*(x.double() for x in inputs), **kwargs))
    baselines = [first_tensor(model(*inputs, **kwargs))]
    for draw in range(DRAWS):
        other = copy.deepcopy(model)
        for parameter in other.parameters():
            parameter.data = rounded_elsewhere(parameter.data, draw)
        baselines.append(first_tensor(other(*(rounded_elsewhere(x, draw) for x in inputs), **kwargs)))
    assert_within_budget(first_tensor(folded(*inputs, **kwargs)), baselines, exact)


def fold_and_compare(model: nn.Module, *inputs: Tensor, example: bool = True) -> tuple[nn.Module, Folds]:
    """Fold, compare, and see that the model itself is as before."""
    before = snapshot(model)
    folded, changes = batchnorm.fold(model, inputs if example else None)
    assert snapshot(model) == before
    assert_same_evaluation(model, folded, *inputs)
    return folded, changes


def snapshot(model: nn.Module) -> list[Any]:
    """Classes, modes, attributes and tensors by identity and version."""
    tensors = [(n, id(t), t._version) for n, t in [*model.named_parameters(), *model.named_buffers()]]
    return [[(n, type(m), m.training, sorted(vars(m))) for n, m in model.named_modules()], tensors]


def whats(changes: Folds) -> dict[str, str]:
    return {change.name: change.what for change in changes}


def reason(model: nn.Module, *inputs: Tensor, name: str | None = None) -> str:
    """Why a layer, the only one if it is not named, is left alone; the model stays the same."""
    _, changes = fold_and_compare(model, *inputs)
    (change,) = [change for change in changes if name in (None, change.name)]
    assert change.what == "left alone"
    assert (change.error, change.growth, change.spread) == (None, None, None)
    return change.reason
