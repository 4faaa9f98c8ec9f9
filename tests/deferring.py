"""Every kind of layer, how a forward calls it, and which of its values are normalized together."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import batchnorm.nn as bnn

SHAPE = (6, 4, 3)
DATA = [torch.randn(SHAPE, generator=torch.Generator().manual_seed(i)) * (i + 1) + i for i in range(4)]
MASK = torch.arange(3) < torch.tensor([3, 1, 2, 3, 0, 2])[:, None]
LABELS = torch.tensor([0, 1, 1, 0, 1, 0])


def by_channel(x: Tensor) -> Tensor:
    return x.transpose(0, 1).flatten(1).T


class Kind(NamedTuple):
    make: Callable[..., nn.Module]
    call: Callable[[Any, Tensor], Tensor] = lambda layer, x: layer(x)
    # (values, features) of an input
    values: Callable[[Tensor], Tensor] = by_channel


KINDS = {
    "torch": Kind(lambda **o: nn.BatchNorm1d(4, **o)),
    "ours": Kind(lambda **o: bnn.BatchNorm1d(4, activation="silu", **o)),
    "ghost": Kind(lambda **o: bnn.GhostBatchNorm1d(4, ghost_batch_size=2, **o)),
    "renorm": Kind(lambda **o: bnn.BatchRenorm1d(4, warmup_steps=0, rmax_steps=2, dmax_steps=2, **o)),
    "masked": Kind(lambda **o: bnn.MaskedBatchNorm1d(4, **o), lambda layer, x: layer(x, mask=MASK),
                   lambda x: x.movedim(1, -1)[MASK]),
    "per activation": Kind(lambda **o: bnn.PerActivationBatchNorm((4, 3), **o), values=lambda x: x.flatten(1)),
    "conditional": Kind(lambda **o: bnn.ConditionalBatchNorm1d(4, 2, **o), lambda layer, x: layer(x, LABELS)),
    "domain": Kind(lambda **o: bnn.DomainBatchNorm1d(4, 2, **o), lambda layer, x: layer(x, 1)),
    "whitening": Kind(lambda **o: bnn.Whitening1d(4, **o)),
    "whitening in groups": Kind(lambda **o: bnn.Whitening1d(4, group_size=2, **o)),
}  # fmt: skip


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def assert_buffers(model: nn.Module, expected: dict[str, Tensor]) -> None:
    """To the bit."""
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, expected[name]), name
