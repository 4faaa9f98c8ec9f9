"""A checkpoint loads whole, with statistics that were measured, or not at all."""

import copy
import os
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchnorm.nn
from batchnorm.errors import BatchNormError, StatisticsError
from batchnorm.statistics import load_state_dict, recalibrate

os.environ["HF_HUB_OFFLINE"] = "1"


def network(make: Any = nn.BatchNorm1d, **options: Any) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), make(4, **options), nn.Sequential(make(4, **options)))


def trained(make: Any = nn.BatchNorm1d, **options: Any) -> nn.Module:
    model = network(make, **options)
    nn.init.normal_(model[1].weight)
    for _ in range(3):
        model(torch.randn(9, 3) + 2)
    return model


def assert_same(model: nn.Module, state: Any) -> None:
    torch.testing.assert_close(dict(model.state_dict()), dict(state), rtol=0, atol=0, equal_nan=True)


def refused(model: nn.Module, state: Any, message: str, **options: Any) -> None:
    """Loading raises, and leaves the same tensors with the same values."""
    before, held = copy.deepcopy(model.state_dict()), list(map(id, [*model.parameters(), *model.buffers()]))
    with pytest.raises(StatisticsError, match=message):
        load_state_dict(model, state, **options)
    assert_same(model, before)
    assert list(map(id, [*model.parameters(), *model.buffers()])) == held


makes = pytest.mark.parametrize(
    "make", [nn.BatchNorm1d, batchnorm.nn.BatchNorm1d, batchnorm.nn.BatchRenorm1d, batchnorm.nn.Whitening1d]
)


@makes
@pytest.mark.parametrize("assign", [False, True])
def test_state_of_a_trained_model_loads_as_in_torch(make: Any, assign: bool):
    state, model = trained(make).state_dict(), network(make)
    tensors = [*model.parameters(), *model.buffers()]
    result = load_state_dict(model, state, assign=assign)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert_same(model, state)
    same = [a is b for a, b in zip(tensors, [*model.parameters(), *model.buffers()], strict=True)]
    assert not any(same) if assign else all(same)
    assert (model[0].weight.data_ptr() == state["0.weight"].data_ptr()) == assign


def poisoned(state: dict[str, Tensor], key: str, value: float) -> dict[str, Tensor]:
    changed = {name: tensor.clone() for name, tensor in state.items()}
    changed[key].view(-1)[-1] = value
    return changed


@makes
def test_faults_of_the_statistics_are_named(make: Any):
    state, model = trained(make).state_dict(), network(make)
    spread = "1.running_cov" if "1.running_cov" in state else "1.running_var"
    without = {key: value for key, value in state.items() if key != spread}
    refused(model, without, r"no usable running statistics for '1' \(missing\); take another", strict=False)
    refused(model, poisoned(state, "1.running_mean", float("nan")), r"'1' \(inf or NaN\)")
    refused(model, poisoned(state, spread, float("inf")), r"'1' \(inf or NaN\)")
    refused(model, poisoned(state, spread, -1), r"'1' \(a negative variance or counter\)")
    refused(model, poisoned(state, "2.0.num_batches_tracked", -3), r"'2.0' \(a negative variance or counter\)")


@makes
def test_state_of_a_new_model_is_refused_unless_allowed(make: Any):
    state, model = network(make).state_dict(), trained(make)
    refused(model, state, r"'1' \(never updated, mean 0 and variance 1\), '2.0' \(never .*batchnorm.recalibrate")
    load_state_dict(model, state, allow=["never-updated"])
    assert_same(model, state)


def test_statistics_at_zero_and_one_after_batches_are_a_choice():
    state = trained(momentum=0.0).state_dict()
    assert state["1.running_var"].tolist() == [1] * 4
    model = network()
    load_state_dict(model, state)
    assert_same(model, state)


def test_parameters_without_buffers_are_no_checkpoint_of_a_trained_model():
    model, only = network(), dict(trained().named_parameters())
    refused(model, only, r"'1' \(missing\), '2.0' \(missing\); take another .* allow=\['missing'\] and measure")
    refused(model, only, "missing", strict=False)
    data = torch.randn(30, 3)
    result = load_state_dict(model, only, strict=False, allow="missing")
    assert len(result.missing_keys) == 4
    assert only["1.weight"].equal(model[1].weight)
    assert recalibrate(model, [data]).not_reached == []


