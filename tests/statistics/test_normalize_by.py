"""What a layer normalizes by is what was chosen, in both modes; what moves is what its mode says."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchnorm
import batchnorm.nn as bnn
from every_layer import EVERY, KINDS, Kind, assert_same, output_and_gradients, state

MODES = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
PLAIN = {name: KINDS[name] for name in ("torch 1d", "torch 2d", "torch 3d", "ours 1d", "ours 2d", "ours 3d")}
PLAIN |= {name: KINDS[name] for name in ("conditional", "domain", "per activation")}
MIXING = pytest.mark.parametrize("kind", PLAIN.values(), ids=PLAIN)


def without_statistics(kind: Kind, layer: Any) -> Any:
    """What torch has for normalizing by the batch in evaluation: the same layer, but without its buffers."""
    other = copy.deepcopy(layer).eval()
    for name in ("running_mean", "running_var", "running_cov", "num_batches_tracked"):
        if name in kind.norm(other)._buffers:
            kind.norm(other)._buffers[name] = None
    return other


def mixed(layer: Any, share: float, x: Tensor, residual: None = None) -> Tensor:
    """The formula, written out, differentiated by autograd."""
    dims = [0, *range(2, x.dim())]
    shape = (1, -1, *[1] * (x.dim() - 2))
    mean = share * x.mean(dims) + (1 - share) * layer.running_mean
    var = share * x.var(dims, correction=0) + (1 - share) * layer.running_var
    z = (x - mean.view(shape)) / (var + layer.eps).sqrt().view(shape)
    return z if layer.weight is None else z * layer.weight.view(shape) + layer.bias.view(shape)


@EVERY
def test_by_batch_in_training_is_torchs_own_rule(kind: Kind):
    layer = kind.trained()
    again = copy.deepcopy(layer)
    assert batchnorm.normalize_by(layer, "batch", f"*{kind.name}") == [kind.name]
    for _ in range(2):
        x = kind.input()
        assert_same(output_and_gradients(kind, layer, x), output_and_gradients(kind, again, x))
        assert_same(state(layer), state(again))


@EVERY
def test_by_batch_in_evaluation_is_a_layer_without_statistics_and_keeps_them(kind: Kind):
    layer = kind.trained()
    bare, before = without_statistics(kind, layer), state(layer)
    batchnorm.normalize_by(layer.eval(), "batch")
    for _ in range(2):
        x = kind.input()
        assert_same(output_and_gradients(kind, layer, x), output_and_gradients(kind, bare, x))
    assert_same(state(layer), before)


@EVERY
def test_by_batch_a_frozen_layer_moves_nothing_in_training(kind: Kind):
    layer = kind.trained()
    bare, before = without_statistics(kind, layer), state(layer)
    batchnorm.freeze(layer)
    batchnorm.normalize_by(layer, "batch")
    x = kind.input()
    assert_same(kind.call(layer.train(), x), kind.call(bare, x))
    assert_same(state(layer), before)


@EVERY
@pytest.mark.parametrize("momentum", [0.3, None])
def test_by_running_in_training_gives_what_evaluation_gives_and_then_the_statistics_move(
    kind: Kind, momentum: float | None
):
    layer = kind.trained(momentum=momentum)
    trained = copy.deepcopy(layer)
    batchnorm.normalize_by(layer, "running")
    for _ in range(3):
        x = kind.input()
        evaluated = output_and_gradients(kind, copy.deepcopy(trained).eval(), x)
        assert_same(output_and_gradients(kind, layer, x), evaluated)
        kind.call(trained, x)
        assert_same(state(layer), state(trained))


@EVERY
@pytest.mark.parametrize("by", ["batch", "running"])
def test_in_evaluation_and_frozen_nothing_moves(kind: Kind, by: str):
    layer = kind.trained()
    batchnorm.normalize_by(layer, by)
    before = state(layer)
    kind.call(layer.eval(), kind.input())
    batchnorm.freeze(layer)
    kind.call(layer.train(), kind.input())
    assert_same(state(layer), before)


@pytest.mark.parametrize("make", [nn.BatchNorm1d, bnn.BatchNorm1d], ids=["torch", "ours"])
def test_two_training_passes_by_running_statistics_before_one_backward_pass(make: Any):
    layer = make(3)
    batchnorm.normalize_by(layer, "running")
    first, second = (torch.randn(4, 3, requires_grad=True) for _ in range(2))
    (layer(first).square().sum() + layer(second).square().sum()).backward()
    torch.testing.assert_close(first.grad, 2 * first / (1 + layer.eps))
    assert layer.num_batches_tracked == 2


@MODES
@MIXING
@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_a_mix_is_the_formula_with_all_its_gradients_and_moves_what_the_mode_says(
    kind: Kind, share: float, training: bool
):
    layer = kind.trained().double().train(training)
    before, x = copy.deepcopy(layer), kind.input().double()
    batchnorm.normalize_by(layer, share)
    actual = output_and_gradients(kind, layer, x)
    by_formula = copy.deepcopy(before)
    kind.norm(by_formula).forward = partial(mixed, kind.norm(by_formula), share)
    torch.testing.assert_close(actual, output_and_gradients(kind, by_formula, x))
    kind.call(before, x)
    assert_same(state(layer), state(before))


@MODES
@MIXING
@pytest.mark.parametrize(("share", "by"), [(1, "batch"), (0, "running")])
def test_the_ends_of_a_mix_are_batch_and_running(kind: Kind, share: int, by: str, training: bool):
    layer = kind.trained().train(training)
    again, x = copy.deepcopy(layer), kind.input()
    batchnorm.normalize_by(layer, share)
    batchnorm.normalize_by(again, by)
    torch.testing.assert_close(output_and_gradients(kind, layer, x), output_and_gradients(kind, again, x))


@pytest.mark.parametrize("offset", [1e4, -1e4])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_a_mix_keeps_its_digits_far_from_zero_in_every_layout(offset: float, layout: str):
    layer = KINDS["ours 2d"].trained().eval()
    nn.init.constant_(layer.running_mean, offset)
    exact = copy.deepcopy(layer).double()
    x = torch.randn(6, 3, 5, 4) + offset
    x = {"contiguous": x, "channels_last": x.to(memory_format=torch.channels_last), "sliced": x[:, :, ::2]}[layout]
    batchnorm.normalize_by(layer, 0.3)
    # the mean of values of 1e4 is rounded by up to half a step of float32 there, and (x - mean) with it
    step = 1e4 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(layer(x).double(), mixed(exact, 0.3, x.double()), rtol=1e-5, atol=4 * step)


def test_a_mix_takes_one_sample_in_evaluation_and_an_empty_batch_in_both_modes():
    layer = KINDS["ours 1d"].trained()
    exact = copy.deepcopy(layer).double()
    batchnorm.normalize_by(layer, 0.1)
    before = state(layer)
    one = torch.randn(1, 3)
    torch.testing.assert_close(layer.eval()(one).double(), mixed(exact, 0.1, one.double()))
    for training in (True, False):
        assert layer.train(training)(torch.empty(0, 3)).shape == (0, 3)
    assert_same(state(layer), before)


def test_inf_and_nan_stay_in_their_channel_of_a_mix():
    layer = KINDS["ours 1d"].trained().eval()
    batchnorm.normalize_by(layer, 0.5)
    x = torch.randn(4, 3)
    x[0, 1], x[0, 2] = float("inf"), float("nan")
    output = layer(x)
    assert output[:, 0].isfinite().all()
    assert output[:, 1:].isnan().all()


def test_a_mix_adds_the_residual_and_applies_the_activation():
    layer = bnn.BatchNorm1d(3, activation="relu").eval()
    x, residual = torch.randn(5, 3), torch.randn(5, 3)
    batchnorm.normalize_by(layer, 0.5)
    plain = nn.BatchNorm1d(3).eval()
    batchnorm.normalize_by(plain, 0.5)
    torch.testing.assert_close(layer(x, residual=residual), (plain(x) + residual).relu())


def test_a_mix_of_half_precision_is_computed_in_float32():
    layer = nn.BatchNorm1d(3).eval()
    batchnorm.normalize_by(layer, 0.5)
    x = torch.randn(8, 3).bfloat16()
    assert layer(x).dtype == torch.bfloat16
    torch.testing.assert_close(layer(x).float(), layer(x.float()), rtol=2**-8, atol=0)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.randn(4, 3, 4, 4), ValueError, r"expected 2D or 3D input \(got 4D input\)"),
        (torch.randn(4, 1), RuntimeError, "running_mean should contain 1 elements not 3"),
        (torch.randn(4, 3).double(), RuntimeError, "mixed dtype: running_mean is torch.float32, but the input is"),
        (torch.ones(4, 3).long(), NotImplementedError, "not implemented for 'torch.int64'"),
    ],
)
def test_an_input_that_a_mix_refuses_changes_nothing(x: Tensor, error: type[Exception], message: str):
    layer = bnn.BatchNorm1d(3)
    batchnorm.normalize_by(layer, 0.5)
    for training in (True, False):
        before = state(layer.train(training))
        with pytest.raises(error, match=message):
            layer(x)
        assert_same(state(layer), before)


@EVERY
@pytest.mark.parametrize("by", ["batch", "running"])
def test_none_restores_a_layer_exactly(kind: Kind, by: str):
    layer = kind.trained()
    before = [dict(vars(module)) for module in layer.modules()]
    shown = repr(layer)
    batchnorm.normalize_by(layer, by)
    assert f"normalizes_by={by!r}" in repr(layer)
    batchnorm.normalize_by(layer, None)
    assert [dict(vars(module)) for module in layer.modules()] == before
    assert not any(module._state_dict_hooks for module in layer.modules())
    assert repr(layer) == shown


@EVERY
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_normalizes_likewise_and_is_independent(kind: Kind, copied: Any):
    layer = kind.trained()
    batchnorm.normalize_by(layer, "batch")
    again, x = copied(layer), kind.input()
    assert_same(kind.call(again.eval(), x), kind.call(layer.eval(), x))
    batchnorm.normalize_by(again, None)
    nn.init.zeros_(kind.norm(again).running_mean)
    plain = copy.deepcopy(again)
    assert_same(kind.call(again, x), kind.call(plain, x))
    assert "normalizes_by='batch'" in repr(layer)


def test_a_replica_of_data_parallel_normalizes_by_what_is_its_own():
    layer = nn.BatchNorm1d(3).eval()
    batchnorm.normalize_by(layer, "running")
    replica = layer.train()._replicate_for_data_parallel()
    replica.weight, replica.bias = layer.weight, layer.bias
    replica.running_mean = torch.full((3,), 5.0)
    x = torch.randn(4, 3)
    expected = nn.functional.batch_norm(x, torch.full((3,), 5.0), torch.ones(3))
    torch.testing.assert_close(replica(x), expected)


@pytest.mark.parametrize("by", ["moon", 1.5, -0.1, float("nan"), True, [0.5]])
def test_another_choice_is_refused(by: Any):
    layer = nn.BatchNorm1d(3)
    with pytest.raises(ValueError, match="None or the share of the batch, 0 to 1: got"):
        batchnorm.normalize_by(layer, by)
    assert "normalizes_by" not in vars(layer)


def replace_forward(layer: Any) -> Any:
    layer.forward = lambda input: input
    return layer


@pytest.mark.parametrize(
    ("last", "by", "message"),
    [
        (nn.BatchNorm1d(3, track_running_stats=False), 0.5, "layer '1' has no running statistics to normalize by"),
        (nn.BatchNorm1d(3, track_running_stats=False), "running", "layer '1' has no running .*: only 'batch' is"),
        (replace_forward(nn.BatchNorm1d(3)), "batch", "layer '1' has a forward of its own, put there by somebody"),
        (KINDS["ghost"].make(3), 0.5, "layer '1' is a GhostBatchNorm1d, whose own rule for training has no mix"),
        (KINDS["renorm"].make(3), 0.5, "layer '1' is a BatchRenorm1d, whose own rule"),
        (KINDS["masked"].make(3), 0.5, "layer '1' is a MaskedBatchNorm1d, whose own rule"),
        (KINDS["whitening"].make(3), 0.5, "layer '1' is a Whitening1d, whose own rule"),
        (KINDS["sync"].make(3), 0.5, "layer '1' is a SyncBatchNorm, whose own rule"),
    ],
)
def test_a_layer_that_cannot_is_named_before_anything_changes(last: nn.Module, by: Any, message: str):
    model = nn.Sequential(nn.BatchNorm1d(3), last)
    before = [dict(vars(layer)) for layer in model]
    with pytest.raises(ValueError, match=message):
        batchnorm.normalize_by(model, by)
    assert [dict(vars(layer)) for layer in model] == before


def test_explain_and_repr_tell_what_serves():
    layer, x = bnn.BatchNorm1d(3).eval(), torch.randn(4, 3)
    batchnorm.normalize_by(layer, "batch")
    assert batchnorm.explain(layer, x).implementation == "kernel"
    layer(x)
    assert "last call: kernel" in repr(layer)
    batchnorm.normalize_by(layer, 0.5)
    assert batchnorm.explain(layer, x).reason == "a mix of batch and running statistics is computed by plain operations"


def test_threads_that_share_a_layer_do_not_see_each_other():
    layer = nn.BatchNorm1d(3).eval()
    batchnorm.normalize_by(layer, "batch")
    batches = [torch.randn(50, 3) + k for k in range(40)]
    with ThreadPoolExecutor(4) as pool:
        outputs = list(pool.map(layer, batches))
    for x, output in zip(batches, outputs, strict=True):
        torch.testing.assert_close(output, nn.functional.batch_norm(x, None, None, training=True))
    assert layer.running_mean is not None
