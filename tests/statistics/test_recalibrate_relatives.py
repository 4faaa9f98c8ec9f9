"""Population statistics of BN's relatives: each by the values that it normalizes, and nothing else moves."""

import pytest
import torch
from torch import Tensor, nn

import batchnorm.nn as bnn
from batchnorm.statistics import recalibrate

BATCHES = [torch.randn(6, 3, 4, generator=torch.Generator().manual_seed(seed)) * 2 + seed for seed in range(3)]
estimators = pytest.mark.parametrize("estimator", ["pooled", "paper"])


def by_batch_norm(batches: list[Tensor], estimator: str) -> nn.BatchNorm1d:
    layer = nn.BatchNorm1d(batches[0].shape[1])
    recalibrate(layer, batches, estimator=estimator)
    return layer


def assert_statistics(layer: nn.Module, expected: nn.Module) -> None:
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(getattr(layer, name), getattr(expected, name))


@estimators
@pytest.mark.parametrize("make", [lambda: bnn.GhostBatchNorm1d(3, ghost_batch_size=2), lambda: bnn.BatchRenorm1d(3)])
def test_ghost_and_renorm_get_the_statistics_of_batch_norm(make, estimator):
    layer = make()
    layer(BATCHES[0])
    assert recalibrate(layer, BATCHES, estimator=estimator).counts == {"": 72}
    assert_statistics(layer, by_batch_norm(BATCHES, estimator))


def test_measuring_keeps_the_schedule_of_renorm_and_corrects_nothing():
    layer = bnn.BatchRenorm1d(3, warmup_steps=0, rmax_steps=0, dmax_steps=0)
    layer(BATCHES[0])
    outputs = []
    layer.register_forward_hook(lambda layer, args, output: outputs.append(output))
    recalibrate(layer, BATCHES)
    assert layer.schedule_step == 1
    for x, output in zip(BATCHES, outputs, strict=True):
        torch.testing.assert_close(output, nn.BatchNorm1d(3)(x))


def test_measuring_normalizes_ghost_parts_as_training_does():
    model = nn.Sequential(bnn.GhostBatchNorm1d(3, ghost_batch_size=2), nn.BatchNorm1d(3))
    recalibrate(model, BATCHES)
    with torch.no_grad():
        parts = [torch.cat([nn.BatchNorm1d(3)(part) for part in x.split(2)]) for x in BATCHES]
    assert_statistics(model[1], by_batch_norm(parts, "pooled"))


class Recurrent(nn.Module):
    """Two masked layers with a nonlinearity between, as sequence models have them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = bnn.MaskedBatchNorm1d(3), bnn.MaskedBatchNorm1d(3, activation="relu")

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.second(self.first(x, mask=mask).tanh(), mask=mask)


@estimators
@pytest.mark.parametrize("padding", [99.0, float("nan")])
def test_padding_is_not_counted(estimator, padding):
    masks = [torch.arange(4) < lengths[:, None] for lengths in torch.randint(0, 5, (3, 6))]
    items = [(torch.where(mask[:, None], x, padding), mask) for x, mask in zip(BATCHES, masks, strict=True)]
    model = Recurrent()
    done = recalibrate(model, items, estimator=estimator, call=lambda model, item: model(*item))
    packed = [x.movedim(1, -1)[mask] for x, mask in items]
    assert done.counts == dict.fromkeys(("first", "second"), sum(map(len, packed)))
    assert_statistics(model.first, by_batch_norm(packed, estimator))
    with torch.no_grad():
        hidden = [nn.BatchNorm1d(3)(values).tanh() for values in packed]
    assert_statistics(model.second, by_batch_norm(hidden, estimator))


def test_a_mask_that_fails_leaves_statistics_and_modes():
    model = Recurrent().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    items = [(BATCHES[0], torch.ones(6, 4, dtype=torch.bool)), (BATCHES[1], torch.ones(6, 5, dtype=torch.bool))]
    with pytest.raises(
        ValueError, match=r"mask should be torch.bool of shape \(6, 4\).*got torch.bool of shape \(6, 5\)"
    ):
        recalibrate(model, items, call=lambda model, item: model(*item))
    torch.testing.assert_close(dict(model.state_dict()), before)
    assert not model.first.training
    assert model.first.track_running_stats


def test_each_domain_is_measured_by_its_own_data_and_one_without_is_left_alone():
    model = nn.Sequential(bnn.DomainBatchNorm1d(3, num_domains=3))
    model[0].domains[1].running_mean.fill_(7.0)
    items = [(BATCHES[0], 0), (BATCHES[1], 2), (BATCHES[2], 2)]
    done = recalibrate(model, items, call=lambda model, item: model[0](*item))
    assert (done.counts, done.not_reached) == ({"0.domains.0": 24, "0.domains.2": 48}, ["0.domains.1"])
    assert_statistics(model[0].domains[0], by_batch_norm(BATCHES[:1], "pooled"))
    assert_statistics(model[0].domains[2], by_batch_norm(BATCHES[1:], "pooled"))
    assert model[0].domains[1].running_mean.tolist() == [7.0] * 3
    assert model[0].domains[1].num_batches_tracked == 0


def test_conditional_statistics_are_those_of_all_classes():
    layer = bnn.ConditionalBatchNorm1d(3, num_classes=2)
    nn.init.normal_(layer.weight)
    items = [(x, torch.tensor([0, 1, 1, 0, 1, 0])) for x in BATCHES]
    recalibrate(layer, items, call=lambda layer, item: layer(*item))
    assert_statistics(layer.norm, by_batch_norm(BATCHES, "pooled"))


def test_per_activation_statistics_are_those_of_flattened_samples():
    layer = bnn.PerActivationBatchNorm((3, 4))
    recalibrate(layer, BATCHES)
    assert_statistics(layer.norm, by_batch_norm([x.flatten(1) for x in BATCHES], "pooled"))


@estimators
@pytest.mark.parametrize("group_size", [None, 3])
def test_whitening_gets_mean_and_covariance_of_the_population(estimator, group_size):
    layer = bnn.Whitening1d(6, group_size=group_size)
    batches = [x.view(3, 6, 4) for x in BATCHES]
    assert recalibrate(layer, batches, estimator=estimator).counts == {"": 36}
    values = [x.movedim(1, -1).reshape(-1, 6).double() for x in batches]
    if estimator == "pooled":
        whole = torch.cat(values)
        mean, cov = whole.mean(0), whole.T.cov()
    else:
        mean, cov = (torch.stack(each).mean(0) for each in ([x.mean(0) for x in values], [x.T.cov() for x in values]))
    d = group_size or 6
    groups = torch.stack([cov[i : i + d, i : i + d] for i in range(0, 6, d)])
    torch.testing.assert_close(layer.running_mean, mean.float())
    torch.testing.assert_close(layer.running_cov, groups.float())
    assert layer.num_batches_tracked == 3


def test_layer_after_a_whitening_is_measured_behind_it():
    model = nn.Sequential(bnn.Whitening1d(3), nn.BatchNorm1d(3))
    recalibrate(model, BATCHES)
    whitened = [bnn.Whitening1d(3)(x).detach() for x in BATCHES]
    assert_statistics(model[1], by_batch_norm(whitened, "pooled"))


def test_batch_with_nan_leaves_a_whitening_as_it_was():
    model = nn.Sequential(bnn.Whitening1d(3))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="layer '0' received inf or NaN"):
        recalibrate(model, [BATCHES[0], BATCHES[1] * float("inf")])
    torch.testing.assert_close(dict(model.state_dict()), before)
