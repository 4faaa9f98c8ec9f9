"""Layers that were told to stay float32 do, in a model of half precision that is copied, pickled and loaded."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import batchnorm
from batchnorm.statistics import keep_float32

MAKES: dict[str, Callable[..., nn.Module]] = {
    "torch": nn.BatchNorm1d,
    "sync": nn.SyncBatchNorm,
    "ours": batchnorm.nn.BatchNorm1d,
    "renorm": batchnorm.nn.BatchRenorm1d,
    "whitening": batchnorm.nn.Whitening1d,
}
makes = pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
dtypes = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
CONVERSIONS: dict[str, Callable[[nn.Module, torch.dtype], Any]] = {
    "to": lambda model, dtype: model.to(dtype),
    "to device and dtype": lambda model, dtype: model.to("cpu", dtype),
    "half or bfloat16": lambda model, dtype: model.half() if dtype == torch.float16 else model.bfloat16(),
    "type": lambda model, dtype: model.type(dtype),
}


def model_of(make: Callable[..., nn.Module], **options: Any) -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 4), make(4, **options))
    model[1].running_mean.copy_(torch.randn(4) * 1e5)
    nn.init.normal_(model[1].weight)
    return model


def float32_tensors(layer: nn.Module) -> dict[str, torch.Tensor]:
    state = {name: value.clone() for name, value in layer.state_dict().items() if value.is_floating_point()}
    assert {value.dtype for value in state.values()} == {torch.float32}
    return state


@makes
@dtypes
@pytest.mark.parametrize("convert", CONVERSIONS.values(), ids=CONVERSIONS)
def test_a_conversion_keeps_the_bits_of_the_layer(make: Any, dtype: torch.dtype, convert: Any):
    model = model_of(make)
    before = float32_tensors(model[1])
    assert keep_float32(model) == ["1"]
    convert(model, dtype)
    assert model[0].weight.dtype == dtype
    torch.testing.assert_close(float32_tensors(model[1]), before, rtol=0, atol=0)


def saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@makes
@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), saved_and_loaded],
    ids=["deepcopy", "pickle", "torch.save"],
)  # fmt: skip
def test_a_copy_stays_float32_and_does_not_touch_the_original(make: Any, again: Any):
    model = model_of(make)
    keep_float32(model)
    before = copy.deepcopy(model.state_dict())
    other = again(model)
    other.bfloat16()
    float32_tensors(other[1])
    other[1].running_mean.zero_()
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)


@makes
def test_assigning_a_half_checkpoint_widens_its_values(make: Any):
    model, checkpoint = model_of(make), model_of(make).bfloat16().state_dict()
    keep_float32(model)
    model.load_state_dict(checkpoint, assign=True)
    assert model[0].weight.dtype == torch.bfloat16
    for name, value in float32_tensors(model[1]).items():
        assert value.equal(checkpoint[f"1.{name}"].float())
    assert checkpoint["1.running_mean"].dtype == torch.bfloat16


@dtypes
@pytest.mark.parametrize("make", [nn.BatchNorm1d, batchnorm.nn.BatchNorm1d, batchnorm.nn.Whitening1d])
def test_half_inputs_train_and_evaluate(make: Any, dtype: torch.dtype):
    kept, wide = (nn.Sequential(make(4)) for _ in range(2))
    keep_float32(kept)
    kept.to(dtype)
    x = torch.randn(20, 4, dtype=dtype)
    for training in (True, False):
        output, expected = kept.train(training)(x), wide.train(training)(x.float())
        assert output.dtype == dtype
        torch.testing.assert_close(output, expected.to(dtype))
        torch.testing.assert_close(dict(kept.state_dict()), dict(wide.state_dict()))
    kept(x).float().square().sum().backward()
    assert kept[0].weight.grad.dtype == torch.float32


def test_what_is_in_half_precision_already_is_widened():
    model = model_of(nn.BatchNorm1d).half()
    keep_float32(model)
    float32_tensors(model[1])
    assert model[0].weight.dtype == torch.float16


def test_a_layer_that_was_kept_twice_is_kept_once():
    model = model_of(nn.BatchNorm1d)
    keep_float32(model)
    keep_float32(model)
    assert len(model[1]._load_state_dict_post_hooks) == 1


def test_float64_and_the_meta_device_stay_possible():
    model = model_of(nn.BatchNorm1d)
    keep_float32(model)
    assert model.double()[1].running_var.dtype == torch.float64
    assert model.half()[1].running_var.dtype == torch.float32
    assert model.to("meta")[1].running_var.is_meta
    assert model.bfloat16().to_empty(device="cpu")[1].running_var.dtype == torch.float32


def test_a_pattern_leaves_the_other_layers():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2))
    assert keep_float32(model, pattern="1") == ["1"]
    assert [layer.running_var.dtype for layer in model.half()] == [torch.float16, torch.float32]


def test_converted_layers_are_kept_and_kept_layers_are_not_converted():
    model = model_of(nn.BatchNorm1d)
    batchnorm.convert(model)
    keep_float32(model)
    assert isinstance(model.half()[1], batchnorm.nn.BatchNorm1d)
    float32_tensors(model[1])
    other = model_of(nn.BatchNorm1d)
    keep_float32(other)
    (change,) = batchnorm.convert(other)[1]
    assert (change.what, change.reason) == ("left alone", "its method _apply is replaced on the instance")


def test_optimizer_goes_on_with_the_same_parameters():
    model = model_of(nn.BatchNorm1d)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    keep_float32(model)
    model.bfloat16()
    before = model[1].weight.detach().clone()
    model(torch.randn(5, 3, dtype=torch.bfloat16)).float().square().sum().backward()
    optimizer.step()
    assert not model[1].weight.equal(before)
