"""Models of other libraries, with random weights: what convert does to them, and that they stay the same."""

import copy
import os
import warnings
from collections import Counter

import pytest
import torch
from equivalence import assert_same_model
from torch import nn

import batchnorm

os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(autouse=True)
def indeterministic_operations_allowed():
    # bicubic, adaptive pooling and others of these models have no deterministic kernel
    torch.use_deterministic_algorithms(False)


def resnet(layer_type: str) -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    sizes = {"embedding_size": 4, "hidden_sizes": [8, 12], "depths": [2, 1]}
    return ResNetForImageClassification(ResNetConfig(layer_type=layer_type, **sizes))


def regnet() -> nn.Module:
    from transformers import RegNetConfig, RegNetModel

    return RegNetModel(RegNetConfig(embedding_size=4, hidden_sizes=[8, 12], depths=[2, 1], groups_width=4))


def mobilenet() -> nn.Module:
    from transformers import MobileNetV2Config, MobileNetV2Model

    return MobileNetV2Model(MobileNetV2Config(depth_multiplier=0.1, min_depth=4, depth_divisible_by=4))


def efficientnet() -> nn.Module:
    from efficientnet_pytorch import EfficientNet

    return EfficientNet.from_name("efficientnet-b0", num_classes=3, width_coefficient=0.1, image_size=32)


def unet(act: str) -> nn.Module:
    with warnings.catch_warnings():
        # monai's own imports warn
        warnings.simplefilter("ignore")
        from monai.networks.nets import UNet

    sizes = {"spatial_dims": 2, "in_channels": 3, "out_channels": 2, "channels": (4, 6, 8), "strides": (2, 2)}
    return UNet(**sizes, num_res_units=2, act=act, norm="batch")


MODELS = [
    pytest.param(lambda: resnet("basic"), False, {"relu": 4, "add + relu": 3, "": 2}, id="resnet-basic"),
    pytest.param(lambda: resnet("bottleneck"), False, {"relu": 7, "add + relu": 3, "": 2}, id="resnet-bottleneck"),
    pytest.param(regnet, False, {"relu": 7, "add + relu": 3, "": 2}, id="regnet"),
    pytest.param(mobilenet, False, {"": 52}, id="mobilenet"),
    pytest.param(mobilenet, True, {"relu6": 35, "": 17}, id="mobilenet-example"),
    pytest.param(efficientnet, False, {"silu": 33, "": 16}, id="efficientnet"),
    pytest.param(efficientnet, True, {"silu": 33, "": 16}, id="efficientnet-example"),
    pytest.param(lambda: unet("relu"), False, {"relu": 9}, id="unet-relu"),
    pytest.param(lambda: unet("prelu"), False, {"": 9}, id="unet-prelu"),
]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(("build", "with_example", "expected"), MODELS)
def test_model_stays_the_same(build, with_example, expected):
    original = build()
    model, x = copy.deepcopy(original), torch.randn(4, 3, 32, 32)
    names, keys, classes = dict(original.named_modules()), list(original.state_dict()), map(type, original.modules())
    same, changes = batchnorm.convert(model, x if with_example else None)
    assert same is model
    assert Counter(c.what.removeprefix("absorbed").removeprefix("converted").strip() for c in changes) == expected
    assert all(c.reason for c in changes if c.what == "converted")
    assert list(dict(model.named_modules())) == list(names)
    assert list(model.state_dict()) == keys
    assert all(isinstance(m, cls) for m, cls in zip(model.modules(), classes, strict=True))
    assert fused_runs(model, x) == sum(c.what.startswith("absorbed") for c in changes)
    assert_same_model(original, model, x)
    batchnorm.revert(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in original.modules()]
    assert all("forward" not in vars(m) for m in model.modules())


def fused_runs(model: nn.Module, x: torch.Tensor) -> int:
    """How many layers really run fused when the model is called."""
    from batchnorm.surgery import fused

    calls, view = [], fused.with_activation

    def counted(layer, activation):
        calls.append(layer)
        return view(layer, activation)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(fused, "with_activation", counted)
        copy.deepcopy(model).eval()(x)
    return len({id(layer) for layer in calls})
