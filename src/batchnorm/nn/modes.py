"""What freezing, and the choice of what a layer normalizes by, put into a layer: methods of this one instance.

The layer stays the object that it is, of the class that it is, whoever wrote that class. All functions here take the
layer as their first argument and are bound to it by ``functools.partial``, which copies and pickles with it.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm._ops.checks import check_input, check_per_channel
from batchnorm._ops.running import snapshot
from batchnorm.reference import batch_mean, batch_norm_inference, batch_var, widen

# attributes of a layer: shown in its representation, kept in the metadata of a state_dict
MODES = ("frozen_statistics", "frozen_affine", "normalizes_by")
METADATA = "batchnorm"
# mean and spread first
BUFFERS = ("running_mean", "running_var", "running_cov", "num_batches_tracked")


def bind(layer: nn.Module) -> None:
    """Give a layer the methods that its modes need, and take away those that they do not need any more."""
    own = layer.__dict__
    needed: dict[str, Callable[..., Any]] = {"extra_repr": extra_repr} if modes_of(layer) else {}
    if "frozen_statistics" in own:
        needed |= {"train": train, "reset_running_stats": reset_running_stats}
    if "normalizes_by" in own:
        needed |= {"forward": forward, "_replicate_for_data_parallel": replicate}
    for name in METHODS:
        if is_mode_method(own.get(name)):
            del own[name]
        if name in needed and name not in own:
            own[name] = partial(needed[name], layer)
    hooks = [key for key, hook in layer._state_dict_hooks.items() if hook is save_modes]
    if needed and not hooks:
        layer.register_state_dict_post_hook(save_modes)
    for key in [] if needed else hooks:
        del layer._state_dict_hooks[key]


def modes_of(layer: nn.Module) -> dict[str, Any]:
    """As plain data: which flags are set, and what was chosen to normalize by."""
    own = vars(layer)
    return {name: own[name] if name == "normalizes_by" else True for name in MODES if name in own}


def is_mode_method(value: object) -> bool:
    """Whether an attribute of a layer is one of the methods that :func:`bind` puts there."""
    return isinstance(value, partial) and value.func in METHODS.values()


def replaced_method(layer: nn.Module, *names: str) -> str | None:
    """The first of these methods that somebody else has replaced on the instance."""
    return next((name for name in names if name in vars(layer) and not is_mode_method(vars(layer)[name])), None)


def save_modes(layer: nn.Module, state_dict: Any, prefix: str, local_metadata: dict[str, Any]) -> None:
    """A hook: the modes travel in the metadata of a state_dict, which every loader ignores that does not know them."""
    modes = modes_of(layer)
    if modes:
        local_metadata[METADATA] = modes


def train(layer: Any, mode: bool = True) -> nn.Module:
    """Of a layer with frozen statistics: it stays in evaluation mode."""
    type(layer).train(layer, mode)
    layer.training_unless_frozen = mode
    layer.training = False
    return layer


def reset_running_stats(layer: nn.Module) -> None:
    """Of a layer with frozen statistics: they stay. ``torch.optim.swa_utils.update_bn`` resets all layers first."""


def extra_repr(layer: nn.Module) -> str:
    modes = (f"{name}={value!r}" for name, value in modes_of(layer).items())
    return ", ".join([type(layer).extra_repr(layer), *modes])


def replicate(layer: nn.Module) -> nn.Module:
    """For torch.nn.DataParallel: a replica's methods are its own."""
    replica: Any = type(layer)._replicate_for_data_parallel(layer)  # pyright: ignore[reportAttributeAccessIssue]
    bind(replica)
    return replica


def forward(layer: Any, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Of a layer that normalizes by what was chosen; its running statistics move as its mode says.

    Where that is not what its class does in this mode, the forward of the class runs on a view of the layer: as it
    would be in evaluation, with its running statistics or without any. Then it runs again where it has to move them.
    """
    by, own_forward = layer.normalizes_by, type(layer).forward
    if by == ("batch" if layer.training else "running") or not isinstance(input, Tensor):
        return own_forward(layer, input, *args, **kwargs)
    present = [name for name in BUFFERS if layer._buffers.get(name) is not None]
    if by == "batch":
        return through_view(layer, dict.fromkeys(present), input, *args, **kwargs)
    # copies, because the running statistics may move before the backward pass needs them
    mean, spread = snapshot(*(layer._buffers[name] for name in present[:2]))
    if by == "running":
        output = through_view(layer, {present[0]: mean, present[1]: spread}, input, *args, **kwargs)
    else:
        output = mixed(layer, by, mean, spread, input, *args, **kwargs)
    if layer.training and layer.track_running_stats:
        with torch.no_grad():
            own_forward(layer, input, *args, **kwargs)
    return output


def through_view(layer: Any, buffers: Mapping[str, Tensor | None], *args: Any, **kwargs: Any) -> Tensor:
    """The forward of the layer's class in evaluation with other buffers; other threads see nothing of it."""
    view: Any = object.__new__(type(layer))
    view.__dict__ = vars(layer) | {"training": False, "_buffers": layer._buffers | buffers}
    output = type(layer).forward(view, *args, **kwargs)
    if "last_choice" in vars(view) and not torch.compiler.is_compiling():
        layer.__dict__["last_choice"] = view.last_choice
    return output


def mixed(
    layer: Any, share: float, running_mean: Tensor, running_var: Tensor, input: Tensor, residual: Tensor | None = None
) -> Tensor:
    """Normalize by ``share`` of the statistics of the batch and the rest of the running ones, differentiably."""
    layer._check_input_dim(input)
    activation = getattr(layer, "activation", None)
    weight, bias = layer.weight, layer.bias
    check_input(input, residual, activation)
    check_per_channel(input, running_mean=running_mean, running_var=running_var, weight=weight, bias=bias)
    wide = widen(input)
    batch = batch_mean(wide)
    mean = share * batch + (1 - share) * running_mean
    var = share * batch_var(wide, batch) + (1 - share) * running_var
    return batch_norm_inference(input, mean, var, weight, bias, residual=residual, activation=activation, eps=layer.eps)


METHODS = {
    "train": train,
    "reset_running_stats": reset_running_stats,
    "extra_repr": extra_repr,
    "forward": forward,
    "_replicate_for_data_parallel": replicate,
}
