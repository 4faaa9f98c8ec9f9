"""Rules BN105 to BN107 and BN109: counters, types, and what a conversion leaves."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from batchnorm.doctor.checkpoint import Checkpoint, Layer
from batchnorm.doctor.examine import examine
from batchnorm.doctor.finding import Severity
from doctor.layers_by_hand import findings_of, make_layer, stored


def counted(*counts: float | None) -> list[Layer]:
    return [make_layer(f"bn{i}", num_batches_tracked=count) for i, count in enumerate(counts)]


def judged(code: str, layers: list[Layer]) -> dict[str, Severity]:
    return {finding.layer: finding.severity for finding in findings_of(code, *layers)}


class TestOddCounters:
    @pytest.mark.parametrize(
        ("counts", "expected"),
        [
            pytest.param([50, 50, 50], {}, id="equal"),
            pytest.param([None, None], {"": Severity.INFO}, id="absent everywhere"),
            pytest.param([None, 50], {"bn0": Severity.INFO}, id="absent in one"),
            pytest.param([0, 0], {"": Severity.INFO}, id="zero everywhere"),
            pytest.param([0, 50, 50], {"bn0": Severity.INFO}, id="zero in one"),
            pytest.param([-3, 50], {"bn0": Severity.WARNING}, id="negative"),
            pytest.param([math.nan, 50], {"bn0": Severity.WARNING}, id="NaN"),
            pytest.param([math.inf, 50], {"bn0": Severity.WARNING}, id="infinite"),
            pytest.param([0.5, 0.5], {"bn0": Severity.INFO, "bn1": Severity.INFO}, id="fractions"),
            pytest.param([40, 50, 50], {"bn0": Severity.INFO}, id="fewer"),
            pytest.param([150, 50, 50], {"bn0": Severity.INFO}, id="three times"),
            pytest.param([41, 45, 50], {"": Severity.INFO}, id="no usual one"),
            pytest.param([100, 50, 50], {}, id="twice, which is BN106's"),
        ],
    )
    def test_counters_are_held_against_the_usual_one(self, counts: list, expected: dict):
        assert judged("BN105", counted(*counts)) == expected

    def test_an_absent_counter_that_the_metadata_promise_is_a_warning(self):
        layer = make_layer(num_batches_tracked=None, expected=("running_mean", "running_var", "num_batches_tracked"))
        [finding] = findings_of("BN105", layer)
        assert finding.severity == Severity.WARNING

    def test_such_a_file_does_not_load_and_one_without_metadata_does(self):
        state = nn.BatchNorm1d(2).state_dict()
        del state["num_batches_tracked"]
        with pytest.raises(RuntimeError, match="num_batches_tracked"):
            nn.BatchNorm1d(2).load_state_dict(state)
        nn.BatchNorm1d(2).load_state_dict(dict(state))
        assert [[f.severity for f in examine(s, select="BN105").findings] for s in (state, dict(state))] == [
            [Severity.WARNING],
            [Severity.INFO],
        ]

    def test_a_counter_of_0_in_an_untrained_layer_is_right(self):
        assert not findings_of("BN105", make_layer(running_mean=[0, 0], running_var=[1, 1], num_batches_tracked=0))

    @pytest.mark.parametrize("framework", ["tensorflow", "keras"])
    def test_other_frameworks_have_no_counters(self, framework: str):
        assert not findings_of("BN105", make_layer(framework=framework, num_batches_tracked=None))

    def test_a_moving_average_may_have_counted_less(self):
        layers = [make_layer("model.bn", num_batches_tracked=500), make_layer("ema.bn", num_batches_tracked=1)]
        checkpoint = Checkpoint("", "torch", {}, layers, facts={"state_dicts": ["model", "ema"]})
        assert not findings_of("BN105", *layers, checkpoint=checkpoint)
        assert findings_of("BN105", *layers)

    def test_a_frozen_layer_of_a_live_model_needs_no_counter(self):
        class Frozen(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.running_mean, self.running_var = nn.Buffer(torch.ones(2)), nn.Buffer(torch.ones(2))

        assert not examine(nn.Sequential(Frozen()), select="BN105").findings
        assert examine(nn.Sequential(Frozen()).state_dict(), select="BN105").findings


class TestDoubledCounter:
    @pytest.mark.parametrize(
        ("counts", "doubled"),
        [
            ([50, 50, 100], ["bn2"]),
            ([100, 100, 50], ["bn0", "bn1"]),
            ([1000, 2006, 1985], ["bn1", "bn2"]),
            ([1000, 2100], []),
            ([5, 10], []),
            ([50, 150], []),
            ([50, math.nan, math.inf, -100], []),
            ([0, 0], []),
            ([50, 100, 200], ["bn1", "bn2"]),
            ([None, 100], []),
        ],
    )
    def test_layers_of_twice_the_count_are_found(self, counts: list, doubled: list[str]):
        assert list(judged("BN106", counted(*counts))) == doubled

    def test_two_updates_act_as_the_momentum_that_it_says(self):
        layer = nn.BatchNorm1d(1)
        x = torch.tensor([[9.0], [11.0]], requires_grad=True)
        checkpoint(layer, x, use_reentrant=False).sum().backward()
        assert (layer.num_batches_tracked.item(), layer.running_mean.item()) == (2, pytest.approx(0.19 * 10))
        [finding] = findings_of("BN106", *counted(50, 100))
        assert "momentum 0.1 (the default) acts as 0.19" in finding.message
        assert (finding.severity, finding.confidence) == (Severity.WARNING, "possible")

    def test_a_known_momentum_is_used(self):
        layers = [make_layer("once", num_batches_tracked=50), make_layer("bn", num_batches_tracked=100, momentum=0.5)]
        assert "momentum 0.5 acts as 0.75" in findings_of("BN106", *layers)[0].message


class TestNarrowStatistics:
    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    @pytest.mark.parametrize("offset", [0.0, 60.0])
    def test_rounding_stays_within_the_bounds_that_it_says(self, dtype: str, offset: float):
        exact_mean = torch.randn(500).double() + offset
        exact_var = torch.rand(500).double() ** 8 + 1e-9
        mean, var = (tensor.to(getattr(torch, dtype)) for tensor in (exact_mean, exact_var))
        state = {"running_mean": mean, "running_var": var}
        [finding] = [finding for finding in examine(state).findings if finding.code == "BN107"]
        shift, scale = finding.measured["largest_shift_in_std"], finding.measured["largest_change_of_scale"]
        at_mean = F.batch_norm(exact_mean[None], mean.double(), var.double())[0]
        assert 0.2 * shift < at_mean.abs().max() <= shift * (1 + 1e-5)
        ratio = ((exact_var + 1e-5) / (var.double() + 1e-5)).sqrt()
        assert 0.2 * scale < (ratio - 1).abs().max() <= scale * (1 + 1e-5)
        assert finding.severity == Severity.WARNING
        assert finding.safe is True

    def test_what_left_the_range_is_counted(self):
        var = torch.tensor([1e5, 1e-9, 1.0]).half()
        [finding] = [
            finding
            for finding in examine({"running_mean": torch.zeros(3).half(), "running_var": var}).findings
            if finding.code == "BN107"
        ]
        assert (finding.measured["infinite_variances"], finding.measured["zero_variances"]) == (1, 1)

    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    def test_wider_types_are_none(self, dtype: str):
        assert not findings_of("BN107", make_layer(dtype=dtype))

    def test_half_precision_parameters_with_float32_statistics_are_none(self):
        layer = nn.BatchNorm1d(3)
        layer.weight.data, layer.bias.data = layer.weight.data.half(), layer.bias.data.half()
        assert not examine(layer, select="BN107").findings

    def test_a_tiny_eps_and_variances_of_0_give_numbers(self):
        layer = make_layer(dtype="float16", running_mean=[0.0, 1.0], running_var=[0.0, 0.0], eps=0.0)
        assert findings_of("BN107", layer)[0].measured["zero_variances"] == 2

    def test_a_rounding_that_changes_nothing_is_not_spoken_of(self):
        # found by fuzzing: the means are exact, and the error of a variance of 0 is far below eps
        state = {"running_mean": torch.zeros(3), "running_var": torch.zeros(3).bfloat16()}
        [finding] = [finding for finding in examine(state).findings if finding.code == "BN107"]
        assert "Rounding" not in finding.message
        assert finding.measured["largest_change_of_scale"] == 0


class TestConvertedModel:
    @pytest.mark.parametrize("framework", ["torch", "keras"])
    @pytest.mark.parametrize(
        ("momentum", "confidence"),
        [(0.99, "likely"), (0.9, "likely"), (0.5, "possible"), (1.0, "possible"), (0.1, None), (None, None)],
    )
    def test_a_new_batch_that_outweighs_the_average_is_suspicious(self, framework, momentum, confidence):
        found = findings_of("BN109", make_layer(momentum=momentum, framework=framework))
        assert [finding.confidence for finding in found] == ([confidence] if confidence else [])

    def test_the_last_batch_has_the_share_that_it_says(self):
        layer = nn.BatchNorm1d(1, momentum=0.99)
        for value in (0.0, 100.0):
            layer(torch.tensor([[value], [value]]))
        assert layer.running_mean.item() == pytest.approx(99)
        assert "makes up 99%" in findings_of("BN109", make_layer(momentum=0.99))[0].message

    @pytest.mark.parametrize(
        ("changes", "converted"),
        [
            ({"eps": 1e-3, "num_batches_tracked": 0}, True),
            ({"eps": 1e-3, "num_batches_tracked": None}, True),
            ({"eps": np.float32(1e-3).item(), "num_batches_tracked": 0}, True),
            ({"eps": 1e-3}, False),
            ({"eps": 1e-5, "num_batches_tracked": 0}, False),
            ({"num_batches_tracked": 0}, False),
            ({"eps": 1e-3, "num_batches_tracked": 0, "running_mean": [0, 0], "running_var": [1, 1]}, False),
            ({"eps": 1e-3, "num_batches_tracked": 0, "framework": "keras"}, False),
            ({"eps": 1e-3, "num_batches_tracked": 0, "running_var": [math.nan, -1.0]}, False),
        ],
    )
    def test_the_eps_of_keras_with_statistics_that_nobody_measured(self, changes: dict, converted: bool):
        found = findings_of("BN109", make_layer(**changes))
        assert [finding.severity for finding in found] == [Severity.INFO] * converted

    def test_the_wrong_eps_would_scale_as_it_says(self):
        [finding] = findings_of("BN109", make_layer(eps=1e-3, num_batches_tracked=0, running_var=[1e-5, 1.0]))
        x, mean, var = torch.ones(1, 1), torch.zeros(1), torch.tensor([1e-5])
        factor = F.batch_norm(x, mean, var, eps=1e-5) / F.batch_norm(x, mean, var, eps=1e-3)
        assert finding.measured["factor"] == pytest.approx(factor.item(), rel=1e-4)

    @pytest.mark.parametrize("name", ["bn/moving_mean:0", "bn.moving_variance", "moving_mean"])
    def test_names_that_torch_does_not_load(self, name: str):
        tensors = {name: stored(name, [1.0], "float32")}
        assert findings_of("BN109", checkpoint=Checkpoint("", "safetensors", tensors, []))
        assert not findings_of("BN109", checkpoint=Checkpoint("", "tensorflow", tensors, []))
        harmless = {"my_moving_mean": stored("my_moving_mean", [1.0], "float32")}
        assert not findings_of("BN109", checkpoint=Checkpoint("", "safetensors", harmless, []))
