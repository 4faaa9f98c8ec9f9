"""Which layers are recalibrated, in which order, on how much data, and what the result tells of it."""

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import batchnorm
import batchnorm.nn as bnn
from batchnorm import reference
from batchnorm.statistics import recalibrate
from batchnorm.statistics.moments import Moments
from deferring import assert_buffers, buffers

homes = pytest.mark.parametrize("home", [nn, bnn], ids=["torch", "ours"])


def batches(count: int, size: int = 8) -> list[Tensor]:
    return [torch.randn(size, 4) * 2 + 1 for _ in range(count)]


def chain(home: Any = nn) -> nn.Sequential:
    """Layers named 1, 3 and 5, with nonlinearities before the last two."""
    return nn.Sequential(
        nn.Linear(4, 4), home.BatchNorm1d(4), nn.ReLU(), home.BatchNorm1d(4), nn.Tanh(), home.BatchNorm1d(4)
    ).requires_grad_(False)


@homes
def test_layers_that_were_not_chosen_evaluate_and_stay(home: Any):
    model, data = chain(home), batches(3)
    for name in ("1", "5"):
        model[int(name)].running_mean.fill_(0.5)
        model[int(name)].running_var.fill_(4.0)
    before = buffers(model)
    done = recalibrate(model, data, layers="3")
    assert list(done.counts) == ["3"]
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]) == (not name.startswith("3.")), name
    hidden = model.eval()[:3](torch.cat(data))
    torch.testing.assert_close(model[3].running_mean, hidden.mean(0))
    torch.testing.assert_close(model[3].running_var, hidden.var(0))


def test_several_patterns_choose_the_layers_of_any():
    assert list(recalibrate(chain(), batches(2), layers=["1", "[5]"]).counts) == ["1", "5"]
    with pytest.raises(
        ValueError, match=r"no batch normalization layer matches 'head\.\*'; the model has '1', '3', '5'"
    ):
        recalibrate(chain(), batches(2), layers=["1", "head.*"])


@homes
def test_frozen_layers_are_left_alone_and_reported(home: Any):
    model = chain(home)
    model[3].frozen_statistics = True
    model[3].eval()
    before = buffers(model[3])
    done = recalibrate(model, batches(2))
    assert done.frozen == ["3"]
    assert list(done.counts) == ["1", "5"]
    assert_buffers(model[3], before)
    assert [model[i].training for i in (1, 3, 5)] == [True, False, True]
    with pytest.raises(ValueError, match="all 1 batch normalization layers are frozen"):
        recalibrate(model, batches(2), layers="3")


@homes
def test_layer_by_layer_gives_every_layer_the_population_that_evaluation_feeds_it(home: Any):
    model, data = chain(home), batches(6, size=3)
    done = recalibrate(model, data, layer_by_layer=True)
    x = torch.cat(data)
    model.eval()
    for i in (1, 3, 5):
        hidden = model[:i](x)
        torch.testing.assert_close(model[i].running_mean, hidden.mean(0))
        torch.testing.assert_close(model[i].running_var, hidden.var(0))
    assert list(done.counts) == ["1", "3", "5"]
    # one pass per layer
    assert (done.batches, done.samples) == (18, 54)


def test_one_pass_of_small_batches_gives_later_layers_another_population():
    one, by_layer, data = chain(), chain(), batches(20, size=2)
    by_layer.load_state_dict(one.state_dict())
    recalibrate(one, data)
    recalibrate(by_layer, data, layer_by_layer=True)
    # a batch of two becomes -1 and 1, so half of what passes the relu is 1 and the variance 1/4
    assert 0.2 < one[3].running_var.max() < 0.27
    assert by_layer[3].running_var.mean() > 0.3


def test_layer_by_layer_needs_data_that_can_be_read_again():
    with pytest.raises(ValueError, match="layer_by_layer iterates the loader once per layer, which a list_iterator"):
        recalibrate(chain(), iter(batches(2)), layer_by_layer=True)


def test_an_error_in_a_later_pass_takes_the_earlier_layers_back():
    class Data:
        passes = 0

        def __iter__(self) -> Iterator[Tensor]:
            self.passes += 1
            yield from batches(2)
            if self.passes == 3:
                raise ConnectionError("pass 3")

    model = chain()
    before, tensors = buffers(model), [id(buffer) for buffer in model.buffers()]
    with pytest.raises(ConnectionError, match="pass 3"):
        recalibrate(model, Data(), layer_by_layer=True)
    assert_buffers(model, before)
    assert [id(buffer) for buffer in model.buffers()] == tensors
    assert all(module.training for module in model.modules())


