"""Recalibrated statistics are the population's, and nothing else of a model changes, whatever happens."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import batchnorm.nn
from batchnorm import reference
from batchnorm.statistics import recalibrate

LAYERS: dict[str, tuple[Callable[..., Any], tuple[int, ...]]] = {
    "torch 1d": (nn.BatchNorm1d, ()),
    "torch 1d length": (nn.BatchNorm1d, (5,)),
    "torch 2d": (nn.BatchNorm2d, (3, 2)),
    "torch 3d": (nn.BatchNorm3d, (2, 1, 3)),
    "ours 1d": (batchnorm.nn.BatchNorm1d, ()),
    "ours 2d": (batchnorm.nn.BatchNorm2d, (3, 2)),
    "ours 3d": (batchnorm.nn.BatchNorm3d, (2, 1, 3)),
}
layers = pytest.mark.parametrize(("make", "positions"), LAYERS.values(), ids=LAYERS)
estimators = pytest.mark.parametrize("estimator", ["pooled", "paper"])


def make_batches(sizes: list[int], positions: tuple[int, ...], offset: float = 0.0, channels: int = 4) -> list[Tensor]:
    """Batches whose means differ, as those of sorted data do."""
    return [torch.randn(size, channels, *positions) + offset + i for i, size in enumerate(sizes)]


def moments(batches: list[Tensor]) -> tuple[list[Tensor], list[Tensor], list[int]]:
    wide = [batch.double() for batch in batches]
    means = [reference.batch_mean(batch) for batch in wide]
    variances = [reference.batch_var(batch, mean) for batch, mean in zip(wide, means, strict=True)]
    return means, variances, [reference.values_per_channel(batch) for batch in batches]


@layers
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_pooled_statistics_are_those_of_all_data_at_once(make: Any, positions: tuple[int, ...], offset: float):
    batches = make_batches([7, 1 if positions else 2, 30, 12], positions, offset)
    layer = make(4)
    recalibrate(layer, batches)
    values = np.concatenate([np.moveaxis(batch.double().numpy(), 1, 0).reshape(4, -1) for batch in batches], axis=1)
    np.testing.assert_allclose(layer.running_mean.numpy(), values.mean(1), rtol=1e-6)
    np.testing.assert_allclose(layer.running_var.numpy(), values.var(1, ddof=1), rtol=1e-6)
    mean, var = reference.pooled_statistics(*moments(batches))
    torch.testing.assert_close(layer.running_mean, mean.float())
    torch.testing.assert_close(layer.running_var, var.float())


@layers
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_paper_statistics_are_algorithm_2(make: Any, positions: tuple[int, ...], offset: float):
    batches = make_batches([8, 8, 8], positions, offset)
    layer = make(4)
    recalibrate(layer, batches, estimator="paper")
    means, variances, counts = moments(batches)
    torch.testing.assert_close(layer.running_mean, reference.population_mean(means).float())
    torch.testing.assert_close(layer.running_var, reference.population_var(variances, counts[0]).float())


def test_paper_statistics_count_every_batch_alike():
    batches = make_batches([2, 30], ())
    layer = nn.BatchNorm1d(4)
    recalibrate(layer, batches, estimator="paper")
    torch.testing.assert_close(layer.running_mean, (batches[0].mean(0) + batches[1].mean(0)) / 2)
    torch.testing.assert_close(layer.running_var, (batches[0].var(0) + batches[1].var(0)) / 2)


@estimators
def test_pooled_and_paper_agree_on_one_batch(estimator: str):
    (batch,) = make_batches([9], ())
    layer = nn.BatchNorm1d(4)
    recalibrate(layer, [batch], estimator=estimator)
    torch.testing.assert_close(layer.running_mean, batch.mean(0))
    torch.testing.assert_close(layer.running_var, batch.var(0))


class Nested(nn.Module):
    """BN deep inside, dropout before it, a layer used twice, and a branch that is not taken."""

    def __init__(self, make: Any = nn.BatchNorm1d) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 4), make(4))
        self.inner = nn.ModuleDict({"block": nn.Sequential(nn.Dropout(0.5), make(4))})
        self.shared = make(4)
        self.unused = make(4)
        self.untracked = make(4, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared(self.inner["block"](self.first(x)))
        return self.untracked(self.shared(x + 1))


makes = pytest.mark.parametrize("make", [nn.BatchNorm1d, batchnorm.nn.BatchNorm1d], ids=["torch", "ours"])


@makes
def test_every_layer_of_a_nested_model_is_measured_without_dropout(make: Any):
    model = Nested(make).double()
    batches = [batch.double() for batch in make_batches([6, 9], ())]
    done = recalibrate(model, batches)
    inputs = {"first.1": [], "inner.block.1": [], "shared": []}
    for batch in batches:
        hidden = model.first[0](batch).detach()
        first = reference.batch_norm_train(hidden, model.first[1].weight, model.first[1].bias).output.detach()
        second = reference.batch_norm_train(first).output
        third = reference.batch_norm_train(second).output
        inputs["first.1"].append(hidden)
        inputs["inner.block.1"].append(first)
        inputs["shared"] += [second, third + 1]
    for name, seen in inputs.items():
        layer = model.get_submodule(name)
        everything = torch.cat(seen)
        torch.testing.assert_close(layer.running_mean, everything.mean(0))
        torch.testing.assert_close(layer.running_var, everything.var(0))
    assert done.counts == {"first.1": 15, "inner.block.1": 15, "shared": 30}


def test_a_layer_that_is_never_reached_is_reported_and_left_alone():
    model = Nested()
    model.unused.running_mean.fill_(3.0)
    model.unused.num_batches_tracked.fill_(9)
    assert recalibrate(model, make_batches([5], ())).not_reached == ["unused"]
    assert model.unused.running_mean.tolist() == [3.0] * 4
    assert model.unused.running_var.tolist() == [1.0] * 4
    assert model.unused.num_batches_tracked == 9


def test_the_counter_states_the_batches_that_were_measured():
    layer = nn.BatchNorm1d(4)
    recalibrate(layer, make_batches([5, 6, 7], ()))
    assert layer.num_batches_tracked == 3


def test_evaluation_after_recalibration_normalizes_the_population():
    x = torch.randn(500, 4) * 3 + 7
    layer = nn.BatchNorm1d(4).eval()
    recalibrate(layer, x.split(50))
    torch.testing.assert_close(layer(x).mean(0), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(layer(x).var(0), torch.ones(4), atol=1e-4, rtol=0)


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x, torch.zeros(len(x))), lambda x: [x, None]])
def test_loaders_may_yield_inputs_or_tuples(wrap: Callable[[Tensor], Any]):
    batches = make_batches([5, 6], ())
    layer = nn.BatchNorm1d(4)
    recalibrate(layer, [wrap(batch) for batch in batches])
    torch.testing.assert_close(layer.running_mean, torch.cat(batches).mean(0))


@makes
@estimators
def test_an_empty_batch_counts_nothing(make: Any, estimator: str):
    batches = make_batches([5, 6], ())
    with_empty, without = make(4), make(4)
    recalibrate(with_empty, [batches[0], torch.zeros(0, 4), batches[1]], estimator=estimator)
    recalibrate(without, batches, estimator=estimator)
    for name, value in without.state_dict().items():
        assert value.equal(with_empty.state_dict()[name]), name


def test_only_empty_batches_reach_no_layer():
    layer = nn.BatchNorm1d(4)
    done = recalibrate(layer, [torch.zeros(0, 4)])
    assert (done.counts, done.not_reached) == ({}, [""])
    assert layer.running_mean.tolist() == [0.0] * 4


def test_input_by_name_is_measured_too():
    class ByName(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(input=x)

    model, (batch,) = ByName(), make_batches([5], ())
    recalibrate(model, [batch])
    torch.testing.assert_close(model.norm.running_mean, batch.mean(0))


def test_half_precision_statistics_are_rounded_once():
    layer = nn.BatchNorm1d(4).to(torch.bfloat16)
    batches = [batch.to(torch.bfloat16) for batch in make_batches([64, 64], (), offset=100.0)]
    recalibrate(layer, batches)
    everything = torch.cat(batches).double()
    assert layer.running_mean.equal(everything.mean(0).to(torch.bfloat16))
    assert layer.running_var.equal(everything.var(0).to(torch.bfloat16))


def everything_about(model: nn.Module) -> dict[str, Any]:
    """What ``recalibrate`` must leave alone: parameters, modes, flags, momentum, hooks, and which tensors they are."""
    tensors = {name: (id(p), p.tolist()) for name, p in model.named_parameters()}
    tensors |= {name: id(buffer) for name, buffer in model.named_buffers()}
    modules = {
        name: (
            module.training,
            getattr(module, "momentum", None),
            getattr(module, "track_running_stats", None),
            list(module._forward_pre_hooks),
            list(module._forward_pre_hooks_with_kwargs),
            list(module._forward_hooks),
        )
        for name, module in model.named_modules()
    }
    return {"tensors": tensors, "modules": modules}


def buffers(model: nn.Module) -> dict[str, list[float]]:
    return {name: value.tolist() for name, value in model.named_buffers()}


@pytest.fixture(params=[nn.BatchNorm1d, batchnorm.nn.BatchNorm1d], ids=["torch", "ours"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    """In mixed modes, with a frozen layer, other momenta and a hook of the user's."""
    model = Nested(request.param).train()
    model.first[1].eval()
    model.shared.momentum = None
    model.unused.momentum = 0.7
    model.inner["block"][0].eval()
    model.first[1].register_forward_pre_hook(lambda *_: None)
    model(torch.randn(6, 4))
    return model


