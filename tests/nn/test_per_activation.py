"""Per-activation batch normalization: BN of the flattened samples."""

import pytest
import torch

import batchnorm.nn as bnn


@pytest.mark.parametrize("normalized_shape", [5, (5,), (3, 4), (3, 2, 5), (2, 1, 3, 2)], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_every_activation_is_normalized_as_a_feature_of_its_own(normalized_shape, training):
    layer = bnn.PerActivationBatchNorm(normalized_shape, activation="relu").train(training)
    x, residual = torch.randn(2, 4, *layer.normalized_shape)
    alone = bnn.BatchNorm1d(x[0].numel(), activation="relu").train(training)
    expected = alone(x.flatten(1), residual.flatten(1)).view(x.shape)
    assert torch.equal(layer(x, residual), expected)
    assert torch.equal(layer(x), alone(x.flatten(1)).view(x.shape))
    state = {name.removeprefix("norm."): value for name, value in layer.state_dict().items()}
    torch.testing.assert_close(state, dict(alone.state_dict()), rtol=0, atol=0)


def test_memory_formats_give_the_same():
    x = torch.randn(4, 3, 2, 5)
    outputs = [
        bnn.PerActivationBatchNorm((3, 2, 5))(x.contiguous(memory_format=f))
        for f in (torch.contiguous_format, torch.channels_last)
    ]
    assert torch.equal(*outputs)


@pytest.mark.parametrize("shape", [(4, 3, 5, 2), (4, 30), (3, 2, 5)], ids=str)
def test_samples_of_another_shape_are_refused_untouched(shape):
    layer = bnn.PerActivationBatchNorm((3, 2, 5))
    with pytest.raises(
        ValueError, match=rf"expected input of shape \(N, 3, 2, 5\), got \({', '.join(map(str, shape))}\)"
    ):
        layer(torch.randn(shape))
    assert layer.norm.num_batches_tracked == 0


def test_a_residual_of_another_shape_is_refused():
    with pytest.raises(RuntimeError, match=r"residual should have .* expected \(4, 3, 5\).*got \(4, 5, 3\)"):
        bnn.PerActivationBatchNorm((3, 5))(torch.randn(4, 3, 5), torch.randn(4, 5, 3))


def test_one_sample_is_refused_in_training_though_a_feature_map_has_many_values():
    layer = bnn.PerActivationBatchNorm((3, 2, 5))
    with pytest.raises(ValueError, match=r"more than 1 value per channel when training.*\[1, 30\]"):
        layer(torch.randn(1, 3, 2, 5))
    assert layer.norm.num_batches_tracked == 0
    assert layer.eval()(torch.randn(1, 3, 2, 5)).shape == (1, 3, 2, 5)


def test_an_empty_batch_changes_nothing():
    layer = bnn.PerActivationBatchNorm((3, 2, 5))
    assert layer(torch.randn(0, 3, 2, 5)).shape == (0, 3, 2, 5)
    assert layer.norm.num_batches_tracked == 0
