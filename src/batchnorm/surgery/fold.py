"""``fold``: BN parameters and statistics go into the neighbouring linear or convolution layers."""

from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from batchnorm.surgery.changes import Fold, Folds
from batchnorm.surgery.convert import check, remove
from batchnorm.surgery.fold_checks import check_whole, errors_on_example, errors_on_random_input
from batchnorm.surgery.fold_observe import bare_copy, copied, observe
from batchnorm.surgery.fold_plan import Group, Plan
from batchnorm.surgery.fold_proof import remainder_of
from batchnorm.surgery.fold_search import Search
from batchnorm.surgery.foldable import become, normalizing_layers, why_not_foldable
from batchnorm.surgery.folding import growth_and_spread
from batchnorm.surgery.fused import FusedForward
from batchnorm.surgery.layers import is_ours


def fold(model: nn.Module, example: Any = None) -> tuple[nn.Module, Folds]:
    r"""Fold the BN layers of a model in evaluation mode into the linear or convolution layers next to them, exactly.

    .. math:: s = \gamma / \sqrt{\sigma^2 + \epsilon}, \quad t = \beta - s \mu, \qquad
        s (W * x + b) + t = (s W) * x + (s b + t), \qquad W * (s x + t) + b = (W s) * x + (b + W * t)

    A layer goes into what precedes it, or else into what follows it. In its place remains a ``torch.nn.Identity``, or
    the activation of one of our layers, so the names of all other modules and tensors stay. Weights are computed in
    float64 and rounded once.

    What stands next to a layer is found by following the data flow with :mod:`torch.fx`, from the model to its blocks.
    A layer is folded only where that proves that nothing else sees the value between the two and every use of both is
    this one; where it does not, the layer stays as it is, with the reason. Linear layers and convolutions count by
    what their forward does: ``F.conv2d`` and its like with a weight and a bias that are parameters, in subclasses too.

    Args:
        model: in evaluation mode; never changed. Fold before ``torch.compile``, ``torch.export`` and quantization.
        example: what the model is called with: a tensor, a tuple of arguments or a dict of keyword arguments. Copies
            of the model run on it, in evaluation mode. It is needed where torch.fx cannot follow the whole model, for
            :class:`torch.nn.BatchNorm1d` next to a linear layer, which normalizes the features of (N, C) only, and
            for branches on shapes. With it the folded model is compared with the model.

    Returns:
        ``(folded, changes)``: a folded copy, and a :class:`Fold` per BN layer, which prints as a table.

    Raises:
        FoldError: the folded model would differ on the example by more than rounding.
        TypeError: ``model`` is not a module.
        ValueError: the model is compiled, has uninitialized parameters, cannot be copied, or does not run on the
            example.

    Limits: what is proved, is proved for calls like the example's, or for calls with tensors for the arguments without
    a default. Code that reaches layers without being the forward of a module is not seen. The folded model cannot be
    trained as the model could: no layer normalizes by its batch any more.

    Source:
        Ioffe & Szegedy 2015, Algorithm 2 line 11: inference is an affine map, which the weights before it take up.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.BatchNorm2d(8))
        >>> x = torch.randn(16, 3, 8, 8)
        >>> _ = model(x)  # a step of training: statistics that were never updated are not folded
        >>> folded, changes = fold(model.eval(), x)
        >>> for change in changes:
        ...     print(change.name, change.what, change.reason, sep=" | ")
        1 | folded into 0 |
        3 | left alone | ReLU '2' precedes; its output is that of the model or block
        >>> torch.allclose(folded(x), model(x), atol=1e-5)
        True
    """
    check(model, "fold")
    if any(is_lazy(tensor) for tensor in (*model.parameters(), *model.buffers())):
        raise ValueError("the model has uninitialized parameters: run it once first")
    layers = normalizing_layers(model)
    with torch.inference_mode(False), torch.no_grad():
        bare = None if example is None else bare_copy(model)
        seen = None if bare is None else observe(bare, example)
        why = why_not_foldable(model, layers)
        plan = Plan({name: layer for name, layer in layers.items() if name not in why}, Search(model, layers, seen))
        plan.make()
        errors = errors_on_random_input(plan) if bare is None else errors_on_example(plan, bare, example)
        if bare is not None and plan.groups:
            check_whole(model, bare, lambda copy: install(copy, plan), example)
        del bare
        folded = copied(model)
        install(folded, plan)
    return folded, Folds(describe(name, plan, why, errors) for name in layers)


def install(model: nn.Module, plan: Plan) -> None:
    """Replace weights and layers in a copy of the planned model, in the dtype of its parameters."""
    layers = {name: model.get_submodule(name) for name in plan.matches}
    for group in plan.all_groups():
        owner = model.get_submodule(group.owner)
        weight = owner.get_parameter(group.weight_name)
        owner._parameters[group.weight_name] = nn.Parameter(group.folded_weight.to(weight.dtype), weight.requires_grad)
        if group.folded_bias is not None:
            bias = owner._parameters[group.bias_name]
            like = weight if bias is None else bias
            owner._parameters[group.bias_name] = nn.Parameter(group.folded_bias.to(like.dtype), like.requires_grad)
    for name, layer in layers.items():
        become(layer, remainder_of(plan.layers[name], plan.matches[name]))
    for block in model.modules():
        forward = block.__dict__.get("forward")
        if isinstance(forward, FusedForward) and not all(is_ours(layer) for layer in forward.layers):
            remove(block)


def describe(name: str, plan: Plan, why: dict[str, str], errors: dict[int, float]) -> Fold:
    if name not in plan.groups:
        return Fold(name, "left alone", why.get(name) or plan.reasons[name])
    group = plan.groups[name]
    what = f"folded into {group.owner or '(the model)'}"
    return Fold(name, what, group.root.condition, errors.get(id(group)), *ranges(group))


def ranges(group: Group) -> tuple[float | None, float | None]:
    linear = group.linears[0]
    return growth_and_spread(group.weight, group.folded_weight, transposed=linear.transposed, groups=linear.groups)
