"""Repairs what the rules found, in a copy: of a file's tensors, or of a model."""

import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchnorm.doctor.checkpoint import Checkpoint
from batchnorm.doctor.finding import Finding
from batchnorm.doctor.fixes.file import repair_checkpoint
from batchnorm.doctor.fixes.result import Options, Repair
from batchnorm.doctor.read.open import read

if TYPE_CHECKING:
    from torch import nn


def repair(
    target: "str | Path | Checkpoint | nn.Module | Mapping[str, Any]",
    *,
    model: "nn.Module | None" = None,
    loader: Iterable[Any] | None = None,
    call: "Callable[[nn.Module, Any], Any] | None" = None,
    statistics: Mapping[str, Any] | None = None,
    unsafe: bool = False,
    select: str | Iterable[str] = (),
    ignore: str | Iterable[str] = (),
    wanted: Callable[[Finding], bool] | None = None,
    eps_from: float | None = None,
    eps_to: float | None = None,
    counts: Mapping[str, int] | None = None,
    batches: int | None = None,
) -> Repair:
    """Repair what :func:`batchnorm.examine` finds, in a copy; the target, a model too, stays as it is.

    Safe repairs leave the evaluation output as it is: statistics in half precision become float32 (BN107), counters
    are set (BN105), and in a live model also: a dead bias is taken out (BN201), layers with ``momentum=None`` become
    ours (BN203), half-frozen ones frozen (BN302). With a loader that is shown by running both on its first item.

    Unsafe ones change it, and need ``unsafe=True``: statistics that are missing, initial, impossible or stale (BN100,
    BN101, BN102, BN108) are measured in exactly these layers, from the first to the last, while the others evaluate as
    they are; a momentum in the sense of other frameworks is turned (BN202); ``eps_to`` and ``counts`` convert (BN109).

    Args:
        target: path of a checkpoint, or what was read of it; a state dict, or a model.
        model: for a file or state dict: a model that it fits into.
        loader: of inputs on which statistics are measured; iterated several times.
        call: runs the model on an item, where it takes more than an input.
        statistics: instead of model and loader, for any framework: {layer: (mean, variance)}; only layers whose
            statistics are broken take theirs.
        unsafe: whether to do what changes the evaluation output.
        select: codes or beginnings of codes; only findings of these rules are repaired.
        ignore: codes or beginnings of codes of findings that are not.
        wanted: which of the findings to repair; None for all.
        eps_from: eps of the layers, where the file does not tell; for ``eps_to``.
        eps_to: eps of the layers as they will be built: eps_from - eps_to is added to their running variances, which
            computes the same in evaluation. A layer of which one would become negative stays as it is.
        counts: values per channel and batch by layer: running variances that divide by them become unbiased.
        batches: number of training steps, for layers without a counter if the others do not tell.

    Returns:
        :class:`Repair`; ``save`` writes it.

    Raises:
        DataError: the file cannot be read, or does not fit the model.
        ValueError: what ``examine`` and ``recalibrate`` raise; statistics that do not fit; an eps that is none.
        TypeError: for a live model, what is for a file; a loader without a model.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        >>> lost = {name: value for name, value in model.state_dict().items() if "running" not in name}
        >>> repaired = repair(lost, model=model, loader=[torch.randn(8, 2)], unsafe=True, select="BN100")
        >>> [(outcome.code, outcome.action.value, outcome.what) for outcome in repaired.outcomes]
        [('BN100', 'fixed', 'measured on 8 values per channel')]
        >>> model.load_state_dict(repaired.state_dict())
        <All keys matched successfully>
    """
    for name, eps in (("eps_from", eps_from), ("eps_to", eps_to)):
        if eps is not None and not 0 <= eps < math.inf:
            raise ValueError(f"{name} should be a number of at least 0, got {eps}")
    options = Options(
        loader, call, statistics, unsafe, select, ignore, wanted, eps_from, eps_to, counts or {}, batches
    )  # fmt: skip
    if isinstance(target, str | os.PathLike):
        target = read(Path(target))
    if isinstance(target, Checkpoint):
        return repair_checkpoint(target, model, options)
    from torch import nn

    from batchnorm.doctor.fixes.live import repair_model
    from batchnorm.doctor.live_layers import read_state

    if isinstance(target, nn.Module):
        if model is not None:
            raise TypeError("the target is a model already: model= is for a file or a state dict")
        if statistics is not None or eps_to is not None or counts:
            raise TypeError(
                "statistics=, eps_to= and counts= are for a file or a state dict, and the target is a model"
            )
        return repair_model(target, options)
    if isinstance(target, Mapping):
        return repair_checkpoint(read_state(target), model, options)
    raise TypeError(f"expected a path, a model or a state dict, got {type(target).__name__}")
