"""A compiled Batch Renorm computed r and d again in its backward pass, from running statistics that had moved."""

import copy

import pytest
import torch

import batchnorm.nn as bnn


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def test_gradients_of_compiled_renorm_are_those_of_eager():
    layer = bnn.BatchRenorm1d(3, momentum=0.5, warmup_steps=0, rmax_steps=1, dmax_steps=1)
    for _ in range(2):
        layer(torch.randn(6, 3) * 2 + 1)
    compiled, x, towards = (
        torch.compile(copy.deepcopy(layer), backend="aot_eager"),
        torch.randn(6, 3),
        torch.randn(6, 3),
    )
    grads = []
    for call in (compiled, layer):
        leaf = x.clone().requires_grad_()
        (call(leaf) * towards).sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[0], grads[1])
