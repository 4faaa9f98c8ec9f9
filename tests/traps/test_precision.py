"""Traps of half precision: running statistics that are narrowed, and then stand still."""

from typing import Any

import pytest
import torch
from torch import nn

import batchnorm
from batchnorm import keep_float32, load_state_dict

halves = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


def layer_with(mean: float = 0.0, var: float = 1.0, make: Any = nn.BatchNorm1d, **options: Any) -> nn.Module:
    model = nn.Sequential(make(2, **options))
    model[0].running_mean.fill_(mean)
    model[0].running_var.fill_(var)
    return model


@halves
def test_converting_a_model_narrows_its_statistics(dtype: torch.dtype):
    theirs, ours = layer_with(1000.4), layer_with(1000.4)
    keep_float32(ours)
    theirs.to(dtype)
    ours.to(dtype)
    assert theirs[0].running_mean.dtype == dtype
    assert (theirs[0].running_mean.float() - 1000.4).abs().min() > 0.05
    assert ours[0].running_mean.tolist() == torch.full((2,), 1000.4).tolist()


def test_variance_beyond_65504_makes_a_half_layer_constant():
    theirs, ours = layer_with(var=1e5), layer_with(var=1e5)
    keep_float32(ours)
    x = torch.full((1, 2), 1000.0, dtype=torch.float16)
    assert theirs.half().eval()(x).tolist() == [[0, 0]]
    torch.testing.assert_close(ours.half().eval()(x).float(), torch.full((1, 2), 10**0.5), rtol=1e-3, atol=0)


def test_assigning_a_half_checkpoint_narrows_the_statistics():
    state = layer_with(3.0, 2.0).half().state_dict()
    state["0.num_batches_tracked"].fill_(1)
    theirs, ours = layer_with(), layer_with()
    theirs.load_state_dict(state, assign=True)
    load_state_dict(ours, state, assign=True)
    assert theirs[0].running_var.dtype == torch.float16
    assert ours[0].running_var.dtype == torch.float32
    assert ours[0].running_var.tolist() == [2, 2]


@pytest.mark.parametrize("make", [nn.BatchNorm1d, batchnorm.nn.BatchNorm1d])
def test_running_average_in_bfloat16_never_moves(make: Any):
    narrow, kept = layer_with(make=make, momentum=0.001), layer_with(make=make, momentum=0.001)
    keep_float32(kept)
    x = torch.tensor([[-1.0, -1.0], [1.0, 1.0]], dtype=torch.bfloat16)
    for model in (narrow.bfloat16(), kept.bfloat16()):
        for _ in range(300):
            model(x)
    # the variance is 2
    assert narrow[0].running_var.tolist() == [1, 1]
    torch.testing.assert_close(kept[0].running_var, torch.full((2,), 2 - 0.999**300))


@halves
def test_statistics_alone_in_float32_are_refused_by_torchs_layers(dtype: torch.dtype):
    x = torch.randn(4, 2, dtype=dtype)
    theirs = layer_with().to(dtype)
    theirs[0].running_mean, theirs[0].running_var = (b.float() for b in list(theirs[0].buffers())[:2])
    with pytest.raises(RuntimeError, match=r"expected scalar type (Half|BFloat16) but found Float"):
        theirs(x)
    whole = layer_with()
    keep_float32(whole)
    assert whole.to(dtype)(x).dtype == dtype


@halves
@pytest.mark.parametrize("make", [nn.BatchNorm1d, batchnorm.nn.BatchNorm1d])
def test_output_has_the_dtype_of_the_input_and_not_of_the_layer(make: Any, dtype: torch.dtype):
    model, x = layer_with(make=make), torch.randn(4, 2, dtype=dtype)
    assert model(x).dtype == dtype
    assert model[0].running_var.dtype == torch.float32


@pytest.mark.parametrize("make", [nn.BatchNorm1d, batchnorm.nn.BatchNorm1d])
def test_autocast_does_not_run_batch_norm_in_float32(make: Any):
    linear, model, x = nn.Linear(2, 2), layer_with(make=make), torch.randn(4, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(x).dtype == torch.float32
        assert model(linear(x)).dtype == torch.bfloat16
    assert model[0].running_var.dtype == torch.float32
