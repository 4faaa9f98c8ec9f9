"""Inception has the shapes that Figure 5 prints, and BN before every nonlinearity."""

import pytest
import torch
from torch import nn

import batchnorm.nn
from batchnorm.experiments.models.inception import FIGURE_5, Inception

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
    network = Inception(batch_norm=batch_norm).eval()
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
    count = sum(p.numel() for p in Inception(batch_norm=True).parameters())
    assert count == weights + 1000 + 2 * normalized
    assert 11.1e6 < count < 11.2e6
    plain = sum(p.numel() for p in Inception(batch_norm=False).parameters())
    assert plain == weights + 1000 + normalized


def test_bn_stands_between_every_convolution_and_its_nonlinearity():
    network = Inception(10, fused=False)
    kinds = [type(m) for m in network.modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d | nn.ReLU)]
    convolutions = kinds.count(nn.Conv2d) - 1  # the separable one is two
    # 3 before the modules, then 7 in each of 8 modules and 5 in 3c and 4e
    assert convolutions == kinds.count(nn.BatchNorm2d) == kinds.count(nn.ReLU) == 3 + 8 * 7 + 2 * 5
    for block in network.modules():
        if isinstance(block, nn.Sequential) and isinstance(block[0], nn.Conv2d):
            assert [type(m) for m in block][-2:] == [nn.BatchNorm2d, nn.ReLU]
            assert block[-3].bias is None


def test_without_bn_convolutions_have_a_bias_instead():
    network = Inception(10, batch_norm=False)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in network.modules())
    biased = [m.bias is not None for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert biased == [False] + [True] * (len(biased) - 1)  # the first half of the separable convolution has none


@pytest.mark.parametrize(("activation", "kind"), [("relu", nn.ReLU), ("sigmoid", nn.Sigmoid)])
def test_the_nonlinearity_is_chosen(activation: str, kind: type):
    network = Inception(10, activation=activation, fused=False)
    assert {type(m) for m in network.modules() if isinstance(m, nn.ReLU | nn.Sigmoid)} == {kind}


def test_plain_network_keeps_the_scale_of_its_input():
    scores = Inception(10, batch_norm=False)(torch.randn(4, 3, 64, 64))
    assert 0.01 < scores.std() < 100


def test_every_parameter_gets_a_gradient():
    network = Inception(10, batch_norm=True)
    network(torch.randn(4, 3, 64, 64)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


def test_fused_layers_are_those_of_torch_with_the_activation_inside():
    torch.manual_seed(0)
    separate = Inception(10, width=0.25, fused=False)
    fused = Inception(10, width=0.25)
    fused.load_state_dict(separate.state_dict())
    assert not any(isinstance(m, nn.ReLU) for m in fused.modules())
    x = torch.randn(4, 3, 64, 64)
    for mode in (True, False):
        ours, theirs = fused.train(mode)(x), separate.train(mode)(x)
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("width", "expected"), [(0.5, 32), (0.25, 16), (0.01, 8), (2.0, 128)])
def test_width_multiplies_the_features_of_every_layer(width: float, expected: int):
    network = Inception(10, width=width)
    assert network.stages.conv1[1].out_channels == expected
    assert all(m.num_features % 8 == 0 for m in network.modules() if isinstance(m, nn.BatchNorm2d))
    assert network.eval()(torch.randn(1, 3, 64, 64)).shape == (1, 10)


def test_printed_projections_make_the_features_that_the_table_does_not_print():
    network = Inception(10, printed_projection=True)
    assert [network.stages.get_submodule(f"inception_{name}").out_features for name in ("4c", "4d", "4e")] == [
        608, 608, 1056,
    ]  # fmt: skip


def test_ordinary_stem_is_one_convolution():
    assert network_kinds(Inception(10, separable_stem=False).stages.conv1) == [nn.Conv2d, batchnorm.nn.BatchNorm2d]
    assert network_kinds(Inception(10).stages.conv1) == [nn.Conv2d, nn.Conv2d, batchnorm.nn.BatchNorm2d]


def network_kinds(block: nn.Module) -> list[type]:
    return [type(module) for module in block.children()]


def test_plain_network_has_local_response_normalization_where_googlenet_has_it():
    network = Inception(10, batch_norm=False, local_response_norm=True)
    assert network_kinds(network.stages.pool1) == [nn.MaxPool2d, nn.LocalResponseNorm]
    assert network_kinds(network.stages.pool2) == [nn.LocalResponseNorm, nn.MaxPool2d]
    assert not any(isinstance(m, nn.LocalResponseNorm) for m in Inception(10).modules())


def test_dropout_stands_before_the_classifier_and_drops_in_training_alone():
    network = Inception(10, width=0.1, dropout=0.5)
    x = torch.randn(2, 3, 32, 32)
    assert network.dropout.p == 0.5
    network.eval()
    assert torch.equal(network(x), network(x))


def test_last_module_can_normalize_every_activation_on_its_own():
    network = Inception(10, width=0.25, per_activation_size=64)
    last = network.stages.inception_5b
    features = [m.num_features for m in last.modules() if isinstance(m, batchnorm.nn.BatchNorm1d)]
    # 2 x 2 positions are left of 64 x 64; 352, 192, 320, 192, 224, 224 and 128 features at full width
    assert features == [4 * n for n in (88, 48, 80, 48, 56, 56, 32)]
    y = network(torch.randn(8, 3, 64, 64))
    y.sum().backward()
    assert y.shape == (8, 10)


def test_initial_scale_multiplies_the_weights_of_all_convolutions():
    networks = []
    for scale in (1.0, 2.0):
        torch.manual_seed(0)
        networks.append(Inception(10, width=0.1, initial_scale=scale))
    for (name, one), (_, two) in zip(*(n.named_parameters() for n in networks), strict=True):
        assert torch.equal(two, 2 * one if one.dim() == 4 else one), name
