"""Rules that look at a live model alone: each finds its injected faults, and not their healthy relatives."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import batchnorm
from batchnorm.doctor.examine import examine
from doctor.live_networks import FunctionalDropout, Teacher
from examined import NORMS, batches, found, layers_of, network, trained

both = pytest.mark.parametrize("norm", NORMS, ids=["torch", "ours"])
MODEL_RULES = ["BN201", "BN202", "BN203", "BN204", "BN208", "BN301", "BN302", "BN304", "BN502", "BN503"]


@both
def test_healthy_model_has_nothing_but_what_can_be_folded(norm):
    model = trained(norm)
    assert [found(code, model) for code in MODEL_RULES] == [[]] * len(MODEL_RULES)
    (finding,) = found("BN501", model)
    assert finding.measured == {"foldable": 2, "layers": ["1", "4"]}
    assert [found(code, model.train()) for code in MODEL_RULES] == [[]] * len(MODEL_RULES)


@both
def test_models_without_batch_normalization_are_examined(norm):
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.LayerNorm(2))
    assert examine(model, [torch.randn(3, 2)], torch.optim.SGD(model.parameters(), 0.1)).findings == []


@both
def test_bias_before_a_layer_is_dead(norm):
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        norm.BatchNorm2d(4),
        nn.ReLU(),
        nn.ConvTranspose2d(4, 4, 3),
        nn.Identity(),
        norm.BatchNorm2d(4),
    )
    findings = found("BN201", model)
    assert layers_of(findings) == ["1", "5"]
    assert [finding.measured["module"] for finding in findings] == ["0", "3"]
    assert findings[0].safe
    model.train()
    model(torch.randn(8, 3, 6, 6)).square().mean().backward()
    assert model[0].bias.grad.abs().max() < 1e-4 * model[0].weight.grad.abs().max()


@both
def test_bias_of_a_linear_layer_is_dead_where_data_show_the_axis(norm):
    model = nn.Sequential(nn.Linear(4, 4), norm.BatchNorm1d(4))
    assert found("BN201", model) == []
    assert layers_of(found("BN201", model, [torch.randn(8, 4)])) == ["1"]
    assert found("BN201", model, [torch.randn(8, 4, 4)]) == []


class TrainingOnly(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), norm.BatchNorm2d(4)

    def forward(self, x):
        y = self.conv(x)
        return self.norm(y.relu() if self.training else y)


class UsedTwice(TrainingOnly):
    def forward(self, x):
        y = self.conv(x)
        return self.norm(y) + y


@both
def test_bias_that_something_else_sees_is_alive(norm):
    conv, layer = nn.Conv2d(3, 4, 1), norm.BatchNorm2d(4)
    for healthy in (
        TrainingOnly(norm),
        UsedTwice(norm),
        nn.Sequential(conv, nn.ReLU(), layer),
        nn.Sequential(conv, nn.Dropout(0.5), layer),
        nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), layer),
    ):
        assert found("BN201", healthy) == []
    frozen = nn.Sequential(conv, layer)
    batchnorm.freeze(frozen)
    assert found("BN201", frozen) == []


@both
@pytest.mark.parametrize("momentum", [0.9, 0.99, 0.999])
def test_momentum_of_other_frameworks_is_certain(norm, momentum):
    (finding,) = found("BN202", norm.BatchNorm1d(3, momentum=momentum))
    assert (finding.confidence, finding.safe) == ("certain", False)
    assert f"{1 - momentum:.3g} was meant" in finding.message


@both
def test_momentum_is_judged_from_one_half_on(norm):
    assert [bool(found("BN202", norm.BatchNorm1d(3, momentum=m))) for m in (0.0, 0.01, 0.1, 0.3, 0.49, None)] == [
        False
    ] * 6
    assert [found("BN202", norm.BatchNorm1d(3, momentum=m))[0].confidence for m in (0.5, 0.7, 1.0)] == ["likely"] * 3
    frozen = norm.BatchNorm1d(3, momentum=0.9)
    batchnorm.freeze(frozen)
    assert found("BN202", frozen) == []


def test_cumulative_average_is_an_error_of_a_full_graph():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3, momentum=None))
    (finding,) = found("BN203", model)
    assert (finding.layer, finding.severity, finding.safe) == ("1", "info", True)
    with pytest.raises(Exception, match="data-dependent"):
        torch.compile(model, fullgraph=True, backend="eager")(torch.randn(4, 2))
    model.compile(backend="eager")
    assert examine(model, select="BN203").findings[0].severity == "warning"


def test_cumulative_average_of_ours_and_other_averages_compile():
    ours = batchnorm.nn.BatchNorm1d(3, momentum=None)
    assert found("BN203", ours) == []
    torch.compile(ours, fullgraph=True, backend="eager")(torch.randn(4, 3))
    assert found("BN203", nn.BatchNorm1d(3)) == []
    assert found("BN203", nn.BatchNorm1d(3, momentum=None, track_running_stats=False)) == []


@both
def test_layer_without_running_statistics_is_graver_where_samples_are_alone(norm):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), norm.BatchNorm2d(4, track_running_stats=False)).eval()
    assert [finding.severity for finding in found("BN204", model)] == ["info"]
    assert [finding.severity for finding in found("BN204", model, batches(2, 8))] == ["info"]
    assert [finding.severity for finding in found("BN204", model, batches(3, 1))] == ["warning"]
    assert found("BN204", norm.BatchNorm2d(4), [torch.randn(1, 4, 2, 2)]) == []


@both
def test_dropout_directly_before_a_layer_is_found(norm):
    conv = nn.Conv2d(3, 4, 1)
    cases = [
        (nn.Sequential(conv, nn.ReLU(), nn.Dropout(0.5), norm.BatchNorm2d(4)), "3", 0.5),
        (nn.Sequential(conv, nn.Dropout2d(0.1), nn.Identity(), norm.BatchNorm2d(4)), "3", 0.1),
        (FunctionalDropout(norm), "norm", 0.2),
        (nn.Sequential(nn.Sequential(conv, nn.Dropout(0.3)), norm.BatchNorm2d(4)), "1", 0.3),
    ]
    for model, layer, p in cases:
        (finding,) = found("BN208", model)
        assert (finding.layer, finding.severity, finding.measured["p"]) == (layer, "warning", p)


@both
def test_dropout_shifts_the_variance_as_the_message_says(norm):
    model = nn.Sequential(nn.Dropout(0.5), norm.BatchNorm1d(2, momentum=None))
    assert found("BN208", nn.Sequential(nn.Linear(2, 2), *model))[0].measured["output_scale"] == pytest.approx(
        0.5**0.5, 1e-5
    )
    x = torch.randn(20000, 2)
    model(x)
    assert model.eval()(x).std().item() == pytest.approx(0.5**0.5, rel=0.02)


@both
def test_dropout_elsewhere_and_dropout_that_keeps_variance_are_fine(norm):
    conv = nn.Conv2d(3, 4, 1)
    for healthy in (
        nn.Sequential(conv, norm.BatchNorm2d(4), nn.Dropout(0.5)),
        nn.Sequential(conv, nn.Dropout(0.0), norm.BatchNorm2d(4)),
        nn.Sequential(conv, nn.AlphaDropout(0.5), norm.BatchNorm2d(4)),
        nn.Sequential(nn.Dropout(0.5), conv, norm.BatchNorm2d(4)),
        FunctionalDropout(norm, always=True),
    ):
        assert found("BN208", healthy) == []


@both
def test_layer_in_the_other_mode_is_found(norm):
    model = trained(norm)
    model[4].train()
    (finding,) = found("BN301", model)
    assert (finding.layer, finding.severity) == ("4", "warning")
    model.train()
    model[1].eval()
    (finding,) = found("BN301", model)
    assert (finding.layer, finding.severity, finding.safe) == ("1", "info", True)
    model.eval()
    model[3:5].train()
    assert layers_of(found("BN301", model)) == ["4"]


@both
def test_layers_frozen_on_purpose_are_no_mixture(norm):
    model = trained(norm).train()
    batchnorm.freeze(model, "4")
    assert found("BN301", model) == []
    model = trained(norm).train()
    for layer in (model[1], model[4], model[9]):
        layer.eval()
    assert found("BN301", model) == []
    assert found("BN301", norm.BatchNorm1d(3).eval()) == []


@both
def test_affine_frozen_while_statistics_move(norm):
    model = network(norm)
    model[:5].requires_grad_(False)
    findings = found("BN302", model)
    assert layers_of(findings) == ["1", "4"]
    assert findings[0].safe
    before = model[1].running_mean.clone()
    model(batches(1)[0])
    assert not torch.equal(model[1].running_mean, before)
    model.requires_grad_(False)
    assert layers_of(found("BN302", model)) == ["1", "4", "9"]
    batchnorm.freeze(model, ["1", "4"])
    assert layers_of(found("BN302", model)) == ["9"]


@both
def test_frozen_whole_or_learning_layers_are_not_half_frozen(norm):
    model = network(norm).requires_grad_(False)
    assert found("BN302", model.eval()) == []
    model.train()
    for layer in (model[1], model[4], model[9]):
        layer.weight.requires_grad_(True)
    assert found("BN302", model) == []
    assert found("BN302", norm.BatchNorm1d(3, affine=False)) == []
    assert found("BN302", norm.BatchNorm1d(3, momentum=0.0).requires_grad_(False)) == []


@both
def test_copy_that_follows_parameters_alone_is_found(norm):
    model = Teacher(norm)
    findings = found("BN304", model)
    assert layers_of(findings) == ["teacher.1", "teacher.4", "teacher.9"]
    assert {finding.confidence for finding in findings} == {"likely"}
    batchnorm.copy_running_stats(model.student, model.teacher)
    assert found("BN304", model) == []


@both
def test_average_with_statistics_of_a_new_layer_is_certain(norm):
    model = trained(norm)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    average.update_parameters(model)
    assert found("BN304", average) == []
    batchnorm.reset_running_stats(average)
    findings = found("BN304", average)
    assert layers_of(findings) == ["module.1", "module.4", "module.9"]
    assert {finding.confidence for finding in findings} == {"certain"}
    assert layers_of(found("BN304", nn.ModuleDict({"ema": average}))) == [
        "ema.module.1",
        "ema.module.4",
        "ema.module.9",
    ]


@both
def test_independent_twins_and_new_averages_are_fine(norm):
    twins = nn.ModuleDict({"one": trained(norm), "other": network(norm)})
    assert found("BN304", twins) == []
    assert found("BN304", AveragedModel(network(norm))) == []
    assert found("BN304", nn.ModuleDict({"one": network(norm), "other": network(norm)})) == []
    one = trained(norm)
    assert found("BN304", nn.ModuleDict({"one": one, "other": copy.deepcopy(one)})) == []


@both
def test_hazards_of_folding_are_measured(norm):
    model = trained(norm)
    model[1].running_var[0] = 1e-12
    model[1].eps = 1e-13
    (finding,) = found("BN502", model)
    assert finding.layer == "1"
    assert finding.measured["largest"] > 65504
    model = trained(norm)
    model[4].weight.data[3] = 3e4
    (finding,) = found("BN502", model)
    assert finding.layer == "4"
    assert finding.measured["widest"] > 1e4
    model[1].weight.data[2] = 1e-30
    model[4].weight.data[3] = 0.0
    assert found("BN502", model) == []


@both
def test_what_cannot_be_folded_is_not_counted(norm):
    model = trained(norm)
    assert found("BN501", model, batches())[0].measured["foldable"] == 3
    model.insert(1, nn.ReLU())
    assert found("BN501", model)[0].measured["layers"] == ["5"]
    batchnorm.reset_running_stats(model)
    assert found("BN501", model) == []


@pytest.mark.filterwarnings("ignore::FutureWarning")
@both
def test_graph_exported_in_training_mode_is_found(norm):
    data = batches(1)[0]
    program = torch.export.export(trained(norm).train(), (data,))
    for target in (program, program.module(), program.run_decompositions().module()):
        findings = examine(target, select="BN503").findings
        assert layers_of(findings) == ["1", "4", "9"]
        assert "num_batches_tracked" in findings[0].measured["written"]
    evaluating = torch.export.export(trained(norm), (data,))
    assert examine(evaluating, select="BN503").findings == []
    assert examine(evaluating.run_decompositions(), select="BN503").findings == []


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_graph_of_one_layer_in_training_mode_is_found():
    model = trained()
    model[4].train()
    assert layers_of(examine(torch.export.export(model, (batches(1)[0],)), select="BN503").findings) == ["4"]


def test_graph_that_normalizes_by_a_function_in_training_is_found():
    def forward(x):
        return F.batch_norm(x, None, None, training=True)

    graph = torch.fx.symbolic_trace(nn.Sequential(nn.BatchNorm1d(2)))
    assert found("BN503", graph) == []
    by_function = torch.fx.GraphModule(nn.Module(), torch.fx.Tracer().trace(forward))
    (finding,) = found("BN503", by_function)
    assert finding.measured == {"training": True, "written": []}
