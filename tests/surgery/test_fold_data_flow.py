"""Neighbours whose value, weight or layer somebody else sees: left alone, and the model stays the same."""

import pytest
import torch
import torch.nn.functional as F
from folded import fold_and_compare, reason
from test_fold import X, net
from torch import nn

import batchnorm.nn


def asks_for_class(self, x):
    x = self.conv1(x)
    return self.bn1(x) if isinstance(self.bn1, nn.BatchNorm2d) else x * 2


def test_forward_that_asks_for_the_class_of_a_layer_is_refused():
    model = net(asks_for_class)
    assert reason(model, X, name="bn1") == "the forward of the model (Net) would do something else"


def reads_epsilon(self, x):
    return self.bn1(self.conv1(x)) * self.bn1.eps


def test_forward_that_reads_an_attribute_of_a_layer_is_refused():
    assert "would do something else" in reason(net(reads_epsilon), X, name="bn1")


FORWARDS = {
    "relu between": (lambda self, x: self.bn1(F.relu(self.conv1(x))), "relu precedes; its output is that of"),
    "written between": (lambda self, x: self.bn1(self.conv1(x).mul_(2)), "mul_ precedes"),
    "written aside": (
        lambda self, x: (lambda y: (y.mul_(2), self.bn1(y))[1])(self.conv1(x)),
        "the output of conv2d 'conv1' is used by 2 operations",
    ),
    "output used twice": (
        lambda self, x: (lambda y: y + self.bn1(y))(self.conv1(x)),
        "the output of conv2d 'conv1' is used by 2 operations",
    ),
    "weight used elsewhere": (
        lambda self, x: self.bn1(self.conv1(x)) * self.conv1.weight.sum(),
        "'conv1.weight' is used without this layer, too",
    ),
    "convolution used elsewhere": (
        lambda self, x: self.bn1(self.conv1(x)) + self.conv1(x),
        "'conv1.weight' is used without this layer, too",
    ),
    "gamma used elsewhere": (
        lambda self, x: self.bn1(self.conv1(x)) * self.bn1.weight.sum(),
        "'bn1.weight' is used outside the layer",
    ),
    "layer used twice": (
        lambda self, x: self.bn1(self.conv1(x)) + self.bn1(self.conv2(x)),
        "its calls meet different weights or options ('conv1', 'conv2')",
    ),
    "layer used with and without": (lambda self, x: self.bn1(F.relu(self.bn1(self.conv1(x)))), "relu precedes"),
    "two inputs": (lambda self, x: self.bn1(torch.cat([self.conv1(x)])), "cat precedes"),
    "input of the model": (
        lambda self, x: F.relu(self.bn1(x)),
        "its input is that of the model or block; relu follows",
    ),
    "before, used twice": (
        lambda self, x: (lambda y: self.conv1(F.pad(y, (0, -1))) + y[..., :-1])(self.bn1(x)),
        "the output of BatchNorm2d 'bn1' is used by 2 operations",
    ),
}


@pytest.mark.parametrize(("forward", "expected"), FORWARDS.values(), ids=FORWARDS)
def test_data_flow_that_is_not_one_to_one_is_refused(forward, expected):
    assert expected in reason(net(forward), X, name="bn1")


@pytest.mark.parametrize("called", ["one", "both"])
def test_weight_of_two_modules_is_refused(called):
    both = called == "both"
    model = net(lambda self, x: self.bn1(self.conv2(x)) + (self.conv1(x) if both else 0))
    model.conv2.weight = model.conv1.weight
    expected = "is used without this layer, too" if both else "weight or bias of 'conv1' are those of another module"
    assert expected in reason(model, X, name="bn1")


def test_reading_the_dtype_of_a_weight_is_no_use_of_it():
    model = net(lambda self, x: self.bn1(self.conv1(x.to(self.conv1.weight.dtype))))
    _, changes = fold_and_compare(model, X)
    assert changes[0].what == "folded into conv1"


def test_input_that_is_written_before_the_convolution_reads_it_is_refused():
    def forward(self, x):
        x = x + 1
        y = self.bn1(x)
        x.mul_(2)
        return self.narrow(y)

    model = net(forward, narrow=nn.Conv2d(3, 2, 1))
    assert reason(model, X, name="bn1") == "mul_ before the linear map may change its input"


def test_output_that_is_its_own_residual_is_refused():
    layer = batchnorm.nn.BatchNorm2d(3)
    model = net(lambda self, x: (lambda y: self.bn1(y, residual=y))(self.conv1(x)), bn1=layer)
    assert reason(model, X, name="bn1").startswith("its input is its residual, too")
