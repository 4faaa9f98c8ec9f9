"""Every layer that has running statistics, torch's and ours: how to make it, and how to call it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import batchnorm.nn as bnn


def plain(layer: Any, x: Tensor) -> Tensor:
    return layer(x)


def under_a_mask(layer: Any, x: Tensor) -> Tensor:
    return layer(x, mask=torch.arange(x.shape[2]) < torch.arange(1, len(x) + 1)[:, None])


def by_class(layer: Any, x: Tensor) -> Tensor:
    return layer(x, torch.arange(len(x)) % 2)


class Kind(NamedTuple):
    """A layer of 3 features for inputs (N, 3, *positions); ``name`` is that of the layer inside that normalizes."""

    make: Callable[..., Any]
    call: Callable[[Any, Tensor], Tensor] = plain
    name: str = ""
    positions: tuple[int, ...] = (4,)

    def norm(self, layer: Any) -> Any:
        return layer.get_submodule(self.name)

    def input(self, count: int = 6) -> Tensor:
        return torch.randn(count, 3, *self.positions) * 2 + 1

    def trained(self, **arguments: Any) -> Any:
        """Of statistics that are neither those of a batch nor those at the start."""
        layer = self.make(3, **arguments)
        for _ in range(2):
            self.call(layer, self.input())
        for parameter in layer.parameters():
            nn.init.uniform_(parameter, 0.5, 1.5)
        return layer


def ghost(num_features: int, **arguments: Any) -> Any:
    return bnn.GhostBatchNorm1d(num_features, ghost_batch_size=2, **arguments)


def renorm(num_features: int, **arguments: Any) -> Any:
    return bnn.BatchRenorm1d(num_features, warmup_steps=0, rmax_steps=1, dmax_steps=1, **arguments)


def per_activation(num_features: int, **arguments: Any) -> Any:
    return bnn.PerActivationBatchNorm((num_features, 4), **arguments)


def domain(num_features: int, **arguments: Any) -> Any:
    return bnn.DomainBatchNorm1d(num_features, 2, **arguments)


def conditional(num_features: int, **arguments: Any) -> Any:
    return bnn.ConditionalBatchNorm1d(num_features, 2, **arguments)


KINDS = {
    "torch 1d": Kind(nn.BatchNorm1d),
    "torch 2d": Kind(nn.BatchNorm2d, positions=(3, 2)),
    "torch 3d": Kind(nn.BatchNorm3d, positions=(2, 1, 3)),
    "sync": Kind(nn.SyncBatchNorm),
    "ours 1d": Kind(bnn.BatchNorm1d),
    "ours 2d": Kind(bnn.BatchNorm2d, positions=(3, 2)),
    "ours 3d": Kind(bnn.BatchNorm3d, positions=(2, 1, 3)),
    "ghost": Kind(ghost),
    "renorm": Kind(renorm),
    "masked": Kind(bnn.MaskedBatchNorm1d, under_a_mask),
    "conditional": Kind(conditional, by_class, "norm"),
    "domain": Kind(domain, lambda layer, x: layer(x, 1), "domains.1"),
    "per activation": Kind(per_activation, name="norm"),
    "whitening": Kind(bnn.Whitening1d),
}
EVERY = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def output_and_gradients(kind: Kind, layer: Any, x: Tensor) -> list[Tensor | None]:
    """What a step sees: the output, and the gradients of the input and of every parameter."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    output = kind.call(layer, x)
    (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    return [output.detach(), x.grad, *(parameter.grad for parameter in layer.parameters())]