@estimators
def test_nothing_but_the_statistics_changes(model: nn.Module, estimator: str):
    before = everything_about(model)
    recalibrate(model, make_batches([5, 6], ()), estimator=estimator)
    assert everything_about(model) == before
    assert model.shared.running_mean.any()


def failing_loader() -> Iterator[Tensor]:
    yield torch.randn(5, 4)
    raise ConnectionError("the disk is gone after 1 batch")


class FailingLayer(nn.Module):
    """Raises at its second call."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 2:
            raise FloatingPointError("call 2")
        return x


def test_a_loader_that_raises_leaves_everything_as_it_was(model: nn.Module):
    before = everything_about(model), buffers(model)
    with pytest.raises(ConnectionError, match="gone after 1 batch"):
        recalibrate(model, failing_loader())
    assert (everything_about(model), buffers(model)) == before


def test_a_model_that_raises_leaves_everything_as_it_was(model: nn.Module):
    model.inner["block"].append(FailingLayer())
    before = everything_about(model), buffers(model)
    with pytest.raises(FloatingPointError, match="call 2"):
        recalibrate(model, make_batches([5, 6], ()))
    assert (everything_about(model), buffers(model)) == before


def test_one_value_per_channel_raises_as_in_training_and_changes_nothing(model: nn.Module):
    before = everything_about(model), buffers(model)
    with pytest.raises(ValueError, match=r"[Ee]xpected more than 1 value per channel when training.*\[1, 4\]"):
        recalibrate(model, make_batches([5, 1], ()))
    assert (everything_about(model), buffers(model)) == before


def test_an_empty_loader_is_refused_and_changes_nothing(model: nn.Module):
    before = everything_about(model), buffers(model)
    with pytest.raises(ValueError, match="the loader yielded nothing"):
        recalibrate(model, [])
    assert (everything_about(model), buffers(model)) == before


def test_an_unknown_estimator_is_refused_before_the_loader_is_asked(model: nn.Module):
    with pytest.raises(ValueError, match="unknown estimator 'median': expected one of pooled, paper"):
        recalibrate(model, failing_loader(), estimator="median")


@pytest.mark.parametrize("model", [nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False)], ids=str)
def test_a_model_without_running_statistics_is_refused(model: nn.Module):
    with pytest.raises(ValueError, match="no batch normalization layer"):
        recalibrate(model, make_batches([5], ()))


def test_nothing_is_recorded_for_autograd(model: nn.Module):
    seen = []
    model.shared.register_forward_hook(lambda layer, args, output: seen.append(output.requires_grad))
    recalibrate(model, make_batches([5], ()))
    assert seen == [False, False]
    assert torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in model.parameters())
