"""# BN304: average-without-statistics

## What it finds
A moving average of a model, or another copy of it that follows its weights, whose running statistics stayed those of a
new layer.

## Why it is bad
Averaged weights with mean 0 and variance 1 do not normalize: the copy, which is what gets evaluated and released,
is wrong, while the model it follows is fine.

## How it arises
An average over `model.parameters()` alone: buffers are not among them. `torch.optim.swa_utils.AveragedModel` of torch
2.13 copies the buffers of the source at every update, and so does not have this fault by itself; older versions, models
whose copy was made before training and updated by code of one's own, and teachers of momentum contrast do.

## Evidence
Two things can be seen in a model:
- a module of class `AveragedModel` that counted at least one average and has a layer with mean 0 and variance 1 in all
  channels: certain.
- two modules of the same class in one model, with the same names and shapes of parameters, whose parameters differ by
  less than half of their norm (independent ones differ by about 1.4 times), one of which has layers with mean 0
  and variance 1 where the other's moved: likely.

## What cannot be seen
A copy alone, without its source and not in an `AveragedModel`: BN101 finds statistics that never moved in it. A copy
whose statistics are old instead of initial looks like a teacher that is frozen on purpose. And `AveragedModel` with
copied statistics has those of the weights of the source, not of the averaged ones: data tell, see BN108 and BN207.

## Remedy
`batchnorm.recalibrate(average, loader)` measures the statistics of the averaged weights;
`batchnorm.copy_running_stats(model, average)` takes those of the source. Both change outputs.

## False positives
A copy that is made before training, and whose weights are loaded later.

## References
Izmailov et al. 2018 (arXiv:1803.05407), section 3.2, recompute the statistics after averaging.
"""

from collections.abc import Iterator
from typing import Any

from batchnorm.doctor.finding import Finding, Severity
from batchnorm.doctor.rule import Needs, Rule, Subject
from batchnorm.doctor.rules.values import plain

# relative distance of parameters below which one module follows the other
FOLLOWS = 0.5


def check(subject: Subject) -> Iterator[Finding]:
    """One finding for each layer of the copy."""
    from torch.optim.swa_utils import AveragedModel

    from batchnorm.doctor.live_data import norms

    assert subject.model is not None
    modules = dict(subject.model.named_modules())
    for path, module in modules.items():
        if isinstance(module, AveragedModel) and int(module.n_averaged) > 0:
            for name, layer in norms(module).items():
                if is_new(layer):
                    yield finding(joined(path, name), f"an average of {int(module.n_averaged)} updates", "certain", {})
    for source, copy in pairs(subject.model):
        ours, theirs = norms(modules[source]), norms(modules[copy])
        forgotten = [name for name, layer in theirs.items() if is_new(layer) and not is_new(ours[name])]
        distance = relative_distance(modules[source], modules[copy]) if forgotten else FOLLOWS
        for name in forgotten if distance < FOLLOWS else ():
            yield finding(
                joined(copy, name),
                f"a copy of {source!r}, whose weights it follows within {distance:.2g} of their norm,",
                "likely",
                {"distance": plain(distance)},
            )


def pairs(model: Any) -> Iterator[tuple[str, str]]:
    """Both ways round, the outermost modules with BN layers that have the same class, parameters and layers."""
    from batchnorm.doctor.live_data import norms

    groups: dict[Any, list[str]] = {}
    for path, module in model.named_modules():
        layers = norms(module)
        if path and layers and module not in layers.values():
            shapes = tuple((name, tuple(tensor.shape)) for name, tensor in module.named_parameters())
            groups.setdefault((type(module), tuple(layers), shapes), []).append(path)
    inside: list[tuple[str, str]] = []
    for paths in groups.values():
        for source in paths:
            for copy in paths:
                held = any(source.startswith(f"{a}.") and copy.startswith(f"{b}.") for a, b in inside)
                if source != copy and not held:
                    inside.append((source, copy))
                    yield source, copy


def relative_distance(source: Any, copy: Any) -> float:
    """Of all parameters of more than one dimension: those of batch normalization begin at the same values."""
    squares, total = 0.0, 0.0
    for one, other in zip(source.parameters(), copy.parameters(), strict=True):
        if one.dim() > 1 and one is not other:
            a, b = one.detach().double().cpu(), other.detach().double().cpu()
            squares += (a - b).square().sum().item()
            total += a.square().sum().item()
    return (squares / total) ** 0.5 if total else float("inf")


def is_new(layer: Any) -> bool:
    """Mean 0 and variance 1 in all channels."""
    mean, var = layer._buffers.get("running_mean"), layer._buffers.get("running_var")
    return mean is not None and var is not None and not mean.any() and bool((var == 1).all())


def joined(path: str, name: str) -> str:
    return f"{path}.{name}".strip(".")


def finding(layer: str, what: str, confidence: str, measured: dict[str, Any]) -> Finding:
    return Finding(
        RULE.code,
        RULE.name,
        Severity.WARNING,
        layer,
        f"It belongs to {what} and has the running statistics of a new layer, mean 0 and variance 1: the average "
        "followed the parameters and not the buffers, and evaluation does not normalize.",
        measured=measured,
        threshold={"distance": FOLLOWS} if measured else {},
        remedy="Measure them: batchnorm.recalibrate(average, loader); or batchnorm.copy_running_stats(model, average).",
        safe=False,
        confidence=confidence,
    )


RULE = Rule(
    "BN304",
    "average-without-statistics",
    Severity.WARNING,
    frozenset({Needs.MODEL}),
    "a moving average of a model follows its parameters and not its running statistics",
    check,
    preview=True,
)
