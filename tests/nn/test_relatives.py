"""What every relative of batch normalization promises: its edges are batch normalization's."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import batchnorm.nn as bnn


class Kind(NamedTuple):
    """How to make a layer for inputs (N, C, 4), how to call it, and the BN inside that keeps the statistics."""

    make: Callable[..., Any]
    call: Callable[[Any, Tensor], Tensor]
    norm: Callable[[Any], Any] = lambda layer: layer


def plain(layer: Any, x: Tensor) -> Tensor:
    return layer(x)


def of_class_0(layer: Any, x: Tensor) -> Tensor:
    return layer(x, torch.zeros(len(x), dtype=torch.int64))


def all_valid(layer: Any, x: Tensor) -> Tensor:
    return layer(x, mask=torch.ones(len(x), x.shape[2], dtype=torch.bool))


def ghost(num_features: int, **arguments: Any) -> bnn.GhostBatchNorm1d:
    return bnn.GhostBatchNorm1d(num_features, ghost_batch_size=2, **arguments)


def per_activation(num_features: int, **arguments: Any) -> bnn.PerActivationBatchNorm:
    return bnn.PerActivationBatchNorm((num_features, 4), **arguments)


def domain(num_features: int, **arguments: Any) -> bnn.DomainBatchNorm1d:
    return bnn.DomainBatchNorm1d(num_features, 2, **arguments)


def conditional(num_features: int, **arguments: Any) -> bnn.ConditionalBatchNorm1d:
    return bnn.ConditionalBatchNorm1d(num_features, 2, **arguments)


KINDS = {
    "ghost": Kind(ghost, plain),
    "renorm": Kind(bnn.BatchRenorm1d, plain),
    "per_activation": Kind(per_activation, plain, lambda layer: layer.norm),
    "masked": Kind(bnn.MaskedBatchNorm1d, all_valid),
    "domain": Kind(domain, lambda layer, x: layer(x, 1), lambda layer: layer.domains[1]),
    "conditional": Kind(conditional, of_class_0, lambda layer: layer.norm),
}
BY_CHANNEL = [name for name in KINDS if name != "per_activation"]
EVERY = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def state(layer: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in layer.state_dict().items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@EVERY
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.randn(4, 3, 4).double(), "torch.float32, but the input is torch.float64"),
        (torch.randn(4, 2, 4), r"should contain 2 elements not 3|expected input of shape \(N, 3, 4\), got \(4, 2, 4\)"),
        (torch.ones(4, 3, 4).long(), "not implemented for '(Long|torch.int64)'"),
    ],
    ids=["dtype", "channels", "integer"],
)
def test_an_input_that_is_refused_changes_nothing(kind, x, message):
    layer = kind.make(3)
    before = state(layer)
    with pytest.raises((ValueError, RuntimeError), match=message):
        kind.call(layer, x)
    assert_same(state(layer), before)


@EVERY
def test_one_value_per_channel_is_refused_in_training_and_taken_in_evaluation(kind):
    layer = kind.make(3)
    shape = (1, 3, 4) if kind is KINDS["per_activation"] else (1, 3, 1)
    before = state(layer)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training, got"):
        kind.call(layer, torch.randn(shape))
    assert_same(state(layer), before)
    assert kind.call(layer.eval(), torch.randn(shape)).isfinite().all()


@pytest.mark.parametrize(
    ("name", "shape"), [*((name, (0, 3, 4)) for name in KINDS), *((name, (6, 3, 0)) for name in BY_CHANNEL)], ids=str
)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_an_empty_batch_changes_nothing(name, shape, momentum):
    kind = KINDS[name]
    layer = kind.make(3, momentum=momentum)
    before = state(layer)
    x = torch.randn(shape, requires_grad=True)
    output = kind.call(layer, x)
    output.sum().backward()
    assert output.shape == x.grad.shape == shape
    assert_same(state(layer), before)
    assert kind.call(layer.eval(), x).shape == shape


@EVERY
@pytest.mark.parametrize("value", [0.0, 3.0, 1e-40])
def test_a_constant_channel_yields_beta(kind, value):
    layer = kind.make(3)
    for parameter in layer.parameters():
        torch.nn.init.constant_(parameter, 0.5)
    x = torch.full((4, 3, 4), value)
    torch.testing.assert_close(kind.call(layer, x), torch.full_like(x, 0.5))
    assert kind.norm(layer).running_var.isfinite().all()


@EVERY
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_inf_and_nan_stay_in_their_channel(kind, bad):
    layer = kind.make(3)
    x = torch.randn(4, 3, 4)
    x[1, 2] = bad
    output = kind.call(layer, x)
    assert output[:, :2].isfinite().all()
    assert output[1, 2].isnan().all()
    norm = kind.norm(layer)
    assert not norm.running_mean[-1].isfinite()
    assert norm.running_var[-1].isnan()
    assert norm.running_mean[:2].isfinite().all()


@EVERY
def test_half_precision_input_keeps_float32_statistics(kind):
    x = (torch.randn(8, 3, 4) * 2 + 3).bfloat16()
    layer, wide = kind.make(3), kind.make(3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = kind.call(layer, x)
    assert output.dtype == torch.bfloat16
    exact = kind.call(wide, x.float())
    # one rounding of the output; a second where gamma and beta follow apart
    torch.testing.assert_close(output.float(), exact, rtol=2 * torch.finfo(torch.bfloat16).eps, atol=0)
    assert kind.norm(layer).running_mean.dtype == torch.float32
    torch.testing.assert_close(state(layer), state(wide))


@EVERY
def test_a_bfloat16_layer_trains_and_evaluates(kind):
    layer, x = kind.make(3, dtype=torch.bfloat16), torch.randn(8, 3, 4).bfloat16()
    kind.call(layer, x).sum().backward()
    assert kind.call(layer.eval(), x).dtype == torch.bfloat16
    assert kind.norm(layer).running_mean.dtype == torch.bfloat16
    assert kind.norm(layer).running_mean.any()


@EVERY
@pytest.mark.parametrize("momentum", [0.3, None])
def test_running_statistics_are_batch_norms_and_stay_the_same_tensors(kind, momentum):
    layer = kind.make(3, momentum=momentum)
    plain = torch.nn.BatchNorm1d(12 if kind is KINDS["per_activation"] else 3, momentum=momentum)
    norm, buffers = kind.norm(layer), [id(buffer) for buffer in layer.buffers()]
    for _ in range(3):
        x = torch.randn(5, 3, 4) + 2
        kind.call(layer, x)
        plain(x.flatten(1) if kind is KINDS["per_activation"] else x)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(getattr(norm, name), getattr(plain, name))
    assert [id(buffer) for buffer in layer.buffers()] == buffers


@EVERY
def test_without_running_statistics_evaluation_is_batch_normalization(kind):
    layer = kind.make(3, track_running_stats=False).eval()
    assert not [name for name, _ in layer.named_buffers() if name != "schedule_step"]
    x = torch.randn(6, 3, 4) + 4
    expected = torch.nn.BatchNorm1d(12)(x.flatten(1)).view_as(x)
    if kind is not KINDS["per_activation"]:
        expected = torch.nn.BatchNorm1d(3)(x)
    torch.testing.assert_close(kind.call(layer, x), expected)


@EVERY
def test_a_frozen_layer_passes_a_gradient_to_its_input_alone(kind):
    layer = kind.make(3).eval().requires_grad_(False)
    before = state(layer)
    x = torch.randn(4, 3, 4, requires_grad=True)
    kind.call(layer, x).sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, (1 + 1e-5) ** -0.5))
    assert_same(state(layer), before)


@EVERY
def test_only_one_running_statistic_is_refused_untouched(kind):
    layer = kind.make(3)
    kind.norm(layer).running_var = None
    with pytest.raises(ValueError, match="running_mean and running_var must either both be None or neither"):
        kind.call(layer, torch.randn(4, 3, 4))
    assert not kind.norm(layer).running_mean.any()
    assert kind.norm(layer).num_batches_tracked == 0


@pytest.mark.parametrize("name", [name for name in KINDS if name != "masked"])
def test_whole_graph_compiles(name):
    kind = KINDS[name]
    layer, again = kind.make(3), kind.make(3)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for training in (True, True, False):
        x = torch.randn(4, 3, 4)
        torch.testing.assert_close(kind.call(compiled.train(training), x), kind.call(again.train(training), x))
    torch.testing.assert_close(state(layer), state(again))
