"""Rules that run the model on data: each finds its injected faults and leaves healthy models, and all models, alone."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import batchnorm
from batchnorm.doctor.examine import examine
from doctor.live_networks import Paths
from examined import NORMS, batches, found, layers_of, network, snapshot, trained

both = pytest.mark.parametrize("norm", NORMS, ids=["torch", "ours"])
DATA_RULES = ["BN108", "BN205", "BN206"]


@both
def test_healthy_model_has_no_finding(norm):
    model, data = trained(norm), batches()
    assert [found(code, model, data) for code in DATA_RULES] == [[]] * 3
    assert [found(code, model.train(), data) for code in DATA_RULES] == [[]] * 3
    assert not [one for one in found("BN207", model.eval(), data) if one.severity != "info"]


@both
def test_statistics_that_are_off_are_found_where_they_are(norm):
    model, data = trained(norm), batches()
    model[3].weight.data *= 3
    (finding,) = found("BN108", model, data)
    assert (finding.layer, finding.severity, finding.safe) == ("4", "warning", False)
    assert finding.measured["var_factor"] == pytest.approx(9, rel=0.3)
    model = trained(norm)
    model[9].running_mean += 2 * model[9].running_var.sqrt()
    (finding,) = found("BN108", model, data)
    assert finding.layer == "9"
    assert finding.measured["mean_off"] == pytest.approx(2, rel=0.2)
    assert finding.measured["output_off"] == pytest.approx(2, rel=0.2)
    model = trained(norm)
    model[1].running_var[2:] *= 10
    assert found("BN108", model, data)[0].measured["channels"] == 4


@both
def test_new_and_recalibrated_statistics(norm):
    model, data = network(norm), batches()
    assert {"4", "9"} <= {*layers_of(found("BN108", model, data))}
    batchnorm.recalibrate(model, data)
    assert found("BN108", model, data) == []
    batchnorm.reset_running_stats(model)
    batchnorm.freeze(model)
    assert found("BN108", model, data) == []


@both
def test_other_data_make_statistics_stale_and_few_samples_do_not(norm):
    model = trained(norm)
    assert layers_of(found("BN108", model, [3 * x + 4 for x in batches()]))[0] == "1"
    for few in ([batches()[0][:4]], [batches()[0][:2], batches()[1][:2]], batches(2, 8), batches(1), batches(4, 8)):
        assert found("BN108", model, few) == []


@both
def test_infinite_statistics_are_left_to_other_rules(norm):
    model = trained(norm)
    model[1].running_mean[0], model[1].running_var[1], model[4].running_var[2] = float("nan"), float("inf"), -1.0
    assert found("BN108", model, batches()) == []


@both
def test_calls_per_forward_are_counted(norm):
    findings = found("BN205", Paths(norm), [torch.randn(64, 3)] * 2)
    assert [(finding.layer, finding.severity) for finding in findings] == [("shared", "info"), ("unused", "info")]
    assert findings[0].measured["calls"] == 2
    for second in (lambda x: x + 5, lambda x: 4 * x):
        finding = found("BN205", Paths(norm, second), [torch.randn(64, 3)] * 2)[0]
        assert (finding.layer, finding.severity) == ("shared", "warning")


@both
def test_shared_layer_with_other_inputs_evaluates_wrong(norm):
    model = Paths(norm, lambda x: x + 5)
    for _ in range(100):
        model(torch.randn(64, 3))
    x = torch.randn(640, 3)
    by_batch, by_running = model(x), model.eval()(x)
    assert (by_batch - by_running).abs().mean() > 1


@both
def test_layer_of_one_name_in_two_places_is_one_layer(norm):
    layer = norm.BatchNorm1d(3)
    assert layers_of(found("BN205", nn.Sequential(layer, nn.ReLU(), layer), [torch.randn(8, 3)])) == ["0"]
    assert found("BN205", nn.Sequential(layer, nn.ReLU(), norm.BatchNorm1d(3)), [torch.randn(8, 3)]) == []


@pytest.mark.parametrize(("ratio", "severity"), [(3e3, "info"), (1e5, "warning"), (1e6, "warning")])
def test_digits_lost_are_measured(ratio, severity):
    x = torch.randn(64, 2, 14, 14)
    x[:, 1] += ratio
    (finding,) = found("BN206", nn.Sequential(nn.BatchNorm2d(2)), [x])
    assert finding.severity == severity
    assert finding.measured["mean_by_std"] == pytest.approx(ratio, rel=0.05)
    exact = F.batch_norm(x.double(), None, None, training=True)
    error = (F.batch_norm(x, None, None, training=True).double() - exact).abs().max().item()
    assert finding.measured["loss"] == pytest.approx(error, rel=0.5)


def test_digits_are_not_lost_below_the_limit_nor_in_our_layers():
    x = torch.randn(64, 2, 14, 14)
    x[:, 1] += 900
    assert found("BN206", nn.BatchNorm2d(2), [x]) == []
    x[:, 1] += 1e5
    assert found("BN206", batchnorm.nn.BatchNorm2d(2), [x]) == []
    assert found("BN206", nn.BatchNorm2d(2), [torch.zeros(8, 2, 3, 3)]) == []
    assert found("BN206", nn.BatchNorm2d(2), [torch.full((8, 2, 3, 3), float("inf"))]) == []


@both
def test_gap_between_training_and_evaluation_names_the_layer(norm):
    data = batches()
    model = trained(norm)
    model[3].weight.data *= 4
    (finding,) = found("BN207", model, data)
    assert (finding.severity, finding.layer) == ("warning", "")
    assert finding.measured["layers"][0]["layer"] == "4"
    assert "4: stale average" in finding.message
    (finding,) = found("BN207", network(norm), data)
    assert {one["cause"] for one in finding.measured["layers"]} == {"initial values left over"}
    model = trained(norm)
    model[1].running_var[0] = float("nan")
    (finding,) = found("BN207", model, data)
    assert finding.measured["gap"] is None
    assert "1: not finite" in finding.message


@both
def test_noise_alone_is_information(norm):
    model = trained(norm)
    findings = found("BN207", model, [x[:4] for x in batches()])
    assert [finding.severity for finding in findings] == ["info"]
    batchnorm.freeze(model)
    assert found("BN207", model, [x[:4] for x in batches()]) == []


def test_batches_of_one_sample_are_no_reason_to_fail():
    model, alone = trained(), batches(5, 1)
    assert [found(code, model, alone) for code in [*DATA_RULES, "BN207"]] == [[]] * 4
    model[3].weight.data *= 3
    assert layers_of(found("BN108", model, [*batches(), *alone])) == ["4"]


@pytest.mark.parametrize("code", [*DATA_RULES, "BN207"])
def test_model_is_as_before_after_an_error_in_the_middle(code):
    model, data = trained(), batches()
    calls = []

    def failing(model, item):
        calls.append(item)
        output = model(item)
        if len(calls) == 6:
            raise ConnectionError("in the middle")
        return output

    before = snapshot(model)
    if code in ("BN205", "BN206"):
        data = data + data
    with pytest.raises(ConnectionError, match="in the middle"):
        examine(model, data, select=code, call=failing)
    assert snapshot(model) == before


def test_empty_loader_is_one_clear_line():
    with pytest.raises(ValueError, match="the loader yielded nothing: give at least one batch"):
        examine(trained(), [], select="BN205")


def test_shuffled_loader_has_the_order_it_would_have_had():
    def order(look: bool):
        generator = torch.Generator().manual_seed(3)
        loader = DataLoader(TensorDataset(batches()[0]), 8, shuffle=True, generator=generator)
        if look:
            examine(trained(), loader, select=["BN108", "BN207"])
        return torch.cat([x for (x,) in loader])

    assert torch.equal(order(True), order(False))


def test_dropout_is_off_and_call_decides_what_the_model_gets():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers, self.drop = trained(), nn.Dropout(0.9)

        def forward(self, x, scale):
            return self.layers(self.drop(x) * scale)

    model = Scaled().train()
    items = [{"x": x / 2, "scale": 2.0} for x in batches()]
    assert found("BN108", model, items, call=lambda model, item: model(**item)) == []
    assert layers_of(found("BN108", model, items, call=lambda model, item: model(item["x"], 20.0)))[0] == "layers.1"
