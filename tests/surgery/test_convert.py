"""convert and revert: which layers become ours, what stays as it was, and what happens if something goes wrong."""

import copy
import pickle

import pytest
import torch
from equivalence import assert_same_model
from torch import nn

import batchnorm
import batchnorm.nn
from batchnorm.surgery import convert as module_of_convert
from batchnorm.surgery.fused import FusedForward


def small() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Sequential(nn.BatchNorm2d(4), nn.SiLU()))


def state(model: nn.Module) -> list:
    """Classes, instance attributes and tensors of every module, by identity."""
    return [
        (
            name,
            type(m),
            sorted(vars(m)),
            m.training,
            [(k, id(v)) for k, v in [*m.named_parameters(), *m.named_buffers()]],
        )
        for name, m in model.named_modules()
    ]


class OnlyConstructor(nn.BatchNorm2d):
    """Nothing but defaults."""

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features, eps=1e-3)


class OtherForward(nn.BatchNorm2d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 2


class OtherCheck(OnlyConstructor):
    def _check_input_dim(self, input: torch.Tensor) -> None:
        pass


class FrozenBatchNorm2d(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def parametrized() -> nn.Module:
    layer = nn.BatchNorm2d(3)
    nn.utils.parametrize.register_parametrization(layer, "weight", nn.Softplus(), unsafe=True)
    return layer


def with_own_forward() -> nn.Module:
    layer = nn.BatchNorm2d(3)
    layer.forward = lambda x: x
    return layer


def with_activation(activation) -> nn.Module:
    layer = nn.BatchNorm2d(3)
    layer.activation = activation
    return layer


LEFT_ALONE = [
    (with_activation(nn.Tanh()), "an attribute 'activation' of its own"),
    (with_activation("relu"), "an attribute 'activation' of its own"),
    (nn.SyncBatchNorm(3), "SyncBatchNorm"),
    (nn.LazyBatchNorm2d(), "call the model once"),
    (OtherForward(3), "OtherForward is not, or changes, a layer of torch.nn"),
    (OtherCheck(3), "OtherCheck is not, or changes"),
    (FrozenBatchNorm2d(), "FrozenBatchNorm2d is not"),
    (parametrized(), "it is parametrized"),
    (with_own_forward(), "its method forward is replaced"),
    (torch.ao.nn.quantized.BatchNorm2d(3), "is not, or changes"),
]


@pytest.mark.parametrize(("layer", "reason"), LEFT_ALONE, ids=[type(layer).__name__ for layer, _ in LEFT_ALONE])
def test_layers_that_are_not_torchs_are_left_alone(layer, reason):
    model = nn.Sequential(layer, nn.ReLU(), nn.InstanceNorm2d(3))
    before = type(layer)
    _, changes = batchnorm.convert(model)
    assert [(c.name, c.what) for c in changes] == [("0", "left alone")]
    assert reason in changes[0].reason
    assert type(layer) is before


def test_subclass_that_only_has_a_constructor_is_converted_and_reverted():
    model = nn.Sequential(OnlyConstructor(3))
    _, changes = batchnorm.convert(model)
    assert changes[0].what == "converted"
    assert type(model[0]) is batchnorm.nn.BatchNorm2d
    assert model[0].eps == 1e-3
    assert type(batchnorm.revert(model)[0]) is OnlyConstructor


def test_everything_but_the_class_stays():
    model = small().eval()
    model[1].weight.requires_grad_(False)
    calls = []
    model[3][0].register_forward_hook(lambda *_: calls.append(1))
    model[3][0].note = "mine"
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    layers = [model[1], model[3][0]]
    tensors = [(name, id(t)) for name, t in [*model.named_parameters(), *model.named_buffers()]]
    names, keys = [n for n, _ in model.named_modules()], list(model.state_dict())
    same, changes = batchnorm.convert(model)
    assert same is model
    assert [model[1], model[3][0]] == layers
    assert all(type(layer) is batchnorm.nn.BatchNorm2d for layer in layers)
    assert [(name, id(t)) for name, t in [*model.named_parameters(), *model.named_buffers()]] == tensors
    assert [n for n, _ in model.named_modules()] == names
    assert list(model.state_dict()) == keys
    assert not any(m.training for m in model.modules())
    assert not model[1].weight.requires_grad
    assert model[1].bias.requires_grad
    assert model[3][0].note == "mine"
    assert optimizer.param_groups[0]["params"][0] is model[0].weight
    model(torch.randn(2, 3, 6, 6))
    assert calls == [1]
    assert changes[1].reason == "the hooks of '0' would see another value"


def test_shared_layer_is_one_layer():
    layer = nn.BatchNorm2d(3)
    model = nn.ModuleDict({"a": layer, "b": nn.Sequential(layer)})
    _, changes = batchnorm.convert(model)
    assert [c.name for c in changes] == ["a"]
    assert model["a"] is model["b"][0] is layer


def test_a_layer_can_be_the_model():
    layer = nn.BatchNorm1d(3)
    same, changes = batchnorm.convert(layer)
    assert same is layer
    assert type(layer) is batchnorm.nn.BatchNorm1d
    assert [c.what for c in changes] == ["converted"]
    assert "(the model)" in str(changes)


def test_a_model_without_layers_says_so():
    assert str(batchnorm.convert(nn.Linear(2, 2))[1]) == "no batch normalization layer"


def test_changes_print_as_a_table():
    _, changes = batchnorm.convert(small())
    assert str(changes).splitlines() == ["layer  what           reason", "1      absorbed relu", "3.0    absorbed silu"]


def test_fuse_false_only_changes_classes_and_a_later_call_fuses():
    model = small()
    _, changes = batchnorm.convert(model, fuse=False)
    assert [c.what for c in changes] == ["converted", "converted"]
    assert not any("forward" in vars(m) for m in model.modules())
    _, changes = batchnorm.convert(model)
    assert [c.what for c in changes] == ["absorbed relu", "absorbed silu"]


def test_second_convert_changes_nothing_and_says_so():
    model, _ = batchnorm.convert(small())
    before = state(model)
    _, changes = batchnorm.convert(model)
    assert state(model) == before
    assert [(c.what, c.reason) for c in changes] == [
        ("left alone", "already converted: absorbed relu"),
        ("left alone", "already converted: absorbed silu"),
    ]


def test_layer_that_has_an_activation_keeps_it():
    model = nn.Sequential(batchnorm.nn.BatchNorm2d(3, activation="tanh"), nn.ReLU())
    original = copy.deepcopy(model)
    _, changes = batchnorm.convert(model)
    assert changes[0].reason == "already converted: it has an activation already"
    assert_same_model(original, model, torch.randn(4, 3, 5, 5))


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: m])
def test_revert_gives_the_original_back(how):
    original = small()
    model, changes = batchnorm.convert(copy.deepcopy(original))
    model = how(model)
    model(torch.randn(2, 3, 6, 6))
    assert batchnorm.revert(model, changes) is model
    assert [(type(m), sorted(vars(m))) for m in model.modules()] == [
        (type(m), sorted(vars(m))) for m in original.modules()
    ]