def test_layer_by_layer_reports_what_no_pass_reached():
    model = nn.ModuleDict({"used": chain(), "unused": nn.BatchNorm1d(4)})
    done = recalibrate(model, batches(2), layer_by_layer=True, call=lambda model, x: model["used"](x))
    assert done.not_reached == ["unused"]
    assert list(done.counts) == ["used.1", "used.3", "used.5"]


def test_max_samples_ends_with_the_batch_that_reaches_it():
    assert recalibrate(chain(), batches(9), max_samples=20)[-2:] == (3, 24)
    assert recalibrate(chain(), batches(2), max_samples=20)[-2:] == (2, 16)


@pytest.mark.parametrize(
    ("item", "samples"),
    [
        (torch.zeros(3, 4), 3),
        ((torch.zeros(3, 4), torch.zeros(1)), 3),
        ({"x": torch.zeros(5, 4), "y": None}, 5),
        (([torch.zeros(4)] * 2, None), 2),
        (torch.zeros(()), 1),
        ("a path", 1),
    ],
)
def test_samples_of_an_item_are_those_of_its_first_tensor_or_list(item: Any, samples: int):
    seen = []
    recalibrate(
        nn.BatchNorm1d(4),
        [item] * 2,
        call=lambda layer, _: layer(torch.randn(3, 4)),
        on_progress=lambda batches, samples: seen.append((batches, samples)),
    )
    assert seen == [(1, samples), (2, 2 * samples)]


def test_progress_goes_on_from_layer_to_layer():
    seen = []
    recalibrate(chain(), batches(2), layer_by_layer=True, on_progress=lambda *done: seen.append(done))
    assert seen == [(i, 8 * i) for i in range(1, 7)]


@pytest.mark.parametrize(
    ("name", "value"), [("tolerance", 0.0), ("tolerance", -0.1), ("tolerance", math.nan), ("max_samples", 0)]
)
def test_options_out_of_range_are_refused_with_their_value(name: str, value: Any):
    with pytest.raises(ValueError, match=f"{name} should be .*, got {value}"):
        recalibrate(chain(), batches(2), **{name: value})


def by_definition(data: list[Tensor]) -> float:
    """Of batches of one size: the standard deviation of their means, over sqrt(B), in standard deviations."""
    means = torch.stack([x.double().mean(0) for x in data])
    return (means.std(0) / len(data) ** 0.5 / torch.cat(data).double().std(0)).max().item()


@homes
def test_the_standard_error_is_that_of_the_batch_means(home: Any):
    data = batches(7)
    errors = recalibrate(home.BatchNorm1d(4), data).standard_errors
    assert errors[""] == pytest.approx(by_definition(data), rel=1e-5)
    assert math.isnan(recalibrate(home.BatchNorm1d(4), data[:1]).standard_errors[""])


@homes
def test_the_standard_error_covers_the_population_whatever_the_values_of_a_sample_share(home: Any):
    """An image's values differ less among themselves than from another's: N x H x W values are not N x H x W draws."""
    ratios = []
    for _ in range(100):
        layer = home.BatchNorm2d(1)
        data = [torch.randn(8, 1, 1, 1) + 0.1 * torch.randn(8, 1, 6, 6) for _ in range(20)]
        done = recalibrate(layer, data)
        ratios.append(layer.running_mean.item() / layer.running_var.item() ** 0.5 / done.standard_errors[""])
    # of an honest standard error these are t values with 19 degrees of freedom, of standard deviation 1.06
    assert 0.8 < torch.tensor(ratios).std() < 1.3


def test_a_constant_channel_has_no_error():
    data = [torch.cat([torch.randn(8, 3), torch.ones(8, 1)], 1) for _ in range(4)]
    error = recalibrate(nn.BatchNorm1d(4), data).standard_errors[""]
    assert error == pytest.approx(by_definition([x[:, :3] for x in data]))


@pytest.mark.parametrize("layer_by_layer", [False, True])
def test_tolerance_stops_as_soon_as_every_layer_has_reached_it(layer_by_layer: bool):
    data = batches(400)
    done = recalibrate(chain(), data, tolerance=0.05, layer_by_layer=layer_by_layer)
    assert max(done.standard_errors.values()) <= 0.05
    # 8 samples per batch give 1 / sqrt(8 B)
    assert 30 < done.batches / (3 if layer_by_layer else 1) < 120
    if not layer_by_layer:
        again = recalibrate(chain(), data[: done.batches - 1], tolerance=0.05)
        assert again.batches == done.batches - 1


