"""# BN403: ranks-differ

## What it finds
Running statistics that are not the same on all processes of `torch.distributed`.

## Why it is bad
Each process evaluates another model. Metrics that are computed on shards mix several models, and the checkpoint has
the statistics of the process that wrote it, from its share of the data alone.

## How it arises
`DistributedDataParallel(broadcast_buffers=False)`, a model without DistributedDataParallel, or processes that loaded
different checkpoints. With `broadcast_buffers=True`, its default, process 0 overwrites the others at the next forward
in training; until then they differ by one update, and what was measured on other processes is lost: info.

## Evidence
The statistics of all processes are gathered. The largest difference from process 0 is given in standard deviations
(means) and as a factor (variances); any difference counts. All processes must run this rule. Frozen layers count too.

## Remedy
`batchnorm.statistics.synchronize_running_stats(model)` before evaluation and saving: it gives all processes the
statistics of all data, by the law of total variance. It changes outputs, on every process whose statistics differ from
those of all.

## False positives
Federated and personalized training, where layers are to differ.

## References
Li et al. 2021 (FedBN, arXiv:2102.07623) for statistics that differ on purpose.
"""

import hashlib
from collections.abc import Iterator
from typing import Any

from batchnorm.doctor.finding import Finding, Severity
from batchnorm.doctor.rule import Needs, Rule, Subject
from batchnorm.doctor.rules.values import plain


def check(subject: Subject) -> Iterator[Finding]:
    """One finding for each layer, the same on all processes."""
    import torch
    from torch.nn.parallel import DistributedDataParallel

    from batchnorm.doctor.live_data import device_of
    from batchnorm.statistics.buffers import statistics_of, tracking_layers
    from batchnorm.statistics.ranks import gather

    model = subject.model
    assert model is not None
    layers: dict[str, Any] = tracking_layers(model) if subject.layers else {}
    device = device_of(model)
    buffers = {name: statistics_of(layer) for name, layer in layers.items()}
    shapes = [(name, key, tuple(one.shape)) for name, held in buffers.items() for key, one in held.items()]
    digest = torch.tensor(list(hashlib.sha256(repr(shapes).encode()).digest()), dtype=torch.uint8, device=device)
    seen = gather(digest)
    if others := (seen != seen[0]).any(1).nonzero()[:, 0].tolist():
        yield different_models(others[0])
        return
    if not layers:
        return
    flat = [one.to(device, torch.float64).flatten() for held in buffers.values() for one in held.values()]
    rows = gather(torch.cat(flat)).cpu()
    pieces = iter(rows.split([len(one) for one in flat], dim=1))
    overwritten = isinstance(model, DistributedDataParallel) and model.broadcast_buffers
    for name, held in buffers.items():
        parts = {key: next(pieces) for key in held}
        if any((part != part[0]).logical_and(part == part).any() for part in parts.values()):
            yield different_statistics(name, parts, layers[name].eps, overwritten)


def different_models(process: int) -> Finding:
    return Finding(
        RULE.code,
        RULE.name,
        Severity.WARNING,
        "",
        f"Process {process} has other batch normalization layers than process 0.",
        measured={"process": process},
        remedy="Build and load the same model on all processes.",
    )


def different_statistics(name: str, parts: dict[str, Any], eps: float, overwritten: bool) -> Finding:
    mean = parts["running_mean"]
    # of a whitening layer, whose covariances have no one factor, the mean in units of its own
    var = parts["running_var"] + eps if "running_var" in parts else mean.new_ones(mean.shape)
    off = ((mean - mean[0]).abs() / var[0].clamp(min=0).sqrt()).nan_to_num(float("inf")).max().item()
    factor = (var / var[0]).log().abs().nan_to_num(float("inf")).max().exp().item()
    later = "; process 0 overwrites the others in the next training forward" if overwritten else ""
    return Finding(
        RULE.code,
        RULE.name,
        Severity.INFO if overwritten else Severity.WARNING,
        name,
        f"Its running statistics differ between {len(mean)} processes, the mean by up to {off:.2g} standard deviations "
        f"and the variance by up to a factor of {factor:.3g}: each evaluates another model{later}.",
        measured={"mean_off": plain(off), "var_factor": plain(factor), "processes": len(mean)},
        threshold={"mean_off": 0.0, "var_factor": 1.0},
        remedy="batchnorm.statistics.synchronize_running_stats(model) before evaluation and saving.",
        safe=False,
    )


RULE = Rule(
    "BN403",
    "ranks-differ",
    Severity.WARNING,
    frozenset({Needs.MODEL, Needs.RANKS}),
    "processes have different running statistics",
    check,
    preview=True,
)
