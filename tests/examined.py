"""Rules run on live models that must be as before afterwards: tensors, modes, hooks, attributes and random numbers."""

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import batchnorm
import batchnorm.nn
from batchnorm.doctor.examine import examine
from batchnorm.doctor.finding import Finding

# the layers of torch.nn and ours
NORMS = [nn, batchnorm.nn]


def found(code: str, model: nn.Module, loader: Any = None, optimizer: Any = None, **options: Any) -> list[Finding]:
    """The findings of one rule; the model is bit-identical afterwards."""
    before = snapshot(model)
    findings = examine(model, loader, optimizer, select=code, **options).findings
    assert snapshot(model) == before
    assert all(finding.code == code for finding in findings)
    return findings


def snapshot(model: nn.Module) -> list[Any]:
    """Everything that examining must leave as it is."""
    modules = [
        (name, type(m), m.training, sorted(vars(m)), list(m._forward_pre_hooks), list(m._forward_hooks))
        for name, m in model.named_modules()
    ]
    tensors = [
        (name, id(tensor), tensor.requires_grad, tensor.grad is None, bits(tensor))
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
    ]
    flags = [(getattr(m, "track_running_stats", None), getattr(m, "momentum", None)) for m in model.modules()]
    chance = random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()
    return [modules, tensors, flags, chance]


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def layers_of(findings: list[Finding]) -> list[str]:
    return [finding.layer for finding in findings]


def network(norm: Any = nn) -> nn.Sequential:
    """Convolutions and a linear layer, each with a BN layer behind."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False), norm.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 8, 3, bias=False), norm.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 16, bias=False), norm.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4),
    )  # fmt: skip


def batches(count: int = 4, size: int = 32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(size, 3, 9, 9, generator=generator) * 2 + 1 for _ in range(count)]


def trained(norm: Any = nn) -> nn.Sequential:
    """In evaluation mode, with statistics that fit :func:`batches`, as after a long training."""
    model = network(norm).eval()
    batchnorm.recalibrate(model, batches())
    for layer in (model[1], model[4], model[9]):
        layer.num_batches_tracked.fill_(1000)
    return model


def after(steps: int, norm: Any = nn) -> nn.Sequential:
    """In evaluation mode, after so many steps with frozen weights."""
    model, data = network(norm), batches()
    with torch.no_grad():
        for step in range(steps):
            model(data[step % len(data)])
    return model.eval()
