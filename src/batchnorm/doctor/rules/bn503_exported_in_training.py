"""# BN503: exported-in-training

## What it finds
A graph (of `torch.export`, or any `torch.fx.GraphModule`) in which batch normalization is that of training: it
normalizes by the batch, or writes running statistics or `num_batches_tracked`.

## Why it is bad
The mode is built into a graph: `eval()` does not change it any more. What is served depends on the batch, and every
request moves the model's state.

## How it arises
`torch.export.export(model, ...)` without `model.eval()` before it; one layer left in training mode (BN301).

## Evidence
No threshold. Operations of batch normalization that have `training=True`, and operations that write in place into a
buffer named `running_mean`, `running_var`, `running_cov` or `num_batches_tracked`.

## Remedy
`model.eval()`, then export again. Outputs change where normalization was by the batch; where only a counter was
written, they do not.

## False positives
Graphs that are exported for training, or prepared for quantization-aware training. Layers without running statistics
normalize by the batch in any mode: see BN204.

## References
The documentation of `torch.export`: training and evaluation mode are those at the time of export.
"""

from collections.abc import Iterator
from typing import Any

from batchnorm.doctor.finding import Finding, Severity
from batchnorm.doctor.rule import Needs, Rule, Subject

BUFFERS = ("running_mean", "running_var", "running_cov", "num_batches_tracked")


def check(subject: Subject) -> Iterator[Finding]:
    """One finding for each layer of a graph."""
    from torch.fx import GraphModule

    assert subject.model is not None
    for path, module in subject.model.named_modules():
        if isinstance(module, GraphModule):
            for layer, (by_batch, written) in seen_in(module.graph).items():
                yield finding(f"{path}.{layer}".strip("."), by_batch, sorted(written))


def seen_in(graph: Any) -> dict[str, tuple[bool, set[str]]]:
    """By layer, whether it normalizes by the batch, and which of its buffers are written."""
    found: dict[str, tuple[bool, set[str]]] = {}
    for node in graph.nodes:
        if node.op not in ("call_function", "call_method"):
            continue
        given = arguments_of(node)
        if "norm" in str(node.target) and (given.get("training") is True or given.get("train") is True):
            owners = [owner for one in node.all_input_nodes if (owner := owner_of(one))]
            layer = owners[-1][0] if owners else node.name
            found[layer] = (True, found.get(layer, (False, set()))[1])
        owner = owner_of(written_by(node, given))
        if owner and owner[1] in BUFFERS:
            found.setdefault(owner[0], (False, set()))[1].add(owner[1])
    return found


def arguments_of(node: Any) -> dict[str, Any]:
    """By name, as far as the operation or the function tells them."""
    schema = getattr(node.target, "_schema", None)
    if schema is not None:
        names = [argument.name for argument in schema.arguments]
    elif getattr(node.target, "__name__", "") == "batch_norm":
        names = ["input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"]
    else:
        names = ["self"]
    return dict(zip(names, node.args, strict=False)) | node.kwargs


def written_by(node: Any, given: dict[str, Any]) -> Any:
    """The value that an operation writes in place, behind other operations that wrote it in place; None if none."""
    schema = getattr(node.target, "_schema", None)
    if schema is not None:
        writes = bool(schema.arguments) and schema.arguments[0].is_write
    else:
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        writes = name.endswith("_") and not name.endswith("__")
    value = next(iter(given.values()), None) if writes else None
    if value is not None and getattr(value, "op", "") in ("call_function", "call_method"):
        return written_by(value, arguments_of(value))
    return value


def owner_of(value: Any) -> tuple[str, str] | None:
    """The layer and the name of a tensor that a graph reads from a module."""
    if getattr(value, "op", "") != "get_attr":
        return None
    layer, _, name = str(value.target).rpartition(".")
    return layer, name


def finding(layer: str, by_batch: bool, written: list[str]) -> Finding:
    parts = ["normalizes by the batch"] * by_batch + [f"writes {', '.join(written)}"] * bool(written)
    return Finding(
        RULE.code,
        RULE.name,
        Severity.WARNING,
        layer,
        f"The graph was made in training mode: each call {' and '.join(parts)}, and eval() does not change that.",
        measured={"training": by_batch, "written": written},
        threshold={"training": False, "written": []},
        remedy="model.eval(), then export again.",
        safe=not by_batch and written == ["num_batches_tracked"],
    )


RULE = Rule(
    "BN503",
    "exported-in-training",
    Severity.WARNING,
    frozenset({Needs.MODEL}),
    "a graph has batch normalization of training built in",
    check,
    preview=True,
)
