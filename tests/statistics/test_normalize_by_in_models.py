"""A choice of what layers normalize by under compilers, exporters and tracers, and in converted models."""

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import nn

import batchnorm
import batchnorm.nn as bnn
from every_layer import KINDS, output_and_gradients, state

MODES = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
CHOICES = ["batch", "running", 0.25]


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


# whitening looks for inf and NaN in training, so it does not compile to one graph there
COMPILED = [
    *itertools.product(["torch 2d", "ours 2d", "conditional"], CHOICES, [True, False]),
    *itertools.product(["ghost", "renorm"], CHOICES[:2], [True, False]),
    *itertools.product(["whitening"], CHOICES[:2], [False]),
]


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(("name", "by", "training"), COMPILED)
def test_it_compiles_to_one_graph(name: str, by: Any, training: bool):
    kind = KINDS[name]
    layer = kind.trained().train(training)
    batchnorm.normalize_by(layer, by)
    again, x = copy.deepcopy(layer), kind.input()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(output_and_gradients(kind, compiled, x), output_and_gradients(kind, again, x))
    torch.testing.assert_close(state(layer), state(again))


@pytest.mark.parametrize("by", CHOICES)
@pytest.mark.parametrize("name", ["torch 2d", "ours 2d"])
@pytest.mark.parametrize("strict", [True, False])
def test_it_is_exported(name: str, by: Any, strict: bool):
    layer = KINDS[name].trained().eval()
    batchnorm.normalize_by(layer, by)
    x = KINDS[name].input()
    exported = torch.export.export(nn.Sequential(layer), (x,), strict=strict)
    torch.testing.assert_close(exported.module()(x), layer(x))


@pytest.mark.parametrize("make", [nn.BatchNorm1d, bnn.BatchNorm1d], ids=["torch", "ours"])
def test_it_is_one_call_in_a_graph_of_torch_fx(make: Any):
    model = nn.Sequential(make(3)).eval()
    batchnorm.normalize_by(model, "batch")
    graph = torch.fx.symbolic_trace(model)
    assert [node.op for node in graph.graph.nodes] == ["placeholder", "call_module", "output"]
    x = torch.randn(4, 3)
    torch.testing.assert_close(graph(x), model(x))


@pytest.mark.parametrize("by", CHOICES)
@pytest.mark.parametrize("first", ["convert", "normalize_by"])
def test_a_converted_block_runs_unfused_while_it_is_chosen_and_fused_afterwards(by: Any, first: str):
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU())
    plain = copy.deepcopy(model)
    batchnorm.normalize_by(plain, by)
    actions = [lambda: batchnorm.convert(model), lambda: batchnorm.normalize_by(model, by)]
    for action in actions if first == "convert" else reversed(actions):
        action()
    assert type(model[1]) is bnn.BatchNorm1d
    for training in (True, False):
        x = torch.randn(5, 4)
        torch.testing.assert_close(model.train(training)(x), plain.train(training)(x))
        torch.testing.assert_close(state(model), state(plain))
    batchnorm.normalize_by(model, None)
    batchnorm.normalize_by(plain, None)
    torch.testing.assert_close(model.train()(x), plain.train()(x))
    assert vars(model)["forward"].is_unwatched()
    assert type(batchnorm.revert(model)[1]) is nn.BatchNorm1d
