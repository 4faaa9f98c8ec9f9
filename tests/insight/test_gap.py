"""explain_gap: the gap is that of two runs of the model, and causes that were injected are named."""

import pytest
import torch
from torch import nn

import batchnorm
import batchnorm.nn
from batchnorm.insight import explain_gap
from examined import NORMS, after, batches, network, snapshot, trained

both = pytest.mark.parametrize("norm", NORMS, ids=["torch", "ours"])


def causes(model: nn.Module, data: list, **options) -> dict[str, str]:
    return {one.name: one.cause for one in explain_gap(model, data, **options).layers}


@both
def test_gap_is_that_of_training_and_evaluation(norm):
    model, data = after(5, norm), batches()
    gap = explain_gap(model, data)
    with torch.no_grad():
        evaluated = torch.cat([model(x) for x in data]).double()
        batchnorm.normalize_by(model, "batch")
        by_batch = torch.cat([model(x) for x in data]).double()
    expected = (evaluated - by_batch).square().mean().sqrt() / by_batch.std(correction=0)
    assert gap.gap == pytest.approx(expected.item(), rel=1e-5)
    assert gap.disagreement == (evaluated.argmax(1) != by_batch.argmax(1)).double().mean().item()
    assert (gap.batches, gap.samples) == (4, 128)


@both
def test_change_is_that_of_one_layer_by_its_batches(norm):
    model, data = after(5, norm), batches()
    layer = next(one for one in explain_gap(model, data).layers if one.name == "4")
    with torch.no_grad():
        evaluated = torch.cat([model(x) for x in data]).double()
        batchnorm.normalize_by(model, "batch", "4")
        swapped = torch.cat([model(x) for x in data]).double()
        batchnorm.normalize_by(model, "batch")
        spread = torch.cat([model(x) for x in data]).double().std(correction=0)
    assert layer.change == pytest.approx(((swapped - evaluated).square().mean().sqrt() / spread).item(), rel=1e-5)


@both
def test_model_is_as_before(norm):
    for model in (trained(norm), network(norm)):
        before = snapshot(model)
        explain_gap(model, batches(2))
        assert snapshot(model) == before


@both
def test_injected_causes_are_named(norm):
    data = batches()
    assert set(causes(network(norm), data).values()) == {"initial values left over"}
    assert set(causes(after(4, norm), data).values()) == {"initial values left over"}
    assert set(causes(trained(norm), data).values()) == {"sampling noise"}
    moved = trained(norm)
    moved[3].weight.data *= 3
    assert causes(moved, data) == {"1": "sampling noise", "4": "stale average", "9": "inherited"}
    for value in (float("nan"), float("inf"), -1.0):
        broken = trained(norm)
        broken[4].running_var[1] = value
        assert causes(broken, data)["4"] == "not finite"
    assert causes(trained(norm), [x[:4] for x in data])["9"] == "few values"


@both
def test_only_a_layer_that_no_weights_precede_tells_other_data(norm):
    model, data = nn.Sequential(norm.BatchNorm2d(3), *network(norm)), batches()
    batchnorm.recalibrate(model, data)
    other = [2 * x - 3 for x in data]
    found = causes(model, other)
    assert found["0"] == "other data"
    # which the first layer takes out again, where layers normalize by their batches
    assert "stale average" not in found.values()
    assert causes(trained(norm), other)["1"] == "stale average"


@both
def test_layer_at_fault_comes_first_and_without_it_the_gap_is_gone(norm):
    model, data = trained(norm), batches()
    model[4].running_mean += 5 * model[4].running_var.sqrt()
    gap = explain_gap(model, data)
    assert gap.layers[0].name == "4"
    assert gap.layers[0].gap_left < 0.3 < 1 < gap.gap
    assert gap.layers[0].mean_off == pytest.approx(5, rel=0.1)
    batchnorm.recalibrate(model, data)
    assert explain_gap(model, data).gap < 0.3


