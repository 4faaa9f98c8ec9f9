"""``deferred_stats`` beside hooks, copies, fused blocks, compilers and itself: right, or refused with a clear line."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchnorm
import batchnorm.nn as bnn
from batchnorm.statistics import deferred_stats, recalibrate
from deferring import DATA, KINDS, assert_buffers, buffers

homes = pytest.mark.parametrize("home", [nn, bnn], ids=["torch", "ours"])


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(x))


def test_a_fused_block_stays_fused_and_is_collected():
    model, x = nn.Sequential(Block()), torch.randn(4, 3, 5, 5)
    assert batchnorm.convert(model)
    with pytest.MonkeyPatch.context() as patch, deferred_stats(model):
        patch.setattr(Block, "forward", lambda *_: pytest.fail("not fused"))
        model(x)
    torch.testing.assert_close(model[0].norm.running_mean, 0.1 * x.mean((0, 2, 3)))


@homes
def test_hooks_of_the_user_see_the_buffers_of_the_layer(home: Any):
    layer, seen = home.BatchNorm1d(4), []
    layer.register_forward_pre_hook(lambda module, args: seen.append(module.running_mean))
    layer.register_forward_hook(lambda module, args, output: seen.append(module.running_mean))
    with deferred_stats(layer):
        layer.register_forward_hook(lambda module, args, output: seen.append(module.running_mean))
        layer(DATA[0])
    assert all(mean is layer.running_mean for mean in seen)
    assert len(seen) == 3


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
@pytest.mark.parametrize("name", ["torch", "ours", "whitening"])
def test_a_copy_made_inside_is_not_collected(name: str, copied: Any):
    layer = KINDS[name].make()
    with deferred_stats(layer) as tx:
        twin = copied(layer)
        twin(DATA[0])
        assert tx.counts == {}
        assert twin.num_batches_tracked == 1
    twin(DATA[0])
    assert twin.num_batches_tracked == 2
    assert layer.num_batches_tracked == 0


def test_a_model_is_saved_and_loaded_inside_as_outside():
    model = nn.Sequential(nn.BatchNorm1d(4), bnn.BatchNorm1d(4))
    with deferred_stats(model):
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        file.seek(0)
        model.load_state_dict(torch.load(file))
        assert list(model.state_dict()) == list(nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4)).state_dict())


@homes
def test_nested_transactions_are_refused_and_the_outer_one_goes_on(home: Any):
    model = nn.Sequential(home.BatchNorm1d(4))
    message = "layer '0' is being recorded already, by a deferred_stats or recalibrate that has not ended"
    with deferred_stats(model):
        model(DATA[0])
        with pytest.raises(RuntimeError, match=message), deferred_stats(model, layers="0"):
            pass
        with pytest.raises(RuntimeError, match=message):
            recalibrate(model, DATA)
    assert model[0].num_batches_tracked == 1


def test_a_transaction_inside_a_recalibration_is_refused():
    model = nn.Sequential(nn.BatchNorm1d(4))

    def call(model: nn.Module, x: Tensor) -> None:
        with deferred_stats(model):
            model(x)

    with pytest.raises(RuntimeError, match="layer '0' is being recorded already"):
        recalibrate(model, DATA, call=call)


def test_a_transaction_has_ended_with_its_block():
    with deferred_stats(nn.BatchNorm1d(4)) as tx:
        pass
    for late in (tx.commit, tx.rollback):
        with pytest.raises(RuntimeError, match="the block of deferred_stats has ended"):
            late()


@homes
def test_nothing_stays_behind(home: Any):
    layer = home.BatchNorm1d(4)
    before = set(vars(layer))
    with deferred_stats(layer):
        layer(DATA[0])
    assert set(vars(layer)) - before <= {"last_choice"}
    assert not layer._forward_hooks
    assert not layer._forward_pre_hooks


@pytest.mark.parametrize("model", [nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False)], ids=str)
def test_a_model_without_running_statistics_is_refused(model: nn.Module):
    with pytest.raises(ValueError, match="no batch normalization layer"), deferred_stats(model):
        pass


def test_a_pattern_without_a_layer_is_refused():
    model = nn.Sequential(nn.BatchNorm1d(4))
    with pytest.raises(ValueError, match=r"no batch normalization layer matches 'body\.\*'"):
        deferred_stats(model, layers="body.*").__enter__()


def test_a_compiled_model_is_refused():
    model = nn.Sequential(nn.BatchNorm1d(4))
    with pytest.raises(TypeError, match=r"the model is compiled.*before torch\.compile"):
        deferred_stats(torch.compile(model, backend="eager")).__enter__()
    model[0].compile(backend="eager")
    with pytest.raises(TypeError, match="module '0' is compiled"):
        deferred_stats(model).__enter__()


@homes
@pytest.mark.parametrize("first", ["before", "inside"])
def test_a_function_compiled_around_the_model_is_collected(home: Any, first: str):
    """The hooks of a layer are no part of what a compiled graph checks before it runs."""
    layer = home.BatchNorm1d(4)
    step = torch.compile(lambda x: layer(x) * 2, backend="eager")
    calls = 0
    if first == "before":
        step(DATA[0])
        calls = 1
    before = buffers(layer)
    with deferred_stats(layer) as tx:
        step(DATA[1])
        assert tx.counts == {"": 18}
        assert_buffers(layer, before)
    assert layer.num_batches_tracked == calls + 1
    step(DATA[0])
    assert layer.num_batches_tracked == calls + 2
