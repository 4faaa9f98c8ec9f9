"""Checkpoints loaded whole or not at all, and never without running statistics."""

import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.errors import StatisticsError
from batchnorm.statistics.buffers import fresh, statistics_of, variances
from batchnorm.statistics.layers import LAYERS, has_running_statistics, spread_of
from batchnorm.statistics.precision import widen

FAULTS = {
    "missing": "missing",
    "not-finite": "inf or NaN",
    "negative": "a negative variance or counter",
    "never-updated": "never updated, mean 0 and variance 1",
    "no-counter": "no count of batches, so that with momentum=None the first batch would replace them",
}
NAMED = 4


def load_state_dict(
    model: nn.Module,
    state: Mapping[str, Any],
    *,
    strict: bool = True,
    assign: bool = False,
    allow: str | Iterable[str] = (),
) -> Any:
    """Load a checkpoint as ``model.load_state_dict`` does, unless it has no usable running statistics.

    ``strict=False`` leaves statistics that are not in the checkpoint as they are, 0 and 1 in a new model, and NaN or
    a variance of -1 load without a word. Here they are an error; everything is checked before anything is written.

    - "missing": a layer's mean or variance is not in the state.
    - "not-finite": inf or NaN, also if it becomes so in the dtype of the model.
    - "negative": a variance or the counter.
    - "never-updated": mean 0, variance 1 (covariance the identity) and a counter of 0 or none. The state of a new
      model is such a one.
    - "no-counter": good statistics, but a counter of 0 or none, in a layer with ``momentum=None``.

    A missing counter alone, as in old checkpoints and those of other libraries, is otherwise set to 0, for unknown:
    with ``momentum=None`` the next batch has the weight 1 / (counter + 1), with any other momentum nothing depends on
    it.

    Args:
        model: the model to load into; its BN layers are checked, other modules follow ``strict``.
        state: a state dict.
        strict: as of ``model.load_state_dict``, for all other keys.
        assign: as of ``model.load_state_dict``; layers that come in half precision are widened to float32.
        allow: which of the faults above to accept, one or several.

    Returns:
        What ``model.load_state_dict`` returns: ``missing_keys`` and ``unexpected_keys``.

    Raises:
        StatisticsError: one of the faults, with the names of the layers; or a layer is on the meta device, where
            loading does nothing without ``assign``.
        RuntimeError: as of ``model.load_state_dict``: other keys, other sizes.
        ValueError: ``allow`` names no fault.

        Then parameters and buffers are as before.

    Example:
        >>> trained, model = nn.Sequential(nn.BatchNorm1d(2)), nn.Sequential(nn.BatchNorm1d(2))
        >>> _ = trained(torch.randn(8, 2))
        >>> load_state_dict(model, trained.state_dict())
        <All keys matched successfully>
        >>> load_state_dict(model, dict(trained.named_parameters()), strict=False)
        Traceback (most recent call last):
        batchnorm.errors.StatisticsError: nothing was loaded: no usable running statistics for '0' (missing)...
    """
    allowed = {allow} if isinstance(allow, str) else set(allow)
    if not allowed <= FAULTS.keys():
        raise ValueError(f"allow takes {', '.join(FAULTS)}; got {', '.join(sorted(allowed - FAULTS.keys()))}")
    layers: dict[str, Any] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, LAYERS) and has_running_statistics(module)
    }
    if not assign and any(layer.running_mean.is_meta for layer in layers.values()):
        raise StatisticsError("the model is on the meta device, where loading does nothing: pass assign=True")
    state = with_counters(state, layers)
    with put_back(model):
        load(model, state, strict=False, assign=True)
        loaded = {name: statistics_of(layer) for name, layer in layers.items()}
    faults = {name: faults_of(layer, loaded[name], assign) - allowed for name, layer in layers.items()}
    check_faults({name: found for name, found in faults.items() if found})
    if strict:
        with put_back(model):
            load(model, state, strict=True, assign=True)
    result = load(model, state, strict=strict, assign=assign)
    if assign:
        for layer in layers.values():
            widen(layer)
    return result


