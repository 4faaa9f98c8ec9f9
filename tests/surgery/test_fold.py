"""fold: a copy that is the same in evaluation, found by the data flow, with a certificate; the model stays."""

import copy
import json
import pickle
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
from folded import assert_same_evaluation, fold_and_compare, snapshot, whats, with_statistics
from torch import Tensor, nn

import batchnorm
import batchnorm.nn
from batchnorm.errors import FoldError
from batchnorm.reference import ACTIVATIONS
from batchnorm.surgery import fold as module_of_fold  # noqa: F401
from batchnorm.surgery.fused import FusedForward

X = torch.randn(4, 3, 6, 6)


def small() -> nn.Module:
    return with_statistics(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))


class Block(nn.Module):
    """A residual block, with two convolutions and layers by name."""

    def __init__(self, **norm) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(3, 3, 3, padding=1, bias=False) for _ in range(2))
        self.bn1, self.bn2 = (nn.BatchNorm2d(3) for _ in range(2))
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(self.bn1(self.conv1(x)))
        return self.act(self.bn2(self.conv2(out)).add_(x))


def net(forward, **modules: nn.Module) -> nn.Module:
    model = type("Net", (Block,), {"forward": forward})()
    for name, module in modules.items():
        setattr(model, name, module)
    return with_statistics(model)


def test_the_model_is_not_changed_and_shares_nothing_with_the_folded_one():
    model = small()
    before = snapshot(model), copy.deepcopy(model.state_dict())
    folded, _ = batchnorm.fold(model, X)
    with torch.no_grad():
        for tensor in folded.state_dict().values():
            tensor.zero_()
    assert snapshot(model) == before[0]
    torch.testing.assert_close(model.state_dict(), before[1], rtol=0, atol=0)


@pytest.mark.parametrize("step", ["bare_copy", "observe", "errors_on_example", "check_whole", "install", "describe"])
def test_an_exception_in_the_middle_leaves_the_model_as_it_was(step, monkeypatch):
    import sys

    module = sys.modules["batchnorm.surgery.fold"]

    def fails(*_, **__):
        raise RuntimeError(f"{step} failed")

    model = with_statistics(Block())
    before = snapshot(model)
    monkeypatch.setattr(module, step, fails)
    with pytest.raises(RuntimeError, match=f"{step} failed"):
        batchnorm.fold(model, X)
    assert snapshot(model) == before
    monkeypatch.undo()
    fold_and_compare(model, X)


def test_names_of_everything_but_the_layers_stay():
    model = with_statistics(Block())
    folded, changes = fold_and_compare(model, X)
    assert whats(changes) == {"bn1": "folded into conv1", "bn2": "folded into conv2"}
    assert [name for name, _ in folded.named_modules()] == [name for name, _ in model.named_modules()]
    assert list(folded.state_dict()) == ["conv1.weight", "conv1.bias", "conv2.weight", "conv2.bias"]
    assert type(folded) is type(model)


def test_changes_are_plain_and_print_as_a_table():
    model = nn.Sequential(small(), nn.BatchNorm2d(4))
    _, changes = batchnorm.fold(with_statistics(model))
    assert json.loads(json.dumps([asdict(change) for change in changes]))[1] == {
        "name": "1",
        "what": "left alone",
        "reason": "ReLU '0.2' precedes; its output is that of the model or block",
        "error": None,
        "growth": None,
        "spread": None,
    }
    lines = str(changes).splitlines()
    assert lines[0].split() == ["layer", "what", "error", "growth", "spread", "reason"]
    assert lines[1].startswith("0.1    folded into 0.0  ")
    assert str(batchnorm.fold(nn.Linear(2, 2))[1]) == "no batch normalization layer"


def test_a_layer_that_is_the_model_is_left_alone():
    folded, changes = batchnorm.fold(with_statistics(nn.BatchNorm1d(3)))
    assert type(folded) is nn.BatchNorm1d
    assert changes[0].reason == "it is the model: there is nothing to fold it into"


@pytest.mark.parametrize("example", [None, X])
def test_a_folded_model_is_copied_pickled_and_folded_again(example):
    model = with_statistics(Block())
    folded, _ = batchnorm.fold(model, example)
    for again in (copy.deepcopy(folded), pickle.loads(pickle.dumps(nn.Sequential(*folded.children())))):
        assert not any(isinstance(m, nn.BatchNorm2d) for m in again.modules())
    same, changes = batchnorm.fold(folded, example)
    assert changes == ()
    assert torch.equal(same(X), folded(X))


