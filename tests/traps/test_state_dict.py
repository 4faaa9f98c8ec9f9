"""Traps of checkpoints: what torch loads, leaves or forgets without a word, and what happens here instead."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from batchnorm import load_state_dict, reset_running_stats
from batchnorm.errors import StatisticsError


def network(width: int = 2, **options: Any) -> nn.Module:
    return nn.Sequential(nn.BatchNorm1d(2, **options), nn.BatchNorm1d(width, **options))


def trained(width: int = 2) -> nn.Module:
    model = network(width)
    model[0](torch.randn(9, 2) + 5)
    model[1](torch.randn(9, width) + 5)
    return model


def without(state: dict[str, Tensor], word: str) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if word not in key}


def refused(model: nn.Module, state: Any, message: str, **options: Any) -> None:
    before = copy.deepcopy(dict(model.state_dict()))
    with pytest.raises(StatisticsError, match=message):
        load_state_dict(model, state, **options)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


def test_not_strict_leaves_mean_0_and_variance_1():
    state = without(trained().state_dict(), "running")
    theirs = network()
    theirs.load_state_dict(state, strict=False)
    assert theirs[0].running_mean.tolist() == [0, 0]
    assert theirs[0].running_var.tolist() == [1, 1]
    refused(network(), state, r"'0' \(missing\), '1' \(missing\)", strict=False)


def test_not_strict_with_a_prefix_loads_nothing_at_all():
    state = {f"module.{key}": value for key, value in trained().state_dict().items()}
    theirs = network()
    theirs.load_state_dict(state, strict=False)
    torch.testing.assert_close(dict(theirs.state_dict()), dict(network().state_dict()))
    refused(network(), state, r"'0' \(missing\), '1' \(missing\)", strict=False)


def test_trainable_variables_alone_are_not_the_model():
    # as TensorFlow's trainable_variables, which leave moving statistics out
    state = dict(trained().named_parameters())
    theirs = network()
    assert len(theirs.load_state_dict(state, strict=False).missing_keys) == 4
    refused(network(), state, "missing", strict=False)


@pytest.mark.parametrize(("key", "value", "message"), [
    ("0.running_var", float("nan"), "inf or NaN"),
    ("0.running_mean", float("inf"), "inf or NaN"),
    ("0.running_var", -1.0, "a negative variance"),
])  # fmt: skip
def test_impossible_statistics_load_and_every_output_is_nan(key: str, value: float, message: str):
    state = trained().state_dict()
    state[key][0] = value
    theirs = network()
    theirs.load_state_dict(state)
    assert not theirs.eval()(torch.randn(3, 2))[:, 0].isfinite().any()
    refused(network(), state, message)


def test_missing_counter_is_an_error_with_metadata_and_fine_without():
    with_metadata = trained().state_dict()
    del with_metadata["0.num_batches_tracked"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"0.num_batches_tracked"'):
        network().load_state_dict(with_metadata)
    network().load_state_dict(dict(with_metadata))
    for state in (with_metadata, dict(with_metadata)):
        model = network()
        load_state_dict(model, state)
        assert model[0].running_var.equal(with_metadata["0.running_var"])
        assert model[0].num_batches_tracked == 0


def test_missing_counter_keeps_the_one_of_another_training():
    state, theirs, ours = without(trained().state_dict(), "num_batches"), trained(), trained()
    for model in (theirs, ours):
        model[0].num_batches_tracked.fill_(900)
    theirs.load_state_dict(state)
    assert theirs[0].num_batches_tracked == 900
    load_state_dict(ours, state)
    assert ours[0].num_batches_tracked == 0


def test_missing_counter_lets_the_first_batch_replace_cumulative_statistics():
    state = without(trained().state_dict(), "num_batches")
    theirs = network(momentum=None)
    theirs.load_state_dict(state)
    x = torch.tensor([[0.0, 0.0], [2.0, 2.0]])
    theirs[0](x)
    assert theirs[0].running_mean.tolist() == [1, 1]
    refused(network(momentum=None), state, "with momentum=None the first batch would replace them")


def test_load_that_fails_has_loaded_half():
    state, theirs, ours = trained(3).state_dict(), network(), network()
    with pytest.raises(RuntimeError, match=r"size mismatch for 1.weight"):
        theirs.load_state_dict(state)
    assert theirs[0].running_mean.equal(state["0.running_mean"])
    with pytest.raises(RuntimeError, match=r"size mismatch for 1.weight"):
        load_state_dict(ours, state)
    torch.testing.assert_close(dict(ours.state_dict()), dict(network().state_dict()))


def test_state_that_was_assigned_once_is_assigned_ever_after():
    state, first, theirs, ours = trained().state_dict(), network(), network(), network()
    first.load_state_dict(state, assign=True)
    theirs.load_state_dict(state)
    # two models with the same running statistics in memory: one trains, the other changes
    assert theirs[0].running_mean.data_ptr() == first[0].running_mean.data_ptr()
    load_state_dict(ours, state)
    assert ours[0].running_mean.data_ptr() != first[0].running_mean.data_ptr()


def test_model_from_the_meta_device_has_whatever_stood_in_memory():
    model = nn.Sequential(nn.BatchNorm1d(2, device="meta")).to_empty(device="cpu")
    # memory that nobody has written is NaN in these tests
    assert not model[0].running_var.isfinite().any()
    assert model[0].num_batches_tracked != 0
    reset_running_stats(model)
    assert model[0].running_mean.tolist() == [0, 0]
    assert model[0].running_var.tolist() == [1, 1]
    assert model[0].num_batches_tracked == 0


def test_loading_into_the_meta_device_loads_nothing():
    state = trained().state_dict()
    with torch.device("meta"):
        theirs, ours = network(), network()
    with pytest.warns(UserWarning, match="which is a no-op"):
        theirs.load_state_dict(state)
    assert theirs[0].running_var.is_meta
    with pytest.raises(StatisticsError, match="pass assign=True"):
        load_state_dict(ours, state)