def test_only_the_first_layers_are_named():
    model = nn.Sequential(*(nn.BatchNorm1d(2) for _ in range(7)))
    refused(model, {}, r"'3' \(missing\) and 3 more; take another", strict=False)


def test_all_faults_of_a_layer_are_named_and_allowed_apart():
    state = poisoned(poisoned(trained().state_dict(), "1.running_var", -1), "1.running_mean", float("nan"))
    refused(network(), state, r"'1' \(inf or NaN, a negative variance or counter\).*\['not-finite', 'negative'\]")
    refused(network(), state, r"'1' \(inf or NaN\)", allow="negative")
    load_state_dict(model := network(), state, allow=("negative", "not-finite"))
    assert_same(model, state)


def test_variance_that_overflows_in_the_dtype_of_the_model_is_refused():
    state = poisoned(trained().state_dict(), "1.running_var", 1e5)
    load_state_dict(network(), state)
    refused(network().half(), state, r"'1' \(inf or NaN\)")


@pytest.mark.parametrize("old_format", [False, True])
def test_missing_counter_becomes_zero_for_unknown(old_format: bool):
    state = trained().state_dict()
    for name in ("1", "2.0"):
        del state[f"{name}.num_batches_tracked"]
        if old_format:
            del state._metadata[name]["version"]
    model = trained()
    load_state_dict(model, state)
    assert model[1].num_batches_tracked == 0
    assert model[1].running_var.equal(state["1.running_var"])


def test_missing_counter_is_refused_where_the_first_batch_would_replace_the_statistics():
    state, model = trained().state_dict(), network(momentum=None)
    without = {key: value for key, value in state.items() if "num_batches" not in key}
    message = r"'1' \(no count of batches, so that with momentum=None the first batch would replace them\)"
    refused(model, without, message)
    zero = {key: value * 0 if "num_batches" in key else value for key, value in state.items()}
    refused(model, zero, message)
    load_state_dict(model, without, allow="no-counter")
    assert model[1].running_mean.equal(state["1.running_mean"])
    load_state_dict(model, state)


def test_other_keys_follow_strict_and_nothing_is_loaded():
    state, model = trained().state_dict(), network()
    before = copy.deepcopy(model.state_dict())
    del state["0.bias"]
    state["more"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match=r'Missing key.*"0.bias"(.|\n)*Unexpected key.*"more"'):
        load_state_dict(model, state)
    assert_same(model, before)
    result = load_state_dict(model, state, strict=False)
    assert (result.missing_keys, result.unexpected_keys) == (["0.bias"], ["more"])


def test_size_mismatch_loads_nothing():
    state, model = trained().state_dict(), network()
    before = copy.deepcopy(model.state_dict())
    state["2.0.weight"] = torch.zeros(5)
    with pytest.raises(RuntimeError, match=r"size mismatch for 2.0.weight.*\[5\].*\[4\]"):
        load_state_dict(model, state)
    assert_same(model, before)


class Breaks(nn.BatchNorm1d):
    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        raise OSError("the disk is gone")


def test_exception_in_the_middle_loads_nothing():
    model = network().append(Breaks(4))
    before = copy.deepcopy(model.state_dict())
    state = trained().append(nn.BatchNorm1d(4)).state_dict()
    with pytest.raises(OSError, match="the disk is gone"):
        load_state_dict(model, state)
    assert_same(model, before)


def test_recurrent_layers_keep_their_own_weights():
    model = nn.ModuleList([nn.LSTM(2, 4), trained()])
    state = nn.ModuleList([nn.LSTM(2, 4), trained()]).state_dict()
    load_state_dict(model, state)
    assert_same(model, state)
    assert all(a is b for a, b in zip(model[0]._flat_weights, model[0].parameters(), strict=True))
    assert model[0].weight_ih_l0.data_ptr() != state["0.weight_ih_l0"].data_ptr()


