"""Blocks inside what torch.fx cannot follow: an example tells how they are called, or they stay."""

import pytest
import torch
from folded import assert_same_evaluation, fold_and_compare, reason, snapshot, with_statistics
from test_fold import Block, X, net
from torch import Tensor, nn

import batchnorm
from batchnorm.errors import FoldError


class Opaque(nn.Module):
    """torch.fx cannot follow it: it branches on a value."""

    def __init__(self, block: nn.Module, call=None) -> None:
        super().__init__()
        self.block = block
        self.call = call or (lambda block, x: block(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.block, x) if x.sum() < torch.inf else x


def test_block_in_what_cannot_be_followed_is_folded_with_an_example():
    model = with_statistics(nn.Sequential(Opaque(Block()), nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2)))
    _, changes = fold_and_compare(model, X, example=False)
    assert [change.what for change in changes] == ["left alone", "left alone", "folded into 1"]
    assert changes[0].reason.startswith("an example is needed, since torch.fx cannot follow 0 (Opaque): its forward")
    _, changes = fold_and_compare(model, X)
    assert [change.what for change in changes] == [
        "folded into 0.block.conv1",
        "folded into 0.block.conv2",
        "folded into 1",
    ]


def test_other_calls_by_what_cannot_be_followed_are_counted():
    model = with_statistics(Opaque(Block(), lambda block, x: block(x) + block.conv1(x)))
    folded, changes = batchnorm.fold(model, X)
    assert changes[0].reason.startswith("it has other calls than those in block, and torch.fx cannot follow the model")
    assert changes[1].what == "folded into block.conv2"
    assert_same_evaluation(model, folded, X)


def test_other_use_of_a_weight_that_nobody_saw_is_an_error():
    model = with_statistics(Opaque(Block(), lambda block, x: block(x) * block.conv1.weight.sum()))
    before = snapshot(model)
    with pytest.raises(FoldError, match=r"would differ from the model in float64 by .*: its forward uses a layer or a"):
        batchnorm.fold(model, X)
    assert snapshot(model) == before


def test_block_that_the_example_does_not_reach_is_left_alone():
    model = with_statistics(Opaque(Block(), lambda block, x: x))
    _, changes = batchnorm.fold(model, X)
    assert {change.what for change in changes} == {"left alone"}
    assert "the example does not call it" in changes[0].reason


class Tied(nn.Module):
    """The encoder uses the weight again, inside an operation of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.encoder = nn.BatchNorm1d(4), nn.TransformerEncoderLayer(4, 1, 4, dropout=0.0)
        self.linear = self.encoder.linear1

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(self.linear(self.norm(x)))


def test_weight_that_an_operation_of_torch_uses_is_not_changed():
    model = with_statistics(Tied())
    expected = "torch.fx cannot follow encoder (TransformerEncoderLayer): it is one operation of torch"
    assert batchnorm.fold(model)[1][0].reason.startswith("an example is needed")
    assert reason(model, torch.randn(5, 4)) == f"it has other calls than those in the model, and {expected}"


def test_block_that_is_called_in_two_ways_is_left_alone():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = with_statistics(Block())

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x) + self.block(x=x) if x.sum() < torch.inf else x

    _, changes = batchnorm.fold(Two().eval(), X)
    assert [change.what for change in changes] == ["folded into block.conv1", "folded into block.conv2"]

    def flagged(self, x, flag=False):
        return self.bn1(self.conv1(x)) if flag else self.conv1(x)

    class Other(Two):
        def forward(self, x: Tensor) -> Tensor:
            return self.block(x) + self.block(x, True) if x.sum() < torch.inf else x

    model = Other()
    model.block = net(flagged)
    assert "it is called in ways that no one graph describes" in reason(model.eval(), X, name="block.bn1")
