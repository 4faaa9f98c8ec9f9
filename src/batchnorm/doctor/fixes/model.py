"""Repairs of a live model, done to a copy of it."""

from collections.abc import Callable, Iterable, Sequence
from glob import escape
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from batchnorm.doctor.checkpoint import STATISTICS
from batchnorm.doctor.finding import Finding
from batchnorm.doctor.fixes.outcome import Outcome, fixed, left, refused
from batchnorm.doctor.fixes.tensors import usual_counter
from batchnorm.doctor.live_layers import live_layers
from batchnorm.statistics import freeze, keep_float32
from batchnorm.statistics.layers import LAYERS
from batchnorm.statistics.measuring import evaluating
from batchnorm.statistics.recalibrate import call_with_input
from batchnorm.surgery import convert

# of the largest output: rounding of another kernel, or of a mean that took a bias in, through a deep network; or so
# many units in the last place where that is more, in half precision
BOUND, ROUNDINGS = 1e-4, 8


def keep_wide(model: Any, findings: Sequence[Finding], batches: int | None) -> list[Outcome]:
    """BN107."""
    for finding in findings:
        layer = model.get_submodule(finding.layer)
        if isinstance(layer, LAYERS):
            keep_float32(layer)
            continue
        for role in STATISTICS:
            setattr(layer, role, getattr(layer, role).float())
    return [fixed(finding, "float32, and stays so", safe=True) for finding in findings]


def count(model: Any, findings: Sequence[Finding], batches: int | None) -> list[Outcome]:
    """BN105."""
    layers = live_layers(model)
    known = usual_counter(layers) if batches is None else batches
    outcomes = []
    for finding in findings:
        if finding.safe is not True:
            outcomes.append(left(finding))
        elif known is None:
            outcomes.append(refused(finding, "no other layer says how many batches there were; give batches="))
        else:
            for path in [finding.layer] if finding.layer else [layer.path for layer in layers]:
                counter = getattr(model.get_submodule(path), "num_batches_tracked", None)
                if counter is not None:
                    counter.fill_(known)
            outcomes.append(fixed(finding, f"set to {known:,}; evaluation does not use it", safe=True))
    return outcomes


def absorb(model: Any, findings: Sequence[Finding], batches: int | None) -> list[Outcome]:
    """BN201: the bias goes out of the module before the layer, and out of the running mean."""
    outcomes = []
    for finding in findings:
        owner: Any = model.get_submodule(finding.measured["module"])
        layer: Any = model.get_submodule(finding.layer)
        if owner.bias is None or layer.running_mean is None or owner.bias.shape != layer.running_mean.shape:
            outcomes.append(refused(finding, "the bias is gone already, or is not one of each channel"))
            continue
        with torch.no_grad():
            layer.running_mean -= owner.bias.to(layer.running_mean)
        owner.bias = None
        outcomes.append(fixed(finding, "bias taken out, and out of the running mean", safe=True))
    return outcomes


def use_ours(model: Any, findings: Sequence[Finding], batches: int | None) -> list[Outcome]:
    """BN203."""
    convert(model, fuse=False)
    return [fixed(finding, "all layers are batchnorm.nn's now", safe=True) for finding in findings]


def freeze_all(model: Any, findings: Sequence[Finding], batches: int | None) -> list[Outcome]:
    """BN302."""
    freeze(model, [escape(finding.layer) for finding in findings])
    return [fixed(finding, "statistics frozen; unfreeze undoes it", safe=True) for finding in findings]


def turn_momentum(model: Any, findings: Sequence[Finding], batches: int | None) -> list[Outcome]:
    """BN202."""
    outcomes = []
    for finding in findings:
        layer: Any = model.get_submodule(finding.layer)
        if 0 < layer.momentum < 1:
            layer.momentum = round(1 - layer.momentum, 12)
            outcomes.append(fixed(finding, f"momentum is {layer.momentum:g} now", safe=False))
        else:
            outcomes.append(refused(finding, f"1 - {layer.momentum:g} is no weight of a new batch"))
    return outcomes


Fix = Callable[[Any, Sequence[Finding], int | None], list[Outcome]]
# in this order: our layers first, since conversion makes new ones
SAFE: dict[str, Fix] = {
    "BN203": use_ours,
    "BN107": keep_wide,
    "BN105": count,
    "BN201": absorb,
    "BN302": freeze_all,
}
TURNING: dict[str, Fix] = {"BN202": turn_momentum}


class Difference(NamedTuple):
    """Of the outputs of two models.

    Attributes:
        worst: the largest difference; infinite if what is finite in one is not in the other.
        largest: the largest output.
        bound: the largest difference that rounding explains.
    """

    worst: float
    largest: float
    bound: float

    def __str__(self) -> str:
        if self.worst == 0:
            return "by running both on the first item of the data: their outputs are equal"
        return (
            f"by running both on the first item of the data: outputs up to {self.largest:.3g} differ by at most "
            f"{self.worst:.2g}, where {self.bound:.2g} is the bound"
        )


@torch.no_grad()
def difference(
    before: nn.Module, after: nn.Module, loader: Iterable[Any], call: Callable[[nn.Module, Any], Any] | None
) -> Difference:
    """Run two models in evaluation on the first item."""
    call = call or call_with_input
    item = next(iter(loader), None)
    if item is None:
        raise ValueError("the loader yielded nothing")
    outputs = []
    for model in (before, after):
        with evaluating(model):
            outputs.append([leaf for leaf in tree_leaves(call(model, item)) if is_real(leaf)])
    worst = largest = 0.0
    rounding = [torch.finfo(leaf.dtype).eps for leaf in outputs[0] if leaf.is_floating_point()]
    for one, other in zip(*outputs, strict=True):
        usable = one.isfinite()
        if not torch.equal(usable, other.isfinite()):
            return Difference(float("inf"), 0.0, 0.0)
        if usable.any():
            one, other = one[usable].double(), other[usable].double()
            worst, largest = max(worst, float((one - other).abs().max())), max(largest, float(one.abs().max()))
    return Difference(worst, largest, largest * max(BOUND, ROUNDINGS * max(rounding, default=0.0)))


def is_real(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and not leaf.is_complex()