def test_swapped_tensors_are_not_those_of_the_state():
    model, state = network(), trained().state_dict()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        refused(model, poisoned(state, "1.running_var", -1), "negative")
        load_state_dict(model, state)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert_same(model, state)
    assert model[0].weight.data_ptr() != state["0.weight"].data_ptr()


def test_state_may_hold_parameters_of_a_model_that_is_trained():
    model, other = network(), trained()
    state = dict(other.state_dict(keep_vars=True))
    model[0].weight.requires_grad_(False)
    load_state_dict(model, state)
    assert other[0].weight.requires_grad


def test_keys_renamed_by_a_hook_are_found():
    class Renamed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)
            self.register_load_state_dict_pre_hook(self.rename)

        @staticmethod
        def rename(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
            for key in [key for key in state if key.startswith("bn.")]:
                state[key.replace("bn.", "norm.")] = state.pop(key)

    model, state = Renamed(), trained().state_dict()
    load_state_dict(model, {f"bn.{key[2:]}": value for key, value in state.items() if key.startswith("1.")})
    assert model.norm.running_var.equal(state["1.running_var"])


def test_layer_used_under_two_names_is_found_under_either():
    shared = nn.BatchNorm1d(4)
    model, state = nn.ModuleDict({"a": shared, "b": shared}), trained().state_dict()
    load_state_dict(model, {f"b.{key[2:]}": state[key] for key in state if key.startswith("1.")}, strict=False)
    assert shared.running_var.equal(state["1.running_var"])


def test_assigned_half_checkpoint_leaves_whole_layers_in_float32():
    state, model = trained().bfloat16().state_dict(), network()
    load_state_dict(model, state, assign=True)
    assert model[0].weight.dtype == torch.bfloat16
    for name in ("weight", "bias", "running_mean", "running_var"):
        assert getattr(model[1], name).equal(state[f"1.{name}"].float())
    assert model(torch.randn(5, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_model_on_meta_needs_assign():
    with torch.device("meta"):
        model = network()
    with pytest.raises(StatisticsError, match="meta device, where loading does nothing: pass assign=True"):
        load_state_dict(model, trained().state_dict())
    state = trained().state_dict()
    load_state_dict(model, state, assign=True)
    assert_same(model, state)


def test_models_without_running_statistics_load_as_in_torch():
    for model in (nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False)):
        state = {name: torch.rand_like(value) for name, value in model.state_dict().items()}
        load_state_dict(model, state)
        assert_same(model, state)


def test_unknown_fault_is_refused():
    with pytest.raises(ValueError, match=r"allow takes missing, not-finite, .*; got nan"):
        load_state_dict(network(), {}, allow="nan")


def test_error_is_a_runtime_error_as_torchs_is():
    assert issubclass(StatisticsError, (RuntimeError, BatchNormError))


def resnet() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    return ResNetForImageClassification(ResNetConfig(embedding_size=4, hidden_sizes=[8, 12], depths=[1, 1]))


def unet() -> nn.Module:
    with warnings.catch_warnings():
        # monai's own imports warn
        warnings.simplefilter("ignore")
        from monai.networks.nets import UNet

    sizes = {"spatial_dims": 2, "in_channels": 3, "out_channels": 2, "channels": (4, 6), "strides": (2,)}
    return UNet(**sizes, num_res_units=1, norm="batch")


def efficientnet() -> nn.Module:
    from efficientnet_pytorch import EfficientNet

    return EfficientNet.from_name("efficientnet-b0", num_classes=3, width_coefficient=0.1, image_size=32)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("build", [resnet, unet, efficientnet])
def test_models_of_other_libraries_load_after_a_few_steps(build: Callable[[], nn.Module]):
    # convolutions and pooling of these models have backward passes that are not deterministic
    torch.use_deterministic_algorithms(False)
    model, other = build().train(), build()
    new = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(2):
        output = model(torch.randn(2, 3, 32, 32))
        (output if isinstance(output, Tensor) else output.logits).square().mean().backward()
        optimizer.step()
    load_state_dict(other, model.state_dict())
    assert_same(other, model.state_dict())
    with pytest.raises(StatisticsError, match="never updated"):
        load_state_dict(other, new)