def with_counters(state: Mapping[str, Any], layers: Mapping[str, Any]) -> OrderedDict[str, Any]:
    """A copy of the state, in which a missing ``num_batches_tracked`` is 0 where there are statistics."""
    # a Parameter that is assigned would become the model's, with its requires_grad
    copied: Any = OrderedDict(
        (key, value.detach() if isinstance(value, Tensor) else value) for key, value in state.items()
    )
    for name, layer in layers.items():
        prefix = f"{name}." if name else ""
        if f"{prefix}running_mean" in copied and layer.num_batches_tracked is not None:
            copied.setdefault(f"{prefix}num_batches_tracked", torch.zeros((), dtype=torch.int64))
    if hasattr(state, "_metadata"):
        copied._metadata = state._metadata  # pyright: ignore[reportAttributeAccessIssue]
    return copied


def load(model: nn.Module, state: Any, *, strict: bool, assign: bool) -> Any:
    """``model.load_state_dict`` with metadata of its own: torch marks them if it assigns, and then always assigns."""
    copied: Any = OrderedDict(state)
    if hasattr(state, "_metadata"):
        copied._metadata = {
            name: {key: value for key, value in entry.items() if key != "assign_to_params_buffers"}
            for name, entry in state._metadata.items()
        }
    return model.load_state_dict(copied, strict=strict, assign=assign)


@contextmanager
def put_back(model: nn.Module) -> Iterator[None]:
    """Tensors that are assigned inside are seen inside alone: a load that is tried costs no memory."""
    held = [
        (module, tensors, name, tensor)
        for module in model.modules()
        for tensors in (module._parameters, module._buffers)
        for name, tensor in tensors.items()
    ]
    swap = torch.__future__.get_swap_module_params_on_conversion()
    # with it, tensors would change inside
    torch.__future__.set_swap_module_params_on_conversion(False)
    try:
        yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swap)
        for module, tensors, name, tensor in held:
            # as torch assigns, so that recurrent layers see it
            if tensors[name] is not tensor:
                setattr(module, name, tensor)


def faults_of(layer: Any, loaded: dict[str, Tensor], assign: bool) -> set[str]:
    """What is wrong with the statistics that a layer would have."""
    own, spread = layer.running_mean, spread_of(layer)
    key = "running_var" if "running_var" in loaded else "running_cov"
    assert spread is not None
    if loaded["running_mean"] is own or loaded[key] is spread or loaded["running_mean"].is_meta:
        return {"missing"}
    mean, spread = (value if assign else value.to(own.dtype) for value in (loaded["running_mean"], loaded[key]))
    counter = loaded.get("num_batches_tracked")
    count = 0.0 if counter is None else float(counter)
    new = count == 0 and not mean.any() and spread.equal(fresh(spread))
    found = {
        "not-finite": not (mean.isfinite().all() and spread.isfinite().all() and math.isfinite(count)),
        "negative": count < 0 or bool((variances({key: spread}) < 0).any()),
        "never-updated": new,
        "no-counter": count == 0 and counter is not None and layer.momentum is None and not new,
    }
    return {fault for fault, there in found.items() if there}


def check_faults(faults: Mapping[str, Iterable[str]]) -> None:
    """One line for all layers: the first few by name, then their number."""
    if not faults:
        return
    named = [
        f"{name!r} ({', '.join(FAULTS[fault] for fault in FAULTS if fault in found)})"
        for name, found in list(faults.items())[:NAMED]
    ]
    more = f" and {len(faults) - NAMED} more" if len(faults) > NAMED else ""
    accept = ", ".join(repr(fault) for fault in FAULTS if any(fault in found for found in faults.values()))
    raise StatisticsError(
        f"nothing was loaded: no usable running statistics for {', '.join(named)}{more}; take another checkpoint, or "
        f"load with allow=[{accept}] and measure them with batchnorm.recalibrate"
    )
