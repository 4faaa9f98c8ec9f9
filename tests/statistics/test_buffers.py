"""Statistics copied into averaged models, and reset after the meta device."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import batchnorm.nn
from batchnorm.statistics import copy_running_stats, recalibrate, reset_running_stats

BUFFERS = {"running_mean", "running_var", "running_cov", "num_batches_tracked", "schedule_step"}


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), batchnorm.nn.BatchRenorm1d(4), batchnorm.nn.Whitening1d(4))


def trained(steps: int = 3) -> nn.Module:
    model = network()
    for _ in range(steps):
        model(torch.randn(9, 3) + 2)
    return model


def statistics(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: buffer for name, buffer in model.state_dict().items() if name.rpartition(".")[2] in BUFFERS}


WRAPPERS: dict[str, Any] = {
    "itself": lambda model: model,
    "AveragedModel": AveragedModel,
    "AveragedModel of DataParallel": lambda model: AveragedModel(nn.DataParallel(model)),
    "torch.compile": lambda model: torch.compile(model, backend="eager"),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_copy_finds_the_layers_of_wrapped_models(wrap: Any):
    source, middle, last = trained(), wrap(network()), network()
    weights = {name: p.clone() for name, p in middle.named_parameters()}
    copy_running_stats(source, middle)
    copy_running_stats(middle, last)
    torch.testing.assert_close(statistics(last), statistics(source), rtol=0, atol=0)
    torch.testing.assert_close(dict(middle.named_parameters()), weights, rtol=0, atol=0)


@pytest.mark.parametrize("use_buffers", [False, True])
def test_averaged_model_gets_statistics_and_counters_of_the_trained_one(use_buffers: bool):
    model = network()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=use_buffers)
    for _ in range(5):
        model(torch.randn(9, 3) + 2)
        average.update_parameters(model)
    copy_running_stats(model, average)
    torch.testing.assert_close(statistics(average.module), statistics(model), rtol=0, atol=0)
    assert average.n_averaged == 5


@pytest.mark.parametrize("use_buffers", [False, True])
def test_recalibrated_averaged_model_normalizes_the_population(use_buffers: bool):
    model, data = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), torch.randn(60, 3) + 2
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=use_buffers)
    for step in range(5):
        with torch.no_grad():
            model[0].weight.add_(step)
        model(data[:10])
        average.update_parameters(model)
    assert recalibrate(average, data.split(20)).counts == {"module.1": 60}
    output = average.eval()(data)
    torch.testing.assert_close(output.mean(0), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(output.var(0), torch.ones(4), atol=1e-4, rtol=0)


def test_single_layers_are_copied_too():
    source, target = nn.BatchNorm2d(3), AveragedModel(batchnorm.nn.BatchNorm2d(3))
    source(torch.randn(2, 3, 4, 4))
    copy_running_stats(source, target)
    assert target.module.running_var.equal(source.running_var)


def test_half_precision_copy_rounds_the_statistics_once():
    source, target = trained(), network().bfloat16()
    copy_running_stats(source, target)
    assert target[1].running_mean.equal(source[1].running_mean.bfloat16())


OTHERS: dict[str, tuple[nn.Module, str]] = {
    "fewer layers": (nn.Sequential(nn.BatchNorm1d(4)), "differ in layer '1': the source has .*the target none"),
    "another width": (nn.ModuleDict({"1": nn.BatchNorm1d(4), "2": batchnorm.nn.BatchRenorm1d(5),
                                     "3": batchnorm.nn.Whitening1d(4)}), r"layer '2': .*target {'running_mean': \(5,"),
    "another group size": (nn.Sequential(*network()[:3], batchnorm.nn.Whitening1d(4, group_size=2)),
                           r"in layer '3': .*'running_cov': \(2, 2, 2\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHERS)
def test_models_that_differ_are_refused_and_nothing_is_copied(case: str):
    target, message = OTHERS[case]
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(ValueError, match=message):
        copy_running_stats(trained(), target)
    torch.testing.assert_close(dict(target.state_dict()), dict(before), rtol=0, atol=0)


def test_reset_gives_statistics_and_counters_of_a_new_model():
    model = trained()
    weight = model[0].weight.clone()
    assert reset_running_stats(model) == ["1", "2", "3"]
    torch.testing.assert_close(statistics(model), statistics(network()), rtol=0, atol=0)
    assert model[0].weight.equal(weight)


def test_reset_of_a_pattern_leaves_the_other_layers():
    model = trained()
    before = copy.deepcopy(statistics(model))
    assert reset_running_stats(model, pattern=["2"]) == ["2"]
    assert model[2].schedule_step == 0
    assert {name for name, buffer in statistics(model).items() if not buffer.equal(before[name])} == {
        "2.running_mean", "2.running_var", "2.num_batches_tracked", "2.schedule_step"
    }  # fmt: skip


def test_reset_skips_layers_without_statistics_and_resets_those_whose_flag_was_turned_off():
    model = nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False), *trained()[1:2])
    model[1].track_running_stats = False
    assert reset_running_stats(model) == ["1"]
    assert model[1].num_batches_tracked == 0


@pytest.mark.parametrize(("last", "message"), [
    (nn.BatchNorm1d(4, device="meta"), "layer '4' is on the meta device: call model.to_empty"),
    (nn.LazyBatchNorm1d(), "layer '4' is lazy and has no statistics yet"),
])  # fmt: skip
def test_reset_is_all_or_nothing(last: nn.Module, message: str):
    model = trained().append(last)
    before = copy.deepcopy(statistics(model[:4]))
    with pytest.raises(ValueError, match=message):
        reset_running_stats(model)
    torch.testing.assert_close(statistics(model[:4]), before, rtol=0, atol=0)


def test_no_layer_matching_is_an_error():
    with pytest.raises(ValueError, match="no batch normalization layer matches 'layer9"):
        reset_running_stats(network(), pattern="layer9*")
