"""# BN401: few-samples-per-rank

## What it finds
Training on several processes where batch normalization layers see only the few samples of their own process; and
models in which some layers are SyncBatchNorm and others are not.

## Why it is bad
The noise of the mean and variance of a batch grows as batches shrink, whatever the size of all batches together, and
running statistics that are averaged from it are worse. In a mixed model some layers normalize by all samples and
others by those of one process, which is hardly ever meant.

## How it arises
Detection and segmentation with one or two images per GPU; a model that was converted before layers were added, or a
part that `convert_sync_batchnorm` did not see.

## Evidence
Fewer than 16 samples in the first batch of this process's loader: Wu and He measured the error of ResNet-50 on
ImageNet at 23.6, 23.7, 24.8, 27.3 and 34.7 % for 32, 16, 8, 4 and 2 images per GPU. Without a loader only the mixture
is looked at. Frozen layers do not count.

## Remedy
`torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)`, or larger batches per process. That changes training, and where
layers normalize by batches, outputs.

## False positives
Layers with many values per sample, such as the first ones of large images, need fewer samples. Statistics per process
on purpose, as in contrastive learning with shuffled batches, or Ghost Batch Normalization.

## References
Wu and He 2018 (arXiv:1803.08494), figure 1 and the experiment on small batches; Peng et al. 2018 (MegDet,
arXiv:1711.07240).
"""

from collections.abc import Iterator

from batchnorm.doctor.finding import Finding, Severity
from batchnorm.doctor.rule import Needs, Rule, Subject

FEW = 16


def check(subject: Subject) -> Iterator[Finding]:
    """One finding for the model, and one for each layer that does not synchronize among others that do."""
    import torch.distributed as dist
    from torch.nn import SyncBatchNorm

    from batchnorm.doctor.live_data import follows_its_mode, norms, sample_of

    assert subject.model is not None
    layers = {name: layer for name, layer in norms(subject.model).items() if follows_its_mode(layer)}
    alone = [name for name, layer in layers.items() if not isinstance(layer, SyncBatchNorm)]
    if alone and len(alone) < len(layers):
        for name in alone:
            yield mixed(name, len(layers) - len(alone))
    if subject.loader is None or not alone:
        return
    sample = sample_of(subject)
    size = sample.samples / len(sample.items)
    if size < FEW:
        yield Finding(
            RULE.code,
            RULE.name,
            Severity.WARNING,
            "",
            f"{len(alone)} batch normalization layers normalize by the samples of one process, {size:g} of "
            f"{size * dist.get_world_size():g} in a step.",
            measured={"samples": size, "processes": dist.get_world_size(), "layers": len(alone)},
            threshold={"samples": FEW},
            remedy="torch.nn.SyncBatchNorm.convert_sync_batchnorm(model), or larger batches per process.",
            safe=False,
            confidence="likely",
        )


def mixed(name: str, others: int) -> Finding:
    return Finding(
        RULE.code,
        RULE.name,
        Severity.WARNING,
        name,
        f"It normalizes by the samples of its own process, while {others} other layers are SyncBatchNorm.",
        measured={"synchronized_layers": others},
        threshold={"synchronized_layers": 0},
        remedy="torch.nn.SyncBatchNorm.convert_sync_batchnorm(model) for all layers, or for none.",
        safe=False,
    )


RULE = Rule(
    "BN401",
    "few-samples-per-rank",
    Severity.WARNING,
    frozenset({Needs.MODEL, Needs.RANKS}),
    "layers see the few samples of one process, or only some are synchronized",
    check,
    preview=True,
)