def nested() -> nn.Module:
    class Around(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = nn.ModuleDict({"a": nn.ModuleList([inner])})

        def forward(self, x: Tensor) -> Tensor:
            return self.inner["a"][0](x)

    first = nn.Sequential(nn.Sequential(Around(nn.Conv2d(3, 4, 3)), nn.Dropout(0.5)), nn.Identity())
    return Around(nn.Sequential(first, nn.Sequential(Around(nn.BatchNorm2d(4))), nn.ReLU()))


def test_nesting_does_not_matter():
    model = with_statistics(nested())
    _, changes = fold_and_compare(model, X, example=False)
    assert [change.what for change in changes] == ["folded into inner.a.0.0.0.0.inner.a.0"]


def test_identity_and_dropout_between_do_nothing_in_evaluation():
    model = with_statistics(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout2d(), nn.Identity(), nn.BatchNorm2d(4)))
    assert whats(fold_and_compare(model, X)[1]) == {"3": "folded into 0"}


def test_pair_that_is_used_twice_is_folded_once():
    model = net(lambda self, x: self.bn1(self.conv1(self.act(self.bn1(self.conv1(x))))))
    _, changes = fold_and_compare(model, X)
    assert whats(changes)["bn1"] == "folded into conv1"


def test_layer_under_two_names_is_replaced_under_both():
    model = with_statistics(Block())
    model.alias, model.listed = model.bn1, [model.conv1, model.bn1]
    folded, changes = fold_and_compare(model, X)
    assert whats(changes)["bn1"] == "folded into conv1"
    assert type(folded.alias) is nn.Identity
    assert folded.alias is folded.bn1 is folded.listed[1]


def test_weight_that_modules_share_is_replaced_in_the_folded_one_only():
    model = with_statistics(Block())
    other = nn.Conv2d(3, 3, 3)
    other.weight = model.conv1.weight
    model.unused = other
    folded, _ = fold_and_compare(model, X)
    assert torch.equal(folded.unused.weight, model.conv1.weight)
    assert not torch.equal(folded.conv1.weight, model.conv1.weight)


class OwnForward(nn.Conv2d):
    """As many libraries pad to the same size."""

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(F.pad(input, (1, 0, 1, 0)), self.weight, self.bias, self.stride)


class Constructor(nn.Conv2d):
    def __init__(self) -> None:
        super().__init__(3, 4, 3, bias=False)


@pytest.mark.parametrize("conv", [lambda: OwnForward(3, 4, 2, bias=False), Constructor], ids=["forward", "constructor"])
def test_subclass_of_a_convolution_is_what_its_forward_does(conv):
    model = with_statistics(nn.Sequential(conv(), nn.BatchNorm2d(4)))
    assert whats(fold_and_compare(model, X)[1]) == {"1": "folded into 0"}


def test_functional_convolution_with_parameters_of_a_block_is_folded():
    def forward(self, x):
        return self.bn1(F.conv2d(x, self.kernel, self.bias, padding=1))

    model = net(forward, kernel=nn.Parameter(torch.randn(3, 3, 3, 3)))
    model.register_parameter("bias", None)
    folded, changes = fold_and_compare(model, X)
    assert whats(changes)["bn1"] == "folded into (the model)"
    assert folded.bias.shape == (3,)


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_activation_of_our_layers_remains(activation):
    layer = batchnorm.nn.BatchNorm2d(4, activation=activation)
    model = with_statistics(nn.Sequential(nn.Conv2d(3, 4, 3), layer, nn.Conv2d(4, 3, 3, padding=1)))
    folded, _ = fold_and_compare(model, X)
    assert type(folded[1]).__module__.startswith("torch.nn")
    assert (type(folded[1]) is nn.Identity) == (activation is None)


@pytest.mark.parametrize("activation", [None, "silu"])
def test_residual_of_our_layers_remains(activation):
    layer = batchnorm.nn.BatchNorm2d(3, activation=activation)
    model = net(lambda self, x: self.bn1(self.conv1(x), residual=x), bn1=layer)
    folded, changes = fold_and_compare(model, X)
    assert whats(changes)["bn1"] == "folded into conv1"
    assert repr(folded.bn1) == f"Remainder(activation={activation})"


