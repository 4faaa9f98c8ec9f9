"""# BN203: momentum-none-compiled

## What it finds
A layer of `torch.nn` with `momentum=None`, the cumulative average.

## Why it is bad
Its training forward computes the weight of the batch as `1.0 / float(num_batches_tracked)`: it reads a tensor. Under
`torch.compile(fullgraph=True)` that is an error, and without `fullgraph` it breaks the graph at every layer. In eager
mode it waits for the device in every forward on a GPU.

## How it arises
`momentum=None` is the way to have the average over all batches, as `torch.optim.swa_utils.update_bn` sets it.

## Evidence
No threshold. In torch 2.13 `torch.compile(layer, fullgraph=True)` raises for it; a test of this rule does that. A
warning where a module of the model is compiled, otherwise info.

## Remedy
`batchnorm.convert(model)`: our layer has the same cumulative average, with a weight that stays a tensor. That is safe.

## False positives
Models that are never compiled: then it is worth knowing only.

## References
pytorch/pytorch#194504.
"""

from collections.abc import Iterator

from batchnorm.doctor.finding import Finding, Severity
from batchnorm.doctor.rule import Needs, Rule, Subject


def check(subject: Subject) -> Iterator[Finding]:
    """One finding for each layer."""
    from torch.nn.modules.batchnorm import _BatchNorm

    from batchnorm.doctor.live_data import follows_its_mode, norms
    from batchnorm.nn.batchnorm import FusedBatchNorm

    assert subject.model is not None
    compiled = any(is_compiled(module) for module in subject.model.modules())
    for name, layer in norms(subject.model).items():
        theirs = isinstance(layer, _BatchNorm) and not isinstance(layer, FusedBatchNorm)
        if theirs and layer.momentum is None and layer.track_running_stats and follows_its_mode(layer):
            yield Finding(
                RULE.code,
                RULE.name,
                Severity.WARNING if compiled else Severity.INFO,
                name,
                "momentum=None reads num_batches_tracked in every training step: torch.compile(fullgraph=True) fails, "
                "and without fullgraph the graph breaks here.",
                measured={"momentum": None, "compiled": compiled},
                remedy="batchnorm.convert(model), before torch.compile: our layer keeps the same average as a tensor.",
                safe=True,
            )


def is_compiled(module: object) -> bool:
    """By name, because importing torch._dynamo takes seconds."""
    return type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None


RULE = Rule(
    "BN203",
    "momentum-none-compiled",
    Severity.WARNING,
    frozenset({Needs.MODEL}),
    "momentum=None cannot be compiled into one graph",
    check,
    preview=True,
)