@both
def test_no_layer_is_looked_at_below_what_is_worth_it(norm):
    model, calls = trained(norm), []

    def count(model, item):
        calls.append(item)
        return model(item)

    gap = explain_gap(model, batches(2), call=count, worth=100.0)
    assert (gap.layers, len(calls)) == ((), 4)
    explain_gap(model, batches(2), call=count)
    assert len(calls) == 4 + 2 * (2 + 3)


def test_frozen_and_chosen_layers_have_no_gap():
    model, data = trained(), batches()
    batchnorm.freeze(model, "1")
    batchnorm.normalize_by(model, "running", "4")
    assert set(causes(model, data)) == {"9"}
    batchnorm.freeze(model)
    with pytest.raises(ValueError, match="no batch normalization layer that evaluates by running statistics"):
        explain_gap(model, data)


@pytest.mark.parametrize(
    "layer",
    [batchnorm.nn.Whitening1d(3), batchnorm.nn.BatchRenorm1d(3), batchnorm.nn.GhostBatchNorm1d(3, ghost_batch_size=8)],
)
def test_relatives_are_measured_too(layer):
    data = [torch.randn(32, 3) * 3 + 2 for _ in range(3)]
    (one,) = explain_gap(layer, data).layers
    assert one.cause == "initial values left over"
    for step in range(80):
        layer(data[step % 3])
    assert causes(layer, data) == {"": "sampling noise"}


def test_outputs_of_any_kind_are_compared():
    class Many(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x):
            y = self.norm(x)
            return {"ids": torch.arange(3), "states": [x, y.sum(1)], "logits": y}

    gap = explain_gap(Many(), [torch.randn(8, 3) + 4])
    assert gap.gap > 1
    assert gap.disagreement is not None

    class Nothing(Many):
        def forward(self, x):
            self.norm(x)

    gap = explain_gap(Nothing(), [torch.randn(8, 3)])
    assert gap.gap != gap.gap
    assert gap.disagreement is None


def test_dropout_is_no_gap_and_random_numbers_are_the_same_in_every_pass():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.drop = nn.BatchNorm1d(3, momentum=1.0), nn.Dropout()

        def forward(self, x):
            return self.drop(self.norm(x)) + torch.randn(3)

    data = torch.randn(64, 3)
    model = Noisy()
    model(data)
    assert explain_gap(model, [data]).gap < 0.05


def test_compiled_and_parallel_models_are_looked_into():
    model, data = trained(), batches(2)
    expected = explain_gap(model, data)
    compiled = torch.compile(model, backend="eager")
    compiled(data[0])
    gap = explain_gap(compiled, data)
    assert gap.gap == pytest.approx(expected.gap)
    assert [one.name for one in gap.layers] == [f"_orig_mod.{one.name}" for one in expected.layers]


def test_what_cannot_be_explained_is_one_clear_line():
    with pytest.raises(ValueError, match="the loader yielded nothing"):
        explain_gap(trained(), [])
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        explain_gap(nn.BatchNorm1d(3), [torch.randn(1, 3)])
    with pytest.raises(ValueError, match="uninitialized parameters: run it once first"):
        explain_gap(nn.Sequential(nn.LazyLinear(3), nn.BatchNorm1d(3)), [torch.randn(4, 3)])


def test_error_in_the_middle_leaves_the_model_as_it_was():
    model, data = trained().train(), batches()
    for failing_call in (1, 5, 9, 12):
        calls = []

        def call(model, item, calls=calls, failing_call=failing_call):
            calls.append(item)
            output = model(item)
            if len(calls) == failing_call:
                raise ConnectionError("in the middle")
            return output

        before = snapshot(model)
        with pytest.raises(ConnectionError, match="in the middle"):
            explain_gap(model, data, call=call)
        assert snapshot(model) == before


def test_table_names_layers_and_causes():
    model = trained()
    model[3].weight.data *= 3
    lines = str(explain_gap(model, batches())).splitlines()
    assert "standard deviations of the output between training and evaluation" in lines[0]
    assert lines[1].split() == ["layer", "change", "gap", "left", "cause", "because"]
    assert lines[2].startswith("4 ")
    assert "stale average" in lines[2]
