"""BN-Inception has the shapes that Figure 5 prints, and BN before every nonlinearity."""

import pytest
import torch
from torch import nn

from batchnorm.experiments.models.inception import FIGURE_5, BNInception

# Figure 5, sizes after the stage; 3c and 4e as the next rows read them
STAGES = {
    "conv1": (64, 112, 112),
    "pool1": (64, 56, 56),
    "conv2": (192, 56, 56),
    "pool2": (192, 28, 28),
    "inception_3a": (256, 28, 28),
    "inception_3b": (320, 28, 28),
    "inception_3c": (576, 14, 14),
    "inception_4a": (576, 14, 14),
    "inception_4b": (576, 14, 14),
    "inception_4c": (576, 14, 14),
    "inception_4d": (576, 14, 14),
    "inception_4e": (1024, 7, 7),
    "inception_5a": (1024, 7, 7),
    "inception_5b": (1024, 7, 7),
}


def weights_by_the_table(num_classes: int) -> tuple[int, int]:
    """Weights of all convolutions and the classifier, and features that are normalized, from the rows alone."""
    weights = 7 * 7 * 3 * 8 + 3 * 8 * 64 + 64 * 64 + 9 * 64 * 192
    normalized, features = 64 + 64 + 192, 192
    for row in FIGURE_5.values():
        weights += features * (row.direct + row.reduce + row.double_reduce + row.projected)
        weights += 9 * (row.reduce * row.conv + row.double_reduce * row.double + row.double**2)
        normalized += row.direct + row.reduce + row.conv + row.double_reduce + 2 * row.double + row.projected
        features = row.direct + row.conv + row.double + (row.projected or features)
    return weights + features * num_classes, normalized


@pytest.mark.parametrize("batch_norm", [False, True])
def test_stages_have_the_printed_sizes(batch_norm: bool):
    network = BNInception(batch_norm=batch_norm).eval()
    x = torch.randn(1, 3, 224, 224)
    sizes = {}
    with torch.no_grad():
        for name, stage in network.stages.named_children():
            x = stage(x)
            sizes[name] = tuple(x.shape[1:])
        assert network.classifier(network.pool(x).flatten(1)).shape == (1, 1000)
    assert sizes == STAGES


def test_parameters_are_those_of_the_table():
    weights, normalized = weights_by_the_table(1000)
    count = sum(p.numel() for p in BNInception(batch_norm=True).parameters())
    assert count == weights + 1000 + 2 * normalized
    assert 11.1e6 < count < 11.2e6
    plain = sum(p.numel() for p in BNInception(batch_norm=False).parameters())
    assert plain == weights + 1000 + normalized


def test_bn_stands_between_every_convolution_and_its_nonlinearity():
    network = BNInception(10, batch_norm=True)
    kinds = [type(m) for m in network.modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d | nn.ReLU)]
    convolutions = kinds.count(nn.Conv2d) - 1  # the separable one is two
    # 3 before the modules, then 7 in each of 8 modules and 5 in 3c and 4e
    assert convolutions == kinds.count(nn.BatchNorm2d) == kinds.count(nn.ReLU) == 3 + 8 * 7 + 2 * 5
    for block in network.modules():
        if isinstance(block, nn.Sequential) and isinstance(block[0], nn.Conv2d):
            assert [type(m) for m in block][-2:] == [nn.BatchNorm2d, nn.ReLU]
            assert block[-3].bias is None


def test_without_bn_convolutions_have_a_bias_instead():
    network = BNInception(10, batch_norm=False)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in network.modules())
    biased = [m.bias is not None for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert biased == [False] + [True] * (len(biased) - 1)  # the first half of the separable convolution has none


@pytest.mark.parametrize(("activation", "kind"), [("relu", nn.ReLU), ("sigmoid", nn.Sigmoid)])
def test_the_nonlinearity_is_chosen(activation: str, kind: type):
    network = BNInception(10, batch_norm=True, activation=activation)
    assert {type(m) for m in network.modules() if isinstance(m, nn.ReLU | nn.Sigmoid)} == {kind}


def test_plain_network_keeps_the_scale_of_its_input():
    scores = BNInception(10, batch_norm=False)(torch.randn(4, 3, 64, 64))
    assert 0.01 < scores.std() < 100


def test_every_parameter_gets_a_gradient():
    network = BNInception(10, batch_norm=True)
    network(torch.randn(4, 3, 64, 64)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())
