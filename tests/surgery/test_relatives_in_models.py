"""convert on models with BN's relatives: they stay what they are, and absorb only what they can do."""

import copy

import pytest
import torch
from equivalence import assert_same_model
from torch import Tensor, nn

import batchnorm
import batchnorm.nn as bnn


def ghost() -> nn.Module:
    return bnn.GhostBatchNorm2d(4, ghost_batch_size=2)


def renorm() -> nn.Module:
    return bnn.BatchRenorm2d(4, warmup_steps=0, rmax_steps=0, dmax_steps=0)


def per_activation() -> nn.Module:
    return bnn.PerActivationBatchNorm((4, 3, 3))


def conditional() -> nn.Module:
    return bnn.ConditionalBatchNorm2d(4, num_classes=2)


def domain() -> nn.Module:
    return bnn.DomainBatchNorm2d(4, num_domains=2)


class Block(nn.Module):
    """conv, norm, + input, relu; the norm may take a second argument."""

    def __init__(self, norm: nn.Module, *args: object, conv: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1) if conv else nn.Identity()
        self.norm = norm
        self.act = nn.ReLU()
        self.args = args

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x), *self.args) + x)


class Labelled(Block):
    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x), labels))


class Padded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.act = bnn.MaskedBatchNorm1d(4), nn.ReLU()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.act(self.norm(x, mask=mask))


IMAGES = torch.randn(5, 4, 3, 3)


@pytest.mark.parametrize("make", [ghost, renorm])
def test_ghost_and_renorm_absorb_addition_and_activation(make):
    original = nn.Sequential(Block(make()), make(), nn.Sigmoid())
    converted, changes = batchnorm.convert(copy.deepcopy(original))
    assert [(c.name, c.what) for c in changes] == [("0.norm", "absorbed add + relu"), ("1", "absorbed sigmoid")]
    assert [type(m) for m in converted.modules()] == [type(m) for m in original.modules()]
    assert_same_model(original, converted, IMAGES)


@pytest.mark.parametrize(
    ("make", "args", "names"),
    [(per_activation, (), ["norm.norm"]), (domain, (1,), ["norm.domains.0", "norm.domains.1"])],
    ids=["per_activation", "domain"],
)
def test_layers_that_hold_another_stay_as_they_are(make, args, names):
    original = Block(make(), *args)
    converted, changes = batchnorm.convert(copy.deepcopy(original))
    assert [(c.name, c.what) for c in changes] == [(name, "left alone") for name in names]
    assert all(c.reason.startswith("already converted") for c in changes)
    assert [type(m) for m in converted.modules()] == [type(m) for m in original.modules()]
    assert_same_model(original, converted, IMAGES)


def test_conditional_layers_stay_as_they_are():
    original = Labelled(conditional())
    converted, changes = batchnorm.convert(copy.deepcopy(original))
    assert [(c.name, c.what) for c in changes] == [("norm.norm", "left alone")]
    labels = torch.tensor([0, 1, 1, 0, 1])
    outputs = [model(IMAGES, labels) for model in (original, converted)]
    assert torch.equal(*outputs)


@pytest.mark.parametrize(
    "example", [None, (torch.randn(3, 4, 5), torch.ones(3, 5, dtype=torch.bool))], ids=["", "mask"]
)
def test_a_masked_layer_keeps_its_mask(example):
    original = Padded()
    converted, changes = batchnorm.convert(copy.deepcopy(original), example)
    assert [(c.what, c.reason) for c in changes] == [
        ("left alone", "already converted: it is called with more than an input")
    ]
    x, mask = torch.randn(3, 4, 5), torch.arange(5) < torch.tensor([5, 2, 0])[:, None]
    for arguments in ((x,), (x, mask)):
        assert torch.equal(converted(*arguments), original(*arguments))
    torch.testing.assert_close(dict(converted.state_dict()), dict(original.state_dict()))


def test_torch_layers_beside_a_relative_are_converted():
    model = nn.Sequential(nn.Sequential(ghost(), nn.BatchNorm2d(4), nn.ReLU()), domain())
    _, changes = batchnorm.convert(model)
    assert [(c.name, c.what) for c in changes] == [
        ("0.0", "left alone"),
        ("0.1", "absorbed relu"),
        ("1.domains.0", "left alone"),
        ("1.domains.1", "left alone"),
    ]
    assert type(batchnorm.revert(model)[0][1]) is nn.BatchNorm2d
    assert type(model[0][0]) is bnn.GhostBatchNorm2d
