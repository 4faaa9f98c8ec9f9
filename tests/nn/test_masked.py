"""Masked batch normalization: what stands in the padding does not matter, whatever it is."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import batchnorm.nn
from against_oracle import STEPS, assert_follows
from batchnorm._ops import choice
from batchnorm.nn import MaskedBatchNorm1d
from batchnorm.reference import TrainOutput
from batchnorm.relatives.masked import masked_batch_norm_train
from layouts import tensor_in

IMPLEMENTATIONS = pytest.mark.parametrize("implementation", choice.IMPLEMENTATIONS)
LAYOUTS = ("dense", "dense_transposed", "sequence", "sequence_strided")


def mask_for(x: Tensor, step: int) -> Tensor:
    """A different one in each step, with at least two valid positions."""
    shape = (len(x), *x.shape[2:])
    generator = torch.Generator().manual_seed(step)
    mask = torch.rand(shape, generator=generator) < 0.6
    mask.view(-1)[:2] = True
    return mask


def formulas(x, step, running_mean, running_var, weight, bias) -> TrainOutput:
    return masked_batch_norm_train(x, mask_for(x, step), weight, bias)


def by_aten(x, step, running_mean, running_var, weight, bias) -> TrainOutput:
    mask = mask_for(x, step)
    packed = x.movedim(1, -1)[mask]
    output = torch.zeros_like(x.movedim(1, -1))
    output[mask] = F.batch_norm(packed, None, None, weight, bias, True)
    return masked_batch_norm_train(x, mask)._replace(output=output.movedim(-1, 1))


def masked(layer: MaskedBatchNorm1d, x: Tensor, step: int) -> Tensor:
    return layer(x, mask=mask_for(x, step))


@IMPLEMENTATIONS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_follows_the_formulas(layout, dtype, implementation):
    x = tensor_in(layout, dtype)
    assert_follows(MaskedBatchNorm1d(3, implementation=implementation), formulas, by_aten, [x], masked)


@IMPLEMENTATIONS
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("steps", STEPS)
def test_statistics_and_evaluation_after_k_steps(steps, offset, momentum, implementation):
    batches = [torch.randn(5 + step % 3, 61, 13) * 2 + offset for step in range(steps)]
    layer = MaskedBatchNorm1d(61, momentum=momentum, implementation=implementation)
    assert_follows(layer, formulas, by_aten, batches, masked)
    assert layer.num_batches_tracked == steps


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(4, 3, 5), (8, 3)])
def test_masked_is_batch_norm_of_the_packed_values(shape, training):
    x, residual = torch.randn(2, *shape, dtype=torch.float64, requires_grad=True)
    mask = mask_for(x, 1)
    layers = [
        cls(3, activation="sigmoid", dtype=torch.float64) for cls in (MaskedBatchNorm1d, batchnorm.nn.BatchNorm1d)
    ]
    for layer in layers:
        layer.running_mean.fill_(0.5)
        layer.train(training)
    output = layers[0](x, residual, mask=mask)
    packed = layers[1](x.movedim(1, -1)[mask], residual.movedim(1, -1)[mask])
    torch.testing.assert_close(output.movedim(1, -1)[mask], packed)
    assert not output.movedim(1, -1)[~mask].any()
    assert output.is_contiguous()
    torch.testing.assert_close(dict(layers[0].state_dict()), dict(layers[1].state_dict()))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("padding", [0.0, 1e30, float("inf"), float("nan")])
def test_padding_reaches_neither_output_nor_statistics_nor_gradients(padding, training):
    x = torch.randn(4, 3, 5)
    mask = mask_for(x, 1)
    results = []
    for value in (7.0, padding):
        layer = MaskedBatchNorm1d(3, activation="relu").train(training)
        leaf = torch.where(mask[:, None], x, value).requires_grad_()
        output = layer(leaf, mask=mask)
        output.square().sum().backward()
        results.append([output.detach(), leaf.grad, layer.weight.grad, layer.bias.grad, *layer.buffers()])
        assert not leaf.grad.movedim(1, -1)[~mask].any()
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_without_a_mask_everything_is_valid():
    x = torch.randn(4, 3, 5)
    plain, layer = batchnorm.nn.BatchNorm1d(3), MaskedBatchNorm1d(3)
    assert torch.equal(layer(x), plain(x))
    torch.testing.assert_close(layer(x, mask=torch.ones(4, 5, dtype=torch.bool)), plain(x))


@IMPLEMENTATIONS
@pytest.mark.parametrize("training", [True, False])
def test_a_mask_without_a_valid_value_is_an_empty_batch(training, implementation):
    layer = MaskedBatchNorm1d(3, implementation=implementation).train(training)
    x = torch.randn(4, 3, 5, requires_grad=True)
    output = layer(x, mask=torch.zeros(4, 5, dtype=torch.bool))
    output.sum().backward()
    for zeros in (output, x.grad):
        assert torch.equal(zeros, torch.zeros(4, 3, 5))
    assert torch.equal(layer.weight.grad, torch.zeros(3))
    torch.testing.assert_close(dict(layer.state_dict()), dict(MaskedBatchNorm1d(3).state_dict()))


@IMPLEMENTATIONS
@pytest.mark.parametrize("shape", [(4, 3, 5), (20, 3)])
def test_one_valid_value_is_refused_in_training_and_taken_in_evaluation(shape, implementation):
    layer, x = MaskedBatchNorm1d(3, implementation=implementation), torch.randn(shape)
    mask = torch.zeros(len(x), *shape[2:], dtype=torch.bool)
    mask[1] = torch.arange(5) == 2 if len(shape) == 3 else True
    with pytest.raises(
        ValueError, match=r"more than 1 value per channel when training, got a mask with 1 valid .* of 20"
    ):
        layer(x, mask=mask)
    torch.testing.assert_close(dict(layer.state_dict()), dict(MaskedBatchNorm1d(3).state_dict()))
    assert layer.eval()(x, mask=mask).count_nonzero() == 3


@pytest.mark.parametrize(
    ("mask", "got"),
    [
        (torch.ones(4, 5), r"got torch.float32 of shape \(4, 5\) on cpu"),
        (torch.ones(4, 3, 5, dtype=torch.bool), r"got torch.bool of shape \(4, 3, 5\)"),
        (torch.ones(5, 4, dtype=torch.bool), r"got torch.bool of shape \(5, 4\)"),
        (torch.ones(4, 5, dtype=torch.bool, device="meta"), r"got .* on meta"),
    ],
    ids=["float", "per_channel", "transposed", "device"],
)
def test_other_masks_are_refused_untouched(mask, got):
    layer = MaskedBatchNorm1d(3)
    with pytest.raises(ValueError, match=r"mask should be torch.bool of shape \(4, 5\) on cpu, .*: " + got):
        layer(torch.randn(4, 3, 5), mask=mask)
    torch.testing.assert_close(dict(layer.state_dict()), dict(MaskedBatchNorm1d(3).state_dict()))


def test_a_residual_of_another_shape_is_refused():
    with pytest.raises(RuntimeError, match=r"residual should have .* expected \(4, 3, 5\).*got \(4, 3, 6\)"):
        MaskedBatchNorm1d(3)(torch.randn(4, 3, 5), torch.randn(4, 3, 6), mask=torch.ones(4, 5, dtype=torch.bool))


def test_gradients_are_those_of_finite_differences():
    layer = MaskedBatchNorm1d(2, dtype=torch.float64, track_running_stats=False)
    x = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    mask = mask_for(x, 1)
    assert torch.autograd.gradcheck(lambda x: layer(x, mask=mask), x)
    assert torch.autograd.gradgradcheck(lambda x: layer(x, mask=mask), x)


def test_a_checkpoint_of_batch_norm_loads():
    MaskedBatchNorm1d(3).load_state_dict(nn.BatchNorm1d(3).state_dict())


def test_fx_traces_a_masked_call_as_one_node():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = MaskedBatchNorm1d(3)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.norm(x, mask=mask)

    model, x = Model().eval(), torch.randn(4, 3, 5)
    mask = mask_for(x, 1)
    assert torch.equal(torch.fx.symbolic_trace(model)(x, mask), model(x, mask))