RELATIVES = [
    batchnorm.nn.BatchNorm2d(4),
    batchnorm.nn.GhostBatchNorm2d(4, ghost_batch_size=2),
    batchnorm.nn.BatchRenorm2d(4),
    nn.SyncBatchNorm(4),
]


@pytest.mark.parametrize("layer", RELATIVES, ids=lambda layer: type(layer).__name__)
def test_layers_whose_evaluation_is_batch_normalization_are_folded(layer):
    model = with_statistics(nn.Sequential(nn.Conv2d(3, 4, 3), layer))
    assert whats(fold_and_compare(model, X)[1]) == {"1": "folded into 0"}


def test_masked_layer_without_a_mask_is_folded():
    model = with_statistics(nn.Sequential(nn.Conv1d(3, 4, 3), batchnorm.nn.MaskedBatchNorm1d(4, activation="relu")))
    assert whats(fold_and_compare(model, torch.randn(2, 3, 7))[1]) == {"1": "folded into 0"}


@pytest.mark.parametrize("example", [None, X])
def test_converted_model_is_folded_and_its_fused_forward_is_gone(example):
    model, changes = batchnorm.convert(with_statistics(Block()))
    assert [change.what for change in changes] == ["absorbed relu", "absorbed add + relu"]
    folded, changes = batchnorm.fold(model, example)
    assert [change.what for change in changes] == ["folded into conv1", "folded into conv2"]
    assert isinstance(model.forward, FusedForward)
    assert not isinstance(folded.forward, FusedForward)
    assert_same_evaluation(batchnorm.revert(model), folded, X)


def test_hooks_of_other_modules_stay():
    model, seen = with_statistics(Block()), []
    model.register_forward_hook(lambda *_: seen.append("model"))
    folded, changes = batchnorm.fold(model, X)
    assert [change.what for change in changes] == ["folded into conv1", "folded into conv2"]
    assert seen == []
    folded(X)
    assert seen == ["model"]


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


def test_certificate_names_the_arguments_and_branches_that_it_holds_for():
    def forward(self, x, twice=False):
        x = self.conv2(x) if x.shape[1] == 3 else x
        return self.bn1(self.conv1(x)) * (2 if twice else 1)

    _, changes = batchnorm.fold(net(forward), (X, True))
    assert changes[0].reason == "for calls with twice=True, for inputs whose shapes make it branch as the example does"
    _, changes = batchnorm.fold(net(forward))
    assert "whose shape only an example can tell" in changes[0].reason


def test_model_that_cannot_run_in_float64_is_compared_in_its_own_dtype():
    class Float(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.to(torch.float32)

    model = with_statistics(nn.Sequential(Float(), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    _, changes = batchnorm.fold(model, X)
    assert whats(changes) == {"2": "folded into 1"}


def test_random_numbers_of_the_caller_stay():
    model, state = with_statistics(nn.Sequential(Block(), nn.Dropout())), torch.get_rng_state()
    batchnorm.fold(model, X)
    batchnorm.fold(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_no_grad_and_inference_mode_of_the_caller_do_not_matter():
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            folded, changes = batchnorm.fold(with_statistics(Block()), X)
        assert [change.what for change in changes] == ["folded into conv1", "folded into conv2"]
        assert all(parameter.requires_grad for parameter in folded.parameters())


def test_wrong_arguments_are_refused():
    with pytest.raises(TypeError, match=r"expected a torch.nn.Module, got builtins.dict"):
        batchnorm.fold({})
    with pytest.raises(ValueError, match="the model is compiled: fold the original"):
        batchnorm.fold(torch.compile(small(), backend="eager"))
    with pytest.raises(ValueError, match="the model does not run on the example"):
        batchnorm.fold(small(), torch.randn(2, 5, 6, 6))
    for lazy in (nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d()):
        with pytest.raises(ValueError, match="the model has uninitialized parameters: run it once first"):
            batchnorm.fold(nn.Sequential(lazy))
    model = small()
    model.stream = (i for i in range(3))
    with pytest.raises(ValueError, match=r"the model cannot be copied .*generator.*: fold changes a copy only"):
        batchnorm.fold(model)
