"""Rules BN100 to BN104: what they say, how gravely, and whether what they predict comes true in torch."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from batchnorm.doctor.checkpoint import Checkpoint
from batchnorm.doctor.examine import examine
from batchnorm.doctor.finding import Severity
from doctor.layers_by_hand import findings_of, make_layer
from doctor.networks import Network, seeded, trained

LOST = {"running_mean": None, "running_var": None, "num_batches_tracked": None}
NEW = {"running_mean": [0.0, 0.0], "running_var": [1.0, 1.0], "num_batches_tracked": 0}
UNTOUCHED = {**NEW, "weight": [1.0, 1.0], "bias": [0.0, 0.0]}


class TestMissingStatistics:
    def test_what_a_graph_says_should_be_there_is_certain(self):
        [finding] = findings_of("BN100", make_layer(framework="tensorflow", **LOST))
        assert (finding.severity, finding.confidence) == (Severity.ERROR, "certain")
        assert finding.message.startswith("moving_mean and moving_variance are missing")
        assert "var_list" in finding.remedy
        assert finding.safe is False

    def test_a_name_alone_is_likely_if_no_layer_has_statistics(self):
        found = findings_of("BN100", make_layer("bn1", sure=False, **LOST), make_layer("bn2", sure=False, **LOST))
        assert [(finding.severity, finding.confidence) for finding in found] == [(Severity.ERROR, "likely")] * 2

    def test_a_name_alone_is_possible_beside_layers_with_statistics(self):
        [finding] = findings_of("BN100", make_layer("bn1", sure=False, **LOST), make_layer("bn2"))
        assert (finding.layer, finding.severity, finding.confidence) == ("bn1", Severity.WARNING, "possible")

    def test_a_layer_of_which_nothing_is_left_is_reported(self):
        [finding] = findings_of("BN100", make_layer(framework="keras", weight=None, bias=None, **LOST))
        assert finding.measured == {"missing": ["moving_mean", "moving_variance"], "num_features": 2}

    def test_a_lost_weight_that_the_configuration_promises_is_reported(self):
        layer = make_layer(framework="keras", weight=None, expected=("weight", "running_mean", "running_var"))
        [finding] = findings_of("BN100", layer)
        assert finding.measured["missing"] == ["gamma"]

    def test_a_lost_counter_is_another_rules(self):
        assert not findings_of("BN100", make_layer(num_batches_tracked=None, expected=("num_batches_tracked",)))

    def test_what_it_predicts_happens(self):
        model = trained()
        state = dict(model.bn1.named_parameters())
        [finding] = [finding for finding in examine({"bn1": state}).findings if finding.code == "BN100"]
        weight = state["weight"]
        assert f"multiplies its raw input by weight ({weight.min():.3g} to {weight.max():.3g})" in finding.message
        layer = nn.BatchNorm2d(8).eval()
        layer.load_state_dict(state, strict=False)
        x = torch.randn(2, 8, 3, 3)
        raw = x * weight.view(-1, 1, 1) + state["bias"].view(-1, 1, 1)
        torch.testing.assert_close(layer(x), raw, rtol=1e-4, atol=1e-5)

    def test_a_model_built_without_statistics_is_told_apart_by_metadata_alone(self):
        # the false positive that the page names
        state = seeded(lambda: Network(lambda c: nn.BatchNorm2d(c, track_running_stats=False))).state_dict()
        for found, severity, confidence in ((state, "warning", "possible"), (dict(state), "error", "likely")):
            findings = examine(found).findings
            assert {(finding.severity, finding.confidence) for finding in findings} == {(severity, confidence)}


class TestInitialStatistics:
    @pytest.mark.parametrize(
        ("changes", "severity", "confidence"),
        [
            pytest.param({"num_batches_tracked": 7}, Severity.ERROR, "certain", id="counted"),
            pytest.param({}, Severity.ERROR, "likely", id="trained parameters"),
            pytest.param({"weight": None}, Severity.ERROR, "likely", id="trained bias"),
            pytest.param({"bias": None}, Severity.ERROR, "likely", id="trained weight"),
            pytest.param({"num_batches_tracked": None}, Severity.WARNING, "possible", id="torch without counters"),
            pytest.param(UNTOUCHED, Severity.INFO, "likely", id="untouched"),
            pytest.param({**UNTOUCHED, "weight": [1.02, 0.97]}, Severity.INFO, "likely", id="random weight"),
            pytest.param({**UNTOUCHED, "weight": [0.0, 0.0]}, Severity.INFO, "likely", id="zero weight"),
            pytest.param({"weight": None, "bias": None}, Severity.INFO, "likely", id="no parameters"),
        ],
    )
    def test_severity_follows_what_shows_training(self, changes: dict, severity: Severity, confidence: str):
        [finding] = findings_of("BN101", make_layer(**{**NEW, **changes}))
        assert (finding.severity, finding.confidence) == (severity, confidence)

    def test_tensorflow_has_no_counters_to_wait_for(self):
        [finding] = findings_of("BN101", make_layer(framework="tensorflow", **{**NEW, "num_batches_tracked": None}))
        assert finding.severity == Severity.ERROR
        assert finding.message.startswith("moving_mean is 0 and moving_variance 1 in all 2 channels")

    def test_a_layer_that_training_never_reached_is_a_warning(self):
        [finding] = findings_of("BN101", make_layer("unused", **UNTOUCHED), make_layer("used"))
        assert (finding.layer, finding.severity) == ("unused", Severity.WARNING)
        assert "never reached" in finding.message

    @pytest.mark.parametrize(
        "changes",
        [{}, {"running_mean": [0.0, 1e-30]}, {"running_var": [1.0, 1 - 1e-5]}, {"running_var": None}],
        ids=["trained", "a mean that moved", "frozen by detectron2", "missing"],
    )
    def test_anything_else_is_none(self, changes: dict):
        assert not findings_of("BN101", make_layer(**{**NEW, **changes} if changes else {}))

    def test_the_state_before_training_may_lie_beside_the_one_after(self):
        layers = [make_layer("before.bn", **UNTOUCHED), make_layer("after.bn")]
        checkpoint = Checkpoint("", "torch", {}, layers, facts={"state_dicts": ["before", "after"]})
        [finding] = findings_of("BN101", *layers, checkpoint=checkpoint)
        assert finding.severity == Severity.INFO

    def test_the_predicted_scale_is_that_of_the_outputs(self):
        [finding] = findings_of("BN101", make_layer("lost", **NEW), make_layer("peer", running_var=[0.16, 0.16]))
        assert "outputs are 0.4 times as large as in training" in finding.message
        x = torch.randn(1000, 1, dtype=torch.float64) * 0.4
        with_new, with_own = (
            F.batch_norm(x, torch.zeros(1).double(), torch.tensor([var]).double()).std() for var in (1.0, 0.16)
        )
        assert (with_new / with_own).item() == pytest.approx(0.4, rel=1e-4)


class TestImpossibleStatistics:
    def test_predicted_outcomes_are_those_of_torch(self):
        means = [0.0, math.nan, math.inf, -math.inf]
        variances = [1.0, 0.0, -1.0, -1e-6, math.nan, math.inf]
        cases = list(itertools.product(means, variances, [1.0, 0.0, -2.0]))
        mean, var, weight = (torch.tensor(column, dtype=torch.float64) for column in zip(*cases, strict=True))
        bias = torch.full_like(mean, 0.5)
        x = torch.tensor([[-1.0], [2.0]], dtype=torch.float64).repeat(1, len(cases))
        output = F.batch_norm(x, mean, var, weight, bias, eps=1e-5).numpy()
        for i, case in enumerate(cases):
            layer = make_layer(eps=1e-5, running_mean=[case[0]], running_var=[case[1]], weight=[case[2]], bias=[0.5])
            found = findings_of("BN102", layer)
            if np.isfinite(case[0]) and case[1] >= 0 and np.isfinite(case[1]):
                assert not found
            elif np.isnan(output[:, i]).any():
                assert "output is NaN" in found[0].message, case
            elif np.isinf(output[:, i]).any():
                assert "output is infinite" in found[0].message, case
            elif case[1] == math.inf:
                assert "the constant bias" in found[0].message, case
                assert (output[:, i] == 0.5).all()
            else:
                assert "is finite in" in found[0].message, case
            assert all(
                (finding.severity == Severity.WARNING) == ("is finite in" in finding.message) for finding in found
            )

    def test_channels_are_counted_and_named(self):
        values = np.ones(20)
        values[[3, 11]] = math.nan
        [finding] = findings_of(
            "BN102", make_layer(weight=None, bias=None, running_mean=np.zeros(20), running_var=values)
        )
        assert "running_var is NaN in 2 of 20 channels (3, 11)" in finding.message
        assert finding.measured["channels"] == [3, 11]

    def test_eps_decides_what_a_small_negative_variance_becomes(self):
        layers = [make_layer(str(eps), eps=eps, running_var=[-1e-4, 1.0]) for eps in (1e-5, 1e-3)]
        assert [finding.severity for finding in findings_of("BN102", *layers)] == [Severity.ERROR, Severity.WARNING]

    def test_tensorflows_eps_is_assumed_for_its_layers(self):
        [finding] = findings_of("BN102", make_layer(framework="tensorflow", running_var=[-1e-4, 1.0]))
        assert "doctor --fix --unsafe-fixes --statistics" in finding.remedy
        assert "eps 0.001, assumed" in finding.message

    def test_a_mean_alone_is_examined_too(self):
        [finding] = findings_of("BN102", make_layer(running_mean=[math.inf, 0.0], running_var=None))
        assert finding.severity == Severity.ERROR


class TestCollapsedVariance:
    @pytest.mark.parametrize(
        ("changes", "high"),
        [
            ({"running_var": [0.0, 1.0]}, True),
            ({"running_var": [0.0, 1.0], "eps": 1e-3}, False),
            ({"running_var": [0.0, 1.0], "framework": "keras"}, False),
            ({"running_var": [0.0, 1.0], "weight": [0.0, 1.0]}, False),
            ({"running_var": [0.0, 1.0], "weight": None}, True),
            ({"running_var": [1.0, 1.0], "weight": [1.0, -101.0]}, True),
            ({"running_var": [1e-4, 1.0], "weight": [1.0, 1.0]}, False),
            ({"running_var": [-1e-6, math.nan]}, False),
            ({}, False),
        ],
    )
    def test_the_factor_of_evaluation_decides(self, changes: dict, high: bool):
        assert bool(findings_of("BN103", make_layer(**changes))) == high

    def test_the_factor_is_that_of_torch(self):
        [finding] = findings_of("BN103", make_layer(running_var=[1e-7, 1.0], eps=1e-5))
        layer = nn.BatchNorm1d(2).eval().double()
        layer.load_state_dict(
            {"running_var": torch.tensor([1e-7, 1.0]), "weight": torch.tensor([0.9, 1.1])}, strict=False
        )
        factor = (layer(torch.ones(1, 2).double()) - layer(torch.zeros(1, 2).double()))[0, 0].item()
        assert finding.measured["largest_factor"] == pytest.approx(factor, rel=1e-5)
        assert finding.severity == Severity.INFO


class TestDeadChannels:
    @pytest.mark.parametrize(
        ("weight", "dead"),
        [([0.0, 1.0], 1), ([1e-20, -1e-6], 2), ([1e-3, 1.0], 0), ([0.0, 0.0], 2), ([math.nan, 1.0], 0), (None, 0)],
    )
    def test_channels_of_weight_about_0_are_counted(self, weight: list[float] | None, dead: int):
        found = findings_of("BN104", make_layer(weight=weight))
        assert sum(finding.measured["dead"] for finding in found) == dead
        assert all(finding.severity == Severity.INFO for finding in found)

    def test_a_whole_layer_of_zeros_is_called_initialization(self):
        [finding] = findings_of("BN104", make_layer(weight=[0.0, 0.0], **NEW))
        assert "initialized so, as the last layer of a residual block" in finding.message
        assert "still" not in finding.message

    def test_zeros_that_outlived_training_are_said(self):
        [finding] = findings_of("BN104", make_layer(weight=[0.0, 0.0]))
        assert finding.message.endswith("After 100 batches it is still 0: it was not trained, or hardly needed.")
