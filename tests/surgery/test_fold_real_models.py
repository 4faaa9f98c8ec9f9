"""Models of other libraries, folded: how many layers go where, and that evaluation stays the same."""

import warnings
from collections import Counter

import pytest
import torch
from folded import fold_and_compare, with_statistics
from test_real_models import efficientnet, indeterministic_operations_allowed, mobilenet, regnet, resnet, unet
from torch import nn

__all__ = ["indeterministic_operations_allowed"]


def efficientnet_of_transformers() -> nn.Module:
    from transformers import EfficientNetConfig, EfficientNetModel

    sizes = {"width_coefficient": 0.1, "depth_coefficient": 0.3, "hidden_dim": 128, "depth_divisor": 4}
    return EfficientNetModel(EfficientNetConfig(image_size=32, **sizes))


def unet_3d() -> nn.Module:
    with warnings.catch_warnings():
        # monai's own imports warn
        warnings.simplefilter("ignore")
        from monai.networks.nets import UNet

    return UNet(3, in_channels=1, out_channels=2, channels=(4, 6), strides=(2,), num_res_units=1, norm="batch")


def densenet() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from monai.networks.nets import DenseNet

    return DenseNet(2, in_channels=3, out_channels=2, init_features=4, growth_rate=4, block_config=(2, 2))


MODELS = [
    pytest.param(lambda: resnet("basic"), {"folded": 9}, id="resnet-basic"),
    pytest.param(lambda: resnet("bottleneck"), {"folded": 12}, id="resnet-bottleneck"),
    pytest.param(regnet, {"folded": 12}, id="regnet"),
    pytest.param(mobilenet, {"folded": 52}, id="mobilenet"),
    pytest.param(efficientnet, {"folded": 49}, id="efficientnet"),
    pytest.param(efficientnet_of_transformers, {"folded": 24, "left": 1}, id="efficientnet-of-transformers"),
    pytest.param(lambda: unet("prelu"), {"folded": 9}, id="unet"),
    pytest.param(unet_3d, {"folded": 3}, id="unet-3d"),
    # a layer before an activation, after a concatenation or pooling, has no neighbour
    pytest.param(densenet, {"folded": 5, "left": 6}, id="densenet"),
]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(("build", "expected"), MODELS)
def test_model_stays_the_same(build, expected):
    model = with_statistics(build())
    three_dimensional = any(isinstance(m, nn.Conv3d) for m in model.modules())
    x = torch.randn(2, 1, 8, 8, 8) if three_dimensional else torch.randn(2, 3, 32, 32)
    folded, changes = fold_and_compare(model, x)
    assert Counter(change.what.split()[0] for change in changes) == expected
    norms = [m for m in folded.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert len(norms) == expected.get("left", 0)
    assert all(change.error < 1e-5 for change in changes if change.error is not None)
    assert all(change.reason for change in changes if change.what == "left alone")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(("build", "count"), [(efficientnet, 49), (lambda: unet("relu"), 9)])
def test_model_that_can_be_followed_whole_needs_no_example(build, count):
    model = with_statistics(build())
    _, changes = fold_and_compare(model, torch.randn(2, 3, 32, 32), example=False)
    assert [change.what.split()[0] for change in changes] == ["folded"] * count
