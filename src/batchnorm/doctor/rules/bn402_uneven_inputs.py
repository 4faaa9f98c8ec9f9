"""# BN402: uneven-inputs

## What it finds
A model with SyncBatchNorm, and loaders whose numbers of batches differ between processes.

## Why it is bad
SyncBatchNorm exchanges statistics in every training forward. A process with one batch more waits for the others, which
have ended their epoch: training hangs, without a message, until a timeout.

## How it arises
Data sharded by files, streams of different length, `drop_last=False` without a `DistributedSampler` that pads.
`torch.distributed.algorithms.Join` shadows the messages of DistributedDataParallel, not those of SyncBatchNorm.

## Evidence
`len(loader)` of all processes, where all have one. All processes must run this rule.

## Remedy
The same number of batches everywhere: `DistributedSampler`, or `drop_last=True` and a common limit.

## False positives
A loader that is used in evaluation mode only: evaluation exchanges nothing.

## References
pytorch/pytorch#38174.
"""

from collections.abc import Iterator, Sized

from batchnorm.doctor.finding import Finding, Severity
from batchnorm.doctor.rule import Needs, Rule, Subject


def check(subject: Subject) -> Iterator[Finding]:
    """One finding for the model, the same on all processes."""
    import torch
    from torch.nn import SyncBatchNorm

    from batchnorm.doctor.live_data import device_of, norms
    from batchnorm.statistics.ranks import gather

    assert subject.model is not None
    synchronized = sum(isinstance(layer, SyncBatchNorm) for layer in norms(subject.model).values())
    own = length(subject.loader)
    lengths = gather(torch.tensor([own], device=device_of(subject.model)))[:, 0].tolist()
    if not synchronized or -1 in lengths or len({*lengths}) == 1:
        return
    yield Finding(
        RULE.code,
        RULE.name,
        Severity.WARNING,
        "",
        f"The loaders have {', '.join(map(str, lengths))} batches on processes 0 to {len(lengths) - 1}, and "
        f"{synchronized} layers are SyncBatchNorm: in training those with more batches wait for the others for ever.",
        measured={"batches": lengths, "synchronized_layers": synchronized},
        threshold={"batches": [min(lengths)] * len(lengths)},
        remedy="Give all processes as many batches: DistributedSampler, or drop_last=True and a common limit.",
        safe=None,
    )


def length(loader: object) -> int:
    """-1 for a loader that does not know, such as a stream."""
    try:
        return len(loader) if isinstance(loader, Sized) else -1
    except TypeError:
        return -1


RULE = Rule(
    "BN402",
    "uneven-inputs",
    Severity.WARNING,
    frozenset({Needs.MODEL, Needs.DATA, Needs.RANKS}),
    "SyncBatchNorm with different numbers of batches hangs",
    check,
    preview=True,
)
