"""Small promises of the layers that nothing else holds."""

import numpy as np
import pytest
import torch
from torch import nn

import batchnorm.nn as bnn
from batchnorm import functional, recalibrate
from batchnorm.errors import ImplementationError


@pytest.mark.parametrize("training", [True, False])
def test_fx_traces_a_layer_as_one_node(training: bool):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), bnn.BatchNorm2d(4, activation="relu")).train(training)
    traced = torch.fx.symbolic_trace(model)
    assert [node.op for node in traced.graph.nodes] == ["placeholder", "call_module", "call_module", "output"]
    x = torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(traced(x), model(x))


def test_fx_traces_a_layer_with_residual():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = bnn.BatchNorm1d(3, activation="relu")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(x, residual=x)

    block = Block().eval()
    x = torch.randn(4, 3)
    torch.testing.assert_close(torch.fx.symbolic_trace(block)(x), block(x))


@pytest.mark.parametrize("missing", ["running_mean", "running_var"])
@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"implementation": "reference"}], ids=str)
def test_one_running_statistic_without_the_other_is_refused(missing: str, options: dict):
    for module in (nn, bnn):
        layer = module.BatchNorm1d(3, **({} if module is nn else options))
        setattr(layer, missing, None)
        with pytest.raises(ValueError, match="running_mean and running_var must either both be None or neither"):
            layer(torch.randn(4, 3))
        assert module is nn or layer.num_batches_tracked == 0


def test_running_var_on_another_device_is_refused_before_running_mean_moves():
    layer = bnn.BatchNorm1d(3)
    layer.running_var = torch.ones(3, device="meta")
    with pytest.raises(RuntimeError, match="running_var is on meta"):
        layer(torch.randn(4, 3))
    assert torch.equal(layer.running_mean, torch.zeros(3))


@pytest.mark.parametrize("implementation", ["aten", "reference"])
def test_running_statistics_that_require_a_gradient_are_refused_untouched(implementation: str):
    running_mean, running_var = torch.zeros(3), torch.ones(3, requires_grad=True)
    with pytest.raises(RuntimeError):
        functional.batch_norm(
            torch.randn(4, 3), running_mean, running_var, training=True, implementation=implementation
        )
    assert torch.equal(running_mean, torch.zeros(3))


@pytest.mark.parametrize(
    "momentum", [torch.tensor([0.1, 0.2, 0.3]), torch.tensor(0.1, requires_grad=True), "0.1", None]
)
def test_a_momentum_that_is_not_a_number_is_refused(momentum: object):
    with pytest.raises(TypeError, match="momentum must be"):
        functional.batch_norm(torch.randn(4, 3), torch.zeros(3), torch.ones(3), training=True, momentum=momentum)


@pytest.mark.parametrize("momentum", [np.float32(0.25), np.int64(1), True])
def test_numpy_numbers_are_a_momentum(momentum: object):
    x = torch.randn(4, 3)
    results = []
    for batch_norm in (functional.batch_norm, torch.nn.functional.batch_norm):
        running = torch.zeros(3), torch.ones(3)
        batch_norm(x, *running, training=True, momentum=momentum)
        results.append(running)
    torch.testing.assert_close(*results)


def test_tiny_eps_gives_finite_gradients_through_an_activation():
    x = torch.full((4, 3), 2.0, requires_grad=True)
    residual = torch.randn(4, 3, requires_grad=True)
    output = functional.batch_norm_train(x, activation="sigmoid", residual=residual, eps=1e-40).output
    output.sum().backward()
    assert residual.grad.isfinite().all()


def test_a_torch_layer_may_become_one_of_ours_by_its_class():
    layer = nn.BatchNorm1d(3)
    layer.__class__ = bnn.BatchNorm1d
    x = torch.randn(4, 3)
    torch.testing.assert_close(layer(x), nn.BatchNorm1d(3)(x))


def test_a_residual_that_is_no_tensor_is_refused():
    with pytest.raises(TypeError, match="residual must be Tensor, not float"):
        bnn.BatchNorm1d(3)(torch.randn(4, 3), 1.0)


def test_the_operator_names_the_implementations_it_knows():
    with pytest.raises(ImplementationError, match=r"no implementation 'other' .* aten, reference"):
        torch.ops.batchnorm.batch_norm_train(torch.randn(4, 3), None, None, None, 1e-5, None, "other")


def test_recalibrate_refuses_inf_and_changes_nothing():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batch = torch.randn(4, 3)
    batch[0, 0] = float("inf")
    with pytest.raises(ValueError, match="layer '0' received inf or NaN"):
        recalibrate(model, [batch])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
