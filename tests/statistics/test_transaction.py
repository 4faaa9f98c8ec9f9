"""``deferred_stats``: forwards compute the same bits and write nothing; a commit is one update by all their values."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import batchnorm
import batchnorm.nn as bnn
from batchnorm.statistics import deferred_stats, recalibrate
from deferring import DATA, KINDS, Kind, assert_buffers, buffers

kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
momenta = pytest.mark.parametrize("momentum", [0.1, None, 0.0])
homes = pytest.mark.parametrize("home", [nn, bnn], ids=["torch", "ours"])


def results(model: nn.Module, kind: Kind, x: Tensor) -> list[Tensor]:
    """Output, and the gradients of input and parameters."""
    leaf = x.clone().requires_grad_()
    output = kind.call(model, leaf)
    direction = torch.linspace(-1, 1, output.numel()).view_as(output)
    gradients = torch.autograd.grad(output, [leaf, *model.parameters()], direction, allow_unused=True)
    return [output.detach(), *(gradient for gradient in gradients if gradient is not None)]


def pooled_update(before: Tensor, batch: Tensor, momentum: float | None, committed: int) -> Tensor:
    weight = 1 / (committed + 1) if momentum is None else momentum
    return ((1 - weight) * before.double() + weight * batch).float()


@kinds
@momenta
def test_a_forward_has_the_same_bits_as_without_and_writes_nothing(kind: Kind, momentum: float | None):
    model = kind.make(momentum=momentum)
    kind.call(model, DATA[0])
    other, before = copy.deepcopy(model), buffers(model)
    with deferred_stats(model) as tx:
        actual = results(model, kind, DATA[1])
        assert_buffers(model, before)
        tx.rollback()
    assert_buffers(model, before)
    for one, expected in zip(actual, results(other, kind, DATA[1]), strict=True):
        assert torch.equal(one, expected)


@kinds
@momenta
def test_commits_of_one_forward_each_are_the_updates_of_the_layer(kind: Kind, momentum: float | None):
    deferring, updating = kind.make(momentum=momentum), kind.make(momentum=momentum)
    with deferred_stats(deferring) as tx:
        for x in DATA:
            kind.call(deferring, x)
            kind.call(updating, x)
            tx.commit()
    torch.testing.assert_close(dict(deferring.named_buffers()), dict(updating.named_buffers()))


@kinds
@momenta
def test_accumulated_batches_are_committed_as_one_batch(kind: Kind, momentum: float | None):
    model = kind.make(momentum=momentum)
    kind.call(model, DATA[0])
    before = buffers(model)
    with deferred_stats(model):
        for x in DATA[1:]:
            kind.call(model, x)
    values = torch.cat([kind.values(x.double()) for x in DATA[1:]])
    (name, layer), = ((name, m) for name, m in model.named_modules() if name in ("", "norm", "domains.1")
                      and hasattr(m, "running_mean"))  # fmt: skip
    prefix = f"{name}." if name else ""
    mean = pooled_update(before[f"{prefix}running_mean"], values.mean(0), momentum, 1)
    torch.testing.assert_close(layer.running_mean, mean)
    if isinstance(layer, bnn.Whitening1d):
        d, old = layer.group_size or 4, before["running_cov"]
        cov = torch.stack([values[:, i : i + d].T.cov() for i in range(0, 4, d)])
        torch.testing.assert_close(layer.running_cov, pooled_update(old, cov, momentum, 1))
    else:
        var = pooled_update(before[f"{prefix}running_var"], values.var(0), momentum, 1)
        torch.testing.assert_close(layer.running_var, var)
    assert layer.num_batches_tracked == 2


@homes
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_pooling_keeps_its_digits_at_a_large_mean(home: Any, offset: float):
    layer = home.BatchNorm1d(4, momentum=1.0)
    batches = [x + offset for x in DATA]
    with deferred_stats(layer):
        for x in batches:
            layer(x)
    values = torch.cat(batches).double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(layer.running_mean.double(), values.mean(1), rtol=1e-7, atol=1e-6)
    # a batch mean is rounded to float32, which its distance from the others (3 here) makes twice as wrong in a square
    atol = 2 * 3 * offset * 2**-24
    torch.testing.assert_close(layer.running_var.double(), values.var(1), rtol=2e-6, atol=atol)


def test_the_schedule_of_renorm_moves_once_per_commit():
    layer = bnn.BatchRenorm1d(4)
    with deferred_stats(layer) as tx:
        for committed in range(3):
            layer(DATA[0])
            layer(DATA[1])
            assert layer.schedule_step == committed
            tx.commit()
            assert layer.schedule_step == committed + 1
        layer(DATA[0])
        tx.rollback()
        tx.commit()
    assert layer.schedule_step == 3


class Two(nn.Module):
    """A layer that is called twice, one that never is, one that evaluates, and one without statistics."""

    def __init__(self, home: Any) -> None:
        super().__init__()
        self.used, self.unused, self.evaluating = (home.BatchNorm1d(4) for _ in range(3))
        self.untracked = home.BatchNorm1d(4, track_running_stats=False)
        self.evaluating.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.untracked(self.evaluating(self.used(x) + self.used(x * 2)))


@homes
def test_only_layers_that_trained_are_updated(home: Any):
    model = Two(home)
    before = buffers(model)
    with deferred_stats(model) as tx:
        model(DATA[0])
        assert tx.counts == {"used": 36}
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]) == (not name.startswith("used.")), name
    assert model.used.num_batches_tracked == 1


@homes
def test_an_empty_batch_is_not_counted(home: Any):
    layer = home.BatchNorm1d(4)
    before = buffers(layer)
    with deferred_stats(layer) as tx:
        layer(torch.zeros(0, 4))
        assert tx.counts == {}
    assert_buffers(layer, before)


@homes
def test_a_layer_that_was_told_not_to_track_does_not(home: Any):
    layer = home.BatchNorm1d(4)
    layer.track_running_stats = False
    before = buffers(layer)
    with deferred_stats(layer):
        layer(DATA[0])
    assert_buffers(layer, before)


def test_other_layers_than_the_chosen_update_at_every_forward():
    model = nn.ModuleDict({"head": bnn.BatchNorm1d(4), "body": nn.BatchNorm1d(4)})
    with deferred_stats(model, layers="bo*") as tx:
        model["body"](model["head"](DATA[0]))
        assert tx.counts == {"body": 18}
        assert model["head"].num_batches_tracked == 1
        tx.rollback()
    assert model["body"].num_batches_tracked == 0


@homes
def test_an_exception_drops_what_was_collected(home: Any):
    layer = home.BatchNorm1d(4)
    before = buffers(layer)

    def step() -> None:
        with deferred_stats(layer):
            layer(DATA[0])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        step()
    assert_buffers(layer, before)
    layer(DATA[0])
    assert layer.num_batches_tracked == 1


@kinds
def test_a_forward_that_raises_leaves_the_layer_as_it_was(kind: Kind):
    model = kind.make(momentum=None)
    state = {name: (id(buffer), buffer.clone()) for name, buffer in model.named_buffers()}
    with deferred_stats(model) as tx:
        with pytest.raises((ValueError, RuntimeError, IndexError)):
            kind.call(model, torch.randn(1, 4, 1))
        assert tx.counts == {}
    for name, buffer in model.named_buffers():
        assert id(buffer) == state[name][0]
        assert torch.equal(buffer, state[name][1])
    assert all(module.momentum is None for module in model.modules() if hasattr(module, "momentum"))


@kinds
@pytest.mark.parametrize("poison", [float("inf"), float("nan")])
def test_a_poisoned_batch_is_refused_by_the_name_of_its_layer_and_changes_no_layer(kind: Kind, poison: float):
    model = nn.ModuleDict({"clean": kind.make(), "hit": kind.make()})
    before = buffers(model)
    bad = DATA[0].clone()
    bad[0, 1, 0] = poison
    with deferred_stats(model) as tx:
        kind.call(model["clean"], DATA[0])
        kind.call(model["hit"], bad)
        kind.call(model["hit"], DATA[1])
        with pytest.raises(ValueError, match=r"layer 'hit.*' received inf or NaN.*roll back"):
            tx.commit()
        assert_buffers(model, before)
        tx.rollback()
        kind.call(model["hit"], DATA[1])
    assert all(buffer.isfinite().all() for buffer in model.buffers())
    assert not all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_statistics_that_were_poisoned_before_are_refused_too():
    model = nn.Sequential(nn.BatchNorm1d(4))
    model[0].running_var[2] = torch.nan

    def step() -> None:
        with deferred_stats(model):
            model(DATA[0])

    with pytest.raises(ValueError, match=r"layer '0' .*its running statistics hold some already"):
        step()


def test_momentum_0_keeps_statistics_that_a_batch_would_poison():
    layer = bnn.BatchNorm1d(4, momentum=0.0)
    with deferred_stats(layer):
        layer(DATA[0] * torch.inf)
    assert layer.running_mean.tolist() == [0.0] * 4
    assert layer.num_batches_tracked == 1


@homes
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpointed_block_counts_once_and_has_the_same_gradients(home: Any, use_reentrant: bool):
    model = nn.Sequential(nn.Linear(3, 3), home.BatchNorm1d(4), nn.ReLU(), home.BatchNorm1d(4))
    other = copy.deepcopy(model)
    with deferred_stats(model) as tx:
        x = DATA[0].clone().requires_grad_()
        checkpoint(model, x, use_reentrant=use_reentrant).square().sum().backward()
        assert tx.counts == {"1": 18, "3": 18}
    other(DATA[0]).square().sum().backward()
    for one, expected in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one.grad, expected.grad)
    torch.testing.assert_close(dict(model.named_buffers()), dict(other.named_buffers()))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_renorm_is_recomputed_with_the_correction_it_had(use_reentrant: bool):
    layer = bnn.BatchRenorm1d(4, warmup_steps=0, rmax_steps=1, dmax_steps=1, momentum=0.5)
    x, y = (DATA[0].clone().requires_grad_() for _ in range(2))
    with deferred_stats(layer) as tx:
        checkpoint(layer, x, use_reentrant=use_reentrant).square().sum().backward()
        tx.rollback()
        layer(y).square().sum().backward()
    assert torch.equal(x.grad, y.grad)
    assert layer.schedule_step == 1


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
