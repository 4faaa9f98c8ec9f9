"""Which BN layers can be folded as far as they themselves are concerned, and what remains of one that was."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.nn.batchnorm import FusedBatchNorm
from batchnorm.nn.conditional import ConditionalBatchNorm
from batchnorm.nn.domain import DomainBatchNorm
from batchnorm.nn.masked import MaskedBatchNorm1d
from batchnorm.nn.per_activation import PerActivationBatchNorm
from batchnorm.nn.whitening import Whitening
from batchnorm.reference import activate
from batchnorm.surgery.activations import MODULES
from batchnorm.surgery.folding import scale_and_shift
from batchnorm.surgery.fused import has_hooks
from batchnorm.surgery.layers import is_batch_norm

# those whose evaluation is BN by running statistics, if no mask is given
FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward, FusedBatchNorm.forward, MaskedBatchNorm1d.forward)
HOLDERS: dict[type[nn.Module], str] = {
    ConditionalBatchNorm: "gamma and beta depend on the class of each sample",
    DomainBatchNorm: "each call says which domain normalizes",
    PerActivationBatchNorm: "it has statistics of every activation, where a weight has one output channel",
}
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


class Remainder(nn.Module):
    """What remains of a layer whose normalization was folded away: a residual is added, an activation applied."""

    def __init__(self, activation: str | None) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return activate(input, residual, self.activation)

    def extra_repr(self) -> str:
        return f"activation={self.activation}"


def remainder(activation: str | None, *, with_residual: bool) -> nn.Module:
    """A module of torch where there is one."""
    if with_residual:
        return Remainder(activation)
    return next((module() for module, name in MODULES.items() if name == activation), nn.Identity())


def become(layer: nn.Module, other: nn.Module) -> None:
    """Make a layer another one in place, so that whoever holds it, by whatever name, holds the other."""
    other.training = layer.training
    layer.__class__ = type(other)
    layer.__dict__ = other.__dict__


def normalizing_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if is_batch_norm(m) or isinstance(m, Whitening)}


def why_not_foldable(model: nn.Module, layers: dict[str, nn.Module]) -> dict[str, str]:
    """The layers that cannot be folded, whatever stands next to them, and why."""
    held = {id(m): why for holder in model.modules() for why in reasons_of_holder(holder) for m in holder.modules()}
    reasons = {name: held.get(id(layer)) or by_class(layer) or by_state(layer) for name, layer in layers.items()}
    return {name: reason for name, reason in reasons.items() if reason}


def reasons_of_holder(module: nn.Module) -> Iterator[str]:
    return (reason for cls, reason in HOLDERS.items() if isinstance(module, cls))


def by_class(layer: nn.Module) -> str:
    cls = type(layer)
    if isinstance(layer, Whitening):
        return "it mixes channels: as a convolution it is a full 1x1 matrix, which fold does not make"
    if isinstance(layer, torch.jit.ScriptModule):
        return "it is scripted: fold before torch.jit.script"
    if nn.utils.parametrize.is_parametrized(layer):
        return "it is parametrized: torch.nn.utils.parametrize.remove_parametrizations first"
    if cls.forward not in FORWARDS or "forward" in vars(layer):
        return f"its class {cls.__module__}.{cls.__qualname__} has a forward of its own"
    return "its hooks would see another value" if has_hooks(layer) else ""


def by_state(layer: Any) -> str:
    if layer.training:
        return "it is in training mode: call model.eval()"
    mean, var = layer.running_mean, layer.running_var
    if not isinstance(mean, Tensor) or not isinstance(var, Tensor):
        return "it has no running statistics: its evaluation normalizes by the batch"
    tensors = {"running_mean": mean, "running_var": var, "weight": layer.weight, "bias": layer.bias}
    for name, value in tensors.items():
        if isinstance(value, Tensor) and (value.is_meta or value.dtype not in DTYPES):
            return f"its {name} has no values of a floating point type: {value.dtype} on {value.device}"
        if isinstance(value, Tensor) and not value.isfinite().all():
            return f"its {name} is not finite in {count_of(~value.isfinite())}"
    if (var < 0).any():
        return f"its running_var is negative in {count_of(var < 0)}, down to {var.min().item():.3g}"
    steps = layer.num_batches_tracked
    if not (isinstance(steps, Tensor) and steps) and not mean.any() and (var == 1).all():
        return "its statistics were never updated: mean 0 and variance 1 are the initial ones"
    if not all(tensor.isfinite().all() for tensor in scale_and_shift(layer)):
        return f"variance + eps is 0 in {count_of(var + layer.eps <= 0)}"
    return ""


def count_of(where: Tensor) -> str:
    return f"{int(where.sum())} of {where.numel()} channels"


def does_nothing(module: nn.Module) -> bool:
    """Whether a module gives in evaluation what it was given."""
    plain = "forward" not in vars(module) and not has_hooks(module)
    return plain and (type(module) is nn.Identity or (type(module) in DROPOUT and not module.training))