def test_tolerance_waits_for_layers_that_were_not_reached_yet():
    layer, data = bnn.DomainBatchNorm1d(4, num_domains=2), batches(60, size=64)
    items = [(x, int(i >= 40)) for i, x in enumerate(data)]
    done = recalibrate(layer, items, call=lambda layer, item: layer(*item), tolerance=0.1)
    assert 42 <= done.batches < 60
    assert list(done.counts) == ["domains.0", "domains.1"]


def test_the_result_prints_as_a_table():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4), nn.BatchNorm1d(4))
    model[2].frozen_statistics = True
    done = recalibrate(model, batches(2), call=lambda model, x: model[0](x))
    error = f"{done.standard_errors['0']:.2g}"
    assert str(done).splitlines() == [
        "layer  values  standard error",
        f"0          16  {error:>14}",
        "16 samples in 2 batches",
        "left alone, not reached: 1",
        "left alone, frozen: 2",
    ]


@homes
def test_moments_are_taken_from_the_forward_of_ours_and_of_plain_torch_layers(home: Any):
    """No second pass: the float64 measurement is never called."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Moments, "add", lambda *_: pytest.fail("measured apart"))
        recalibrate(chain(home), batches(2))


class Own(nn.BatchNorm1d):
    """Somebody's subclass, whose forward is not torch's."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 1.0


def patched() -> nn.BatchNorm1d:
    layer = nn.BatchNorm1d(4)
    forward = layer.forward
    layer.forward = lambda x: forward(x)
    return layer


def with_attribute() -> nn.BatchNorm1d:
    layer = nn.BatchNorm1d(4)
    layer.activation = torch.relu
    return layer


@pytest.mark.parametrize("make", [lambda: Own(4), patched, with_attribute, lambda: nn.SyncBatchNorm(4)])
def test_layers_with_a_forward_of_their_own_are_measured_too(make: Any):
    layer, data = make(), batches(3)
    before = {name: id(value) for name, value in vars(layer).items()}
    after = nn.BatchNorm1d(4)
    recalibrate(nn.Sequential(layer, after), data)
    x = torch.cat(data)
    torch.testing.assert_close(layer.running_mean, x.mean(0))
    torch.testing.assert_close(layer.running_var, x.var(0))
    normalized = torch.cat([reference.batch_norm_train(x).output for x in data])
    torch.testing.assert_close(after.running_mean, normalized.mean(0), atol=1e-6, rtol=0)
    torch.testing.assert_close(after.running_var, normalized.var(0))
    assert {name: id(value) for name, value in vars(layer).items()} == before


def test_a_compiled_model_is_measured_without_its_graph():
    model = chain()
    compiled = torch.compile(model, backend="eager")
    data = batches(3)
    compiled(data[0])
    compiled.eval()(data[0])
    done = recalibrate(compiled, data)
    torch.testing.assert_close(model[1].running_mean, model[0](torch.cat(data)).mean(0))
    assert set(done.counts.values()) == {24}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(x))


def test_a_fused_block_stays_fused():
    model, x = nn.Sequential(Block(), Block()), torch.randn(4, 3, 5, 5)
    assert batchnorm.convert(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Block, "forward", lambda *_: pytest.fail("not fused"))
        done = recalibrate(model, [x])
    assert done.counts == {"0.norm": 100, "1.norm": 100}
    torch.testing.assert_close(model[0].norm.running_var, x.var((0, 2, 3)))


def resnet() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=3)
    return ResNetForImageClassification(config)


def efficientnet() -> nn.Module:
    from efficientnet_pytorch import EfficientNet

    options = {"drop_connect_rate": 0.0, "dropout_rate": 0.0}
    return EfficientNet.from_name("efficientnet-b0", width_coefficient=0.1, image_size=32, **options)


@pytest.mark.parametrize("make", [resnet, efficientnet])
@pytest.mark.parametrize("converted", [False, True])
def test_a_real_model_gets_what_torch_gives_it_for_one_batch(make: Any, converted: bool):
    """With one batch, the average over batches is the population."""
    model, x = make(), torch.randn(4, 3, 32, 32)
    other = copy.deepcopy(model)
    if converted:
        batchnorm.convert(model)
    recalibrate(model, [x])
    update_bn([x], other)
    torch.testing.assert_close(dict(model.named_buffers()), dict(other.named_buffers()), rtol=1e-4, atol=1e-4)
