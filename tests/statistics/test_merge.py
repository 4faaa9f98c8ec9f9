"""Merged statistics are those of all data together, from models or state dicts, and bad sources are named."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import batchnorm.nn
from batchnorm.statistics import merge_running_stats, recalibrate

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "torch 1d": (lambda: nn.BatchNorm1d(4), ()),
    "torch 2d": (lambda: nn.BatchNorm2d(4), (3, 2)),
    "ours 3d": (lambda: batchnorm.nn.BatchNorm3d(4), (2, 1, 3)),
    "ghost": (lambda: batchnorm.nn.GhostBatchNorm1d(4, ghost_batch_size=2), ()),
    "whitening": (lambda: batchnorm.nn.Whitening2d(4), (3, 2)),
    "whitening in groups": (lambda: batchnorm.nn.Whitening1d(4, group_size=2), ()),
}
SIZES = [7, 2, 30, 12]


def shards(positions: tuple[int, ...] = (), offset: float = 0.0) -> list[Tensor]:
    """Data whose means differ from shard to shard."""
    return [torch.randn(size, 4, *positions) + offset + 3 * i for i, size in enumerate(SIZES)]


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize(("make", "positions"), LAYERS.values(), ids=LAYERS)
def test_merged_by_counts_equals_the_population(make: Any, positions: tuple[int, ...], offset: float):
    data, models = shards(positions, offset), [nn.Sequential(make()).double() for _ in SIZES]
    counts = [recalibrate(model, [x.double()]).counts for model, x in zip(models, data, strict=True)]
    merged = merge_running_stats(models, counts=counts)
    whole = torch.cat([x.double().movedim(1, -1).reshape(-1, 4) for x in data]).numpy()
    np.testing.assert_allclose(merged["0.running_mean"].numpy(), whole.mean(0), rtol=1e-12)
    if "0.running_var" in merged:
        np.testing.assert_allclose(merged["0.running_var"].numpy(), whole.var(0, ddof=1), rtol=1e-9)
    else:
        cov, d = np.cov(whole.T), models[0][0].running_cov.shape[-1]
        groups = np.stack([cov[i : i + d, i : i + d] for i in range(0, 4, d)])
        np.testing.assert_allclose(merged["0.running_cov"].numpy(), groups, rtol=1e-9, atol=1e-12)


def with_statistics(mean: float, var: float, count: int = 1, **options: Any) -> nn.BatchNorm1d:
    layer = nn.BatchNorm1d(2, **options)
    layer.running_mean.fill_(mean)
    layer.running_var.fill_(var)
    layer.num_batches_tracked.fill_(count)
    return layer


def test_variance_of_two_normals_holds_the_distance_of_their_means():
    merged = merge_running_stats([with_statistics(0, 1), with_statistics(4, 1)])
    assert merged["running_mean"].tolist() == [2, 2]
    assert merged["running_var"].tolist() == [5, 5]


def test_weights_count_relative_to_each_other():
    merged = merge_running_stats([with_statistics(0, 1), with_statistics(4, 1)], weights=[0.3, 0.1])
    torch.testing.assert_close(merged["running_mean"], torch.tensor([1.0, 1.0]))
    torch.testing.assert_close(merged["running_var"], torch.tensor([4.0, 4.0]))
    one = with_statistics(3, 2, 7)
    torch.testing.assert_close(merge_running_stats([one], weights=[5]), {
        key: value for key, value in one.state_dict().items() if key not in ("weight", "bias")
    }, rtol=0, atol=0)  # fmt: skip


def test_a_single_value_counts_with_its_mean_alone():
    whole = torch.tensor([0.0, 2.0, 7.0])
    merged = merge_running_stats([with_statistics(1, 2), with_statistics(7, 99)], counts=[2, 1])
    torch.testing.assert_close(merged["running_mean"], whole.mean().expand(2))
    torch.testing.assert_close(merged["running_var"], whole.var().expand(2))
    assert merge_running_stats([with_statistics(7, 99)], counts=[1])["running_var"].tolist() == [0, 0]


def test_models_and_state_dicts_give_the_same_and_a_model_takes_it():
    models = [nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)) for _ in range(3)]
    for model in models:
        model(torch.randn(9, 4))
    merged = merge_running_stats(models)
    assert list(merged) == ["1.running_mean", "1.running_var", "1.num_batches_tracked"]
    torch.testing.assert_close(merge_running_stats([model.state_dict() for model in models]), merged, rtol=0, atol=0)
    before = {name: p.clone() for name, p in models[0].named_parameters()}
    assert not models[0].load_state_dict(merged, strict=False).unexpected_keys
    torch.testing.assert_close(models[0][1].running_var, merged["1.running_var"])
    torch.testing.assert_close(dict(models[0].named_parameters()), before)


def test_counter_is_the_largest_and_an_integer():
    merged = merge_running_stats([with_statistics(0, 1, 3), with_statistics(0, 1, 4)])
    assert merged["num_batches_tracked"] == 4
    assert merged["num_batches_tracked"].dtype == torch.int64


def test_schedule_of_renorm_goes_on():
    layers = [batchnorm.nn.BatchRenorm1d(2) for _ in range(2)]
    for layer in layers:
        layer(torch.randn(5, 2))
    layers[0].load_state_dict(merge_running_stats(layers), strict=False)
    assert layers[0].schedule_step == 1


def test_cumulative_replicas_merged_every_round_hold_the_average_of_all_batches():
    replicas = [nn.BatchNorm1d(4, momentum=None).double() for _ in range(3)]
    means = []
    for _ in range(4):
        for replica in replicas:
            x = torch.randn(6, 4, dtype=torch.float64) + len(means)
            replica(x)
            means.append(x.mean(0))
        merged = merge_running_stats(replicas)
        for replica in replicas:
            replica.load_state_dict(merged, strict=False)
    torch.testing.assert_close(replicas[0].running_mean, torch.stack(means).mean(0))
    assert replicas[0].num_batches_tracked == 4


def test_half_precision_sources_are_merged_in_float64_and_rounded_once():
    layers = [with_statistics(mean, 1.0).bfloat16() for mean in (300.0, 301.0, 302.0)]
    merged = merge_running_stats(layers)
    means = torch.stack([layer.running_mean.double() for layer in layers])
    assert merged["running_mean"].equal(means.mean(0).bfloat16())
    assert merged["running_var"].equal((1 + means.var(0, correction=0)).bfloat16())


def test_sources_without_counters_have_none_afterwards():
    states = [with_statistics(mean, 1).state_dict() for mean in (0, 4)]
    for state in states:
        del state["num_batches_tracked"]
    assert list(merge_running_stats(states)) == ["running_mean", "running_var"]


def poisoned(value: float, name: str = "running_var") -> nn.Module:
    model = nn.Sequential(with_statistics(0, 1))
    getattr(model[0], name)[1] = value
    return model


GOOD = nn.Sequential(with_statistics(0, 1))
REFUSED: dict[str, tuple[list[Any], dict[str, Any], str]] = {
    "nothing": ([], {}, "one source or more, and as many counts: got 0 and 0"),
    "too few counts": ([GOOD, GOOD], {"counts": [3]}, "as many counts: got 2 and 1"),
    "counts and weights": ([GOOD], {"counts": [3], "weights": [1]}, "counts or weights, not both"),
    "no count": ([GOOD, GOOD], {"counts": [3, 0]}, "counts of at least 1, got 0"),
    "half a count": ([GOOD], {"counts": [0.5]}, "counts of at least 1, got 0.5"),
    "negative weight": ([GOOD, GOOD], {"weights": [1, -0.5]}, "positive weights, got -0.5"),
    "NaN weight": ([GOOD], {"weights": [float("nan")]}, "positive weights, got nan"),
    "a layer without count": ([GOOD], {"counts": [{"1": 3}]}, "there is no count for layer '0'"),
    "no statistics": ([nn.Linear(2, 2)], {}, "source 0 has no running statistics"),
    "another layer": ([GOOD, nn.ModuleDict({"a": GOOD[0]})], {}, "source 1 differs in layer '0': it has none"),
    "more layers": ([GOOD, nn.Sequential(*GOOD, *GOOD)], {}, "source 1 differs in layer '1'.*source 0 has none"),
    "another width": ([GOOD, nn.Sequential(nn.BatchNorm1d(3))], {}, r"it has {'running_mean': \(3,\)"),
    "NaN": ([GOOD, poisoned(float("nan"), "running_mean")], {}, "source 1 has inf or NaN .*of layer '0'"),
    "inf": ([poisoned(float("inf")), GOOD], {}, "source 0 has inf or NaN .*of layer '0'"),
    "negative variance": ([GOOD, poisoned(-1)], {}, "source 1 has a negative running variance in layer '0'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_the_source_and_the_value(case: str):
    sources, options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        merge_running_stats(sources, **options)
