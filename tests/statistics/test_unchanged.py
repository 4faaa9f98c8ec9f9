"""What moves inside of ``assert_unchanged`` is named, with how much; what does not move passes."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

import batchnorm
import batchnorm.nn as bnn
from batchnorm.errors import ChangedError
from every_layer import EVERY, Kind


def changes(model: nn.Module, action: Callable[[], object]) -> list[str]:
    """What the error says that an action changed."""
    run = batchnorm.assert_unchanged(model)(torch.no_grad()(action))
    with pytest.raises(ChangedError, match=r"^batch normalization changed:\n") as error:
        run()
    return [line.strip() for line in str(error.value).splitlines()[1:]]


@EVERY
def test_a_training_step_of_a_frozen_layer_passes_and_of_another_does_not(kind: Kind):
    model = nn.ModuleDict({"layer": kind.trained()})
    batchnorm.freeze(model)
    with batchnorm.assert_unchanged(model):
        kind.call(model.train()["layer"], kind.input())
    batchnorm.unfreeze(model)
    found = changes(model, lambda: kind.call(model["layer"], kind.input()))
    moved = {line.partition(": ")[0].removeprefix(f"layer.{kind.name}").strip(".") for line in found}
    spread = "running_cov" if "running_cov" in kind.norm(model["layer"])._buffers else "running_var"
    assert moved - {"schedule_step"} == {"running_mean", spread, "num_batches_tracked"}


def test_every_tensor_that_moved_is_named_with_how_much():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2)).requires_grad_(False)

    def move() -> None:
        model[0].running_mean[1] += 0.25
        model[1].weight += torch.tensor([1.0, -3.0])
        model[1].num_batches_tracked += 7

    assert changes(model, move) == [
        "0.running_mean: 1 of 2 values, by up to 0.25",
        "1.num_batches_tracked: 1 of 1 values, by up to 7",
        "1.weight: 2 of 2 values, by up to 3",
    ]


def test_parameters_that_are_trained_may_move():
    layer = nn.BatchNorm1d(2)
    with batchnorm.assert_unchanged(layer), torch.no_grad():
        layer.weight += 1


def test_gamma_and_beta_of_classes_are_watched_when_frozen():
    model = nn.Sequential(bnn.ConditionalBatchNorm1d(2, 3))
    batchnorm.freeze(model, affine=True)
    assert changes(model, lambda: model[0].weight.add_(1)) == ["0.weight: 6 of 6 values, by up to 1"]


def test_nan_that_was_there_is_no_change_and_nan_that_came_is():
    layer, nan = nn.BatchNorm1d(3), float("nan")
    layer.running_mean[0] = layer.running_var[0] = nan
    layer.running_mean[1] = float("inf")
    with batchnorm.assert_unchanged(layer):
        layer.running_mean.copy_(layer.running_mean.clone())
    found = changes(layer, lambda: layer.running_var[1:].copy_(torch.tensor([nan, 1.5])))
    assert found == ["running_var: 2 of 3 values, by up to 0.5, 1 of them to inf or NaN"]
    assert changes(layer, lambda: layer.running_mean[0].fill_(1.0)) == ["running_mean: 1 of 3 values"]


def test_a_frozen_layer_whose_mode_is_assigned_is_named():
    model = nn.Sequential(nn.BatchNorm1d(2))
    batchnorm.freeze(model)
    found = changes(model, lambda: setattr(model[0], "training", True))
    assert found == ["0.training: True, although the layer is frozen"]


def test_a_layer_that_was_replaced_is_compared_by_its_name():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2), nn.BatchNorm1d(2))

    def replace() -> None:
        model[0], model[1], model[2] = nn.SyncBatchNorm(2), nn.BatchNorm1d(3), nn.Identity()

    was = "was torch.float32 of shape (2,), is torch.float32 of shape (3,)"
    assert changes(model, replace) == [
        f"1.running_mean: {was}",
        f"1.running_var: {was}",
        "2.running_mean: is gone",
        "2.running_var: is gone",
        "2.num_batches_tracked: is gone",
    ]


def test_an_error_of_the_body_is_the_error():
    layer = nn.BatchNorm1d(2)

    @batchnorm.assert_unchanged(layer)
    def fail() -> None:
        layer.running_mean += 1
        raise KeyError("own")

    with pytest.raises(KeyError, match="own"):
        fail()


def test_it_takes_a_pattern_and_refuses_one_that_matches_nothing():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2))
    with batchnorm.assert_unchanged(model, "0"):
        model[1].running_mean += 1
    with pytest.raises(ValueError, match="no batch normalization layer matches '7'; the model has '0', '1'"):
        batchnorm.assert_unchanged(model, "7").__enter__()