def test_revert_of_some_layers_leaves_the_others():
    model, changes = batchnorm.convert(small())
    batchnorm.revert(model, changes[1:])
    assert type(model[1]) is batchnorm.nn.BatchNorm2d
    assert type(model[3][0]) is nn.BatchNorm2d
    assert isinstance(model.forward, FusedForward)


def test_layers_that_were_ours_from_the_start_are_not_reverted():
    model = nn.Sequential(batchnorm.nn.BatchNorm2d(3), nn.ReLU())
    batchnorm.revert(batchnorm.convert(model)[0])
    assert type(model[0]) is batchnorm.nn.BatchNorm2d
    assert "forward" not in vars(model)


@pytest.mark.parametrize("late", [0, 1])
def test_an_exception_in_the_middle_leaves_the_model_as_it_was(monkeypatch, late):
    model = small()
    before, install = state(model), FusedForward.install
    calls = []

    def failing(self):
        calls.append(self)
        if len(calls) > late:
            raise KeyboardInterrupt
        install(self)

    monkeypatch.setattr(FusedForward, "install", failing)
    with pytest.raises(KeyboardInterrupt):
        batchnorm.convert(model)
    assert len(calls) == late + 1
    assert state(model) == before


def test_an_exception_while_classes_change_leaves_the_model_as_it_was(monkeypatch):
    model = small()
    before, swap = state(model), module_of_convert.__globals__["swap"]

    def failing(layer):
        swap(layer)
        if layer is model[3][0]:
            raise RuntimeError("in the middle")

    monkeypatch.setitem(module_of_convert.__globals__, "swap", failing)
    with pytest.raises(RuntimeError, match="in the middle"):
        batchnorm.convert(model)
    assert state(model) == before


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_where_convert_is_called_does_not_matter(context):
    with context():
        _, changes = batchnorm.convert(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()))
    assert changes[0].what == "absorbed relu"


@pytest.mark.parametrize("function", [batchnorm.convert, batchnorm.revert])
def test_what_is_not_a_module_is_a_type_error(function):
    with pytest.raises(TypeError, match=r"expected a torch.nn.Module, got builtins.int"):
        function(3)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_compiled_models_are_refused():
    model = small()
    for compiled, what in (
        (torch.compile(model), "the model"),
        (nn.Sequential(torch.compile(model)), "its module '0'"),
    ):
        with pytest.raises(ValueError, match=f"{what} is compiled: convert the original"):
            batchnorm.convert(compiled)
    assert type(model[1]) is nn.BatchNorm2d


def test_example_that_the_model_does_not_take_is_an_error_and_changes_nothing():
    model = small()
    before = state(model)
    with pytest.raises(ValueError, match=r"does not run on the example \(.*\): give what model"):
        batchnorm.convert(model, torch.randn(2, 5, 6, 6))
    assert state(model) == before


@pytest.mark.parametrize("example", [(torch.randn(2, 3, 6, 6),), {"input": torch.randn(2, 3, 6, 6)}])
def test_example_reaches_neither_statistics_nor_hooks_nor_chance(example):
    model = small()
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    before, chance = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    batchnorm.convert(model, example)
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), chance)
    assert calls == []


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_scripted_and_traced_parts():
    scripted = torch.jit.script(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()))
    graph = torch.fx.symbolic_trace(small())
    model = nn.Sequential(scripted, graph)
    original = copy.deepcopy(model)
    _, changes = batchnorm.convert(model)
    assert [c.what for c in changes] == ["left alone", "absorbed relu", "absorbed silu"]
    assert "scripted" in changes[0].reason
    assert_same_model(nn.Sequential(original[1]), nn.Sequential(model[1]), torch.randn(4, 3, 6, 6))
