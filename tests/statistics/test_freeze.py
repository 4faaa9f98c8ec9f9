"""A frozen layer evaluates, whatever is called, and is otherwise the layer that it was."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import batchnorm
import batchnorm.nn as bnn
from batchnorm.statistics.freeze import restore_modes
from every_layer import EVERY, KINDS, Kind, assert_same, output_and_gradients, state


def saved_and_loaded(value: Any, *, weights_only: bool = False) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


def small_model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 3), bnn.BatchNorm1d(3))


@EVERY
@pytest.mark.parametrize("steps", [1, 2, 10])
def test_a_frozen_layer_in_training_does_what_it_does_in_evaluation_and_moves_nothing(kind: Kind, steps: int):
    layer = kind.trained()
    evaluated = copy.deepcopy(layer).eval()
    batchnorm.freeze(layer, kind.name)
    before = state(layer)
    for _ in range(steps):
        x = kind.input()
        assert_same(
            output_and_gradients(kind, layer.train(), x),
            output_and_gradients(kind, evaluated, x),
        )
    assert_same(state(layer), before)


@EVERY
@pytest.mark.parametrize("momentum", [0.3, None])
def test_after_unfreezing_a_layer_goes_on_as_if_it_had_never_been_frozen(kind: Kind, momentum: float | None):
    layer = kind.trained(momentum=momentum)
    never = copy.deepcopy(layer)
    attributes = {name: set(vars(module)) for name, module in layer.named_modules()}
    batchnorm.freeze(layer, affine=True)
    kind.call(layer.train(), kind.input())
    assert batchnorm.unfreeze(layer) == batchnorm.freeze(copy.deepcopy(layer))
    assert {name: set(vars(module)) for name, module in layer.named_modules()} == attributes
    assert not any(module._state_dict_hooks for module in layer.modules())
    for _ in range(2):
        x = kind.input()
        assert_same(output_and_gradients(kind, layer, x), output_and_gradients(kind, never, x))
    assert_same(state(layer), state(never))
    assert repr(layer) == repr(never)


@EVERY
def test_a_frozen_layer_is_the_same_object_with_all_that_it_had(kind: Kind):
    layer = kind.trained()
    norm, seen = kind.norm(layer), []
    norm.register_forward_hook(lambda module, args, output: seen.append(module))
    cls, tensors, momentum = type(norm), [id(t) for t in (*norm.parameters(), *norm.buffers())], norm.momentum
    batchnorm.freeze(layer)
    kind.call(layer, kind.input())
    assert kind.norm(layer) is norm
    assert seen == [norm]
    assert type(norm) is cls
    assert [id(t) for t in (*norm.parameters(), *norm.buffers())] == tensors
    assert norm.momentum == momentum
    assert norm.frozen_statistics is True
    assert "frozen_statistics=True" in repr(norm)


@EVERY
@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer)), saved_and_loaded],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_a_copy_is_frozen_and_independent(kind: Kind, copied: Any):
    layer = kind.trained()
    batchnorm.freeze(layer)
    again = copied(layer)
    assert kind.norm(again.train()).training is False
    assert again.train() is again
    assert repr(again) == repr(layer)
    batchnorm.unfreeze(again)
    before = state(layer)
    kind.call(again, kind.input())
    kind.call(layer.train(), kind.input())
    assert kind.norm(again).training
    assert_same(state(layer), before)
    assert kind.norm(again).num_batches_tracked == kind.norm(layer).num_batches_tracked + 1


def test_a_shallow_copy_and_a_replica_of_data_parallel_are_frozen():
    layer = KINDS["torch 1d"].trained()
    batchnorm.freeze(layer)
    for again in (copy.copy(layer), layer._replicate_for_data_parallel()):
        again.train()
        assert not again.training
        again.weight, again.bias, again.running_mean = layer.weight, layer.bias, layer.running_mean
        x = torch.randn(5, 3)
        assert_same(again(x), layer(x))
    shallow = copy.copy(layer)
    batchnorm.unfreeze(shallow)
    assert shallow.training
    assert layer.train().training is False


def test_unfreezing_gives_a_layer_the_mode_of_the_module_that_holds_it():
    model = small_model()
    batchnorm.freeze(model)
    model.eval()
    assert batchnorm.unfreeze(model, "1") == ["1"]
    assert not model[1].training
    model.training = True
    assert batchnorm.unfreeze(model) == ["4"]
    assert model[4].training


@pytest.mark.parametrize("mode", [True, False])
def test_unfreezing_a_lone_layer_gives_it_the_mode_that_was_asked_for_last(mode: bool):
    layer = nn.BatchNorm1d(3).eval()
    batchnorm.freeze(layer)
    batchnorm.freeze(layer.train(mode))
    batchnorm.unfreeze(layer)
    assert layer.training is mode


def test_train_of_a_frozen_layer_refuses_what_torch_refuses():
    layer = nn.BatchNorm1d(3)
    batchnorm.freeze(layer)
    with pytest.raises(ValueError, match="training mode is expected to be boolean"):
        layer.train("yes")


@EVERY
def test_frozen_gamma_and_beta_require_what_they_did_when_unfrozen(kind: Kind):
    model = nn.ModuleDict({"layer": kind.make(3)})
    parameters = list(model.parameters())
    parameters[-1].requires_grad_(False)
    names = batchnorm.freeze(model, affine=True)
    # what is remembered is not that they are frozen already
    batchnorm.freeze(model, affine=True)
    assert not any(parameter.requires_grad for parameter in parameters)
    assert batchnorm.unfreeze(model) == names
    assert [parameter.requires_grad for parameter in parameters] == [True] * (len(parameters) - 1) + [False]


def test_parameters_that_two_layers_share_require_a_gradient_again():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    model[1].weight = model[0].weight
    batchnorm.freeze(model, "0", affine=True)
    batchnorm.freeze(model, affine=True)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    batchnorm.unfreeze(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_an_optimizer_with_momentum_and_weight_decay_does_not_move_frozen_parameters():
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    model(torch.randn(6, 4)).square().sum().backward()
    optimizer.step()
    batchnorm.freeze(model, affine=True)
    with batchnorm.assert_unchanged(model):
        for _ in range(2):
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
            model.train()(torch.randn(6, 4)).square().sum().backward()


@pytest.mark.parametrize(("statistics", "affine"), [(True, False), (False, True)])
def test_statistics_and_affine_are_frozen_and_unfrozen_apart(statistics: bool, affine: bool):
    layer = nn.BatchNorm1d(3)
    batchnorm.freeze(layer, statistics=True, affine=True)
    assert batchnorm.unfreeze(layer, statistics=statistics, affine=affine) == [""]
    assert layer.training is statistics
    assert layer.weight.requires_grad is affine
    assert ("frozen_statistics=True" in repr(layer), "frozen_affine=True" in repr(layer)) == (affine, statistics)
    assert batchnorm.unfreeze(layer, statistics=statistics, affine=affine) == []


def test_a_pattern_that_matches_nothing_changes_nothing():
    model = small_model()
    with pytest.raises(ValueError, match=r"no batch normalization layer matches 'head.*'; the model has '1', '4'"):
        batchnorm.freeze(model, ["1", "head.*"])
    assert "frozen" not in repr(model)
    assert model[1].training


def replace_train(layer: Any) -> Any:
    layer.train = lambda mode=True: layer
    return layer


@pytest.mark.parametrize(
    ("last", "message"),
    [
        (nn.BatchNorm1d(3, track_running_stats=False), "layer '1' has no running statistics to freeze: name others"),
        (replace_train(nn.BatchNorm1d(3)), "layer '1' has a train of its own, put there by somebody else"),
    ],
    ids=["no statistics", "replaced"],
)
def test_a_layer_that_cannot_be_frozen_is_named_before_anything_changes(last: nn.Module, message: str):
    model = nn.Sequential(nn.BatchNorm1d(3), last)
    before = [dict(vars(layer)) for layer in model]
    with pytest.raises(ValueError, match=message):
        batchnorm.freeze(model, affine=True)
    assert [dict(vars(layer)) for layer in model] == before
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ValueError, match="nothing to freeze: statistics and affine are both False"):
        batchnorm.freeze(model, statistics=False)


@EVERY
def test_a_state_dict_has_the_same_keys_and_loads_strictly_elsewhere(kind: Kind):
    layer = kind.trained()
    keys = list(layer.state_dict())
    batchnorm.freeze(layer, affine=True)
    assert list(layer.state_dict()) == keys
    other = kind.make(3)
    other.load_state_dict(layer.state_dict(), strict=True)
    assert kind.norm(other).training
    assert_same(state(other), state(layer))


def test_frozen_layers_are_restored_from_the_metadata_of_a_saved_state_dict():
    model = small_model()
    batchnorm.freeze(model, "1", affine=True)
    batchnorm.normalize_by(model, 0.25, "4")
    state_dict = saved_and_loaded(model.state_dict(), weights_only=True)
    again = small_model()
    again.load_state_dict(state_dict)
    assert restore_modes(again, state_dict) == ["1", "4"]
    assert repr(again) == repr(model)
    assert not again.train()[1].training
    assert not again[1].weight.requires_grad
    assert again[4].normalizes_by == 0.25
    batchnorm.unfreeze(again)
    assert again[1].training
    assert again[1].weight.requires_grad


def test_without_metadata_or_frozen_layers_nothing_is_restored():
    model, again = small_model(), small_model()
    batchnorm.freeze(model)
    assert restore_modes(again, dict(model.state_dict())) == []
    batchnorm.unfreeze(model)
    assert restore_modes(again, model.state_dict()) == []
    assert repr(again) == repr(small_model())


def test_metadata_that_does_not_suit_the_model_changes_nothing():
    model = small_model()
    batchnorm.freeze(model)
    state_dict = model.state_dict()
    other = small_model()
    other[4] = bnn.BatchNorm1d(3, track_running_stats=False)
    with pytest.raises(ValueError, match="layer '4' has no running statistics to freeze"):
        restore_modes(other, state_dict)
    assert "frozen" not in repr(other)
    state_dict._metadata["4"]["batchnorm"] = {"normalizes_by": "moon"}
    with pytest.raises(ValueError, match=r"by should be 'batch', 'running', None or the share of the batch.*'moon'"):
        restore_modes(other, state_dict)
    assert "frozen" not in repr(other)


def test_nothing_runs_in_a_forward_of_a_frozen_layer_that_did_not_before():
    for layer in (nn.BatchNorm1d(3), bnn.BatchNorm1d(3)):
        batchnorm.freeze(layer)
        assert not {"forward", "__call__"} & set(vars(layer))
        assert not {**layer._forward_hooks, **layer._forward_pre_hooks}
