"""Rules for live models on models of other libraries whose statistics fit: what fires is right."""

import json
from collections import Counter

import pytest
import torch
from test_fold_real_models import densenet, efficientnet_of_transformers, unet_3d
from test_real_models import efficientnet, indeterministic_operations_allowed, mobilenet, regnet, resnet, unet
from torch import nn

import batchnorm
from batchnorm.doctor.examine import examine

__all__ = ["indeterministic_operations_allowed"]

# layers whose convolution has a bias, and layers with the momentum of TensorFlow: both are what the libraries wrote
MODELS = [
    pytest.param(lambda: resnet("basic"), {}, id="resnet"),
    pytest.param(regnet, {}, id="regnet"),
    pytest.param(densenet, {}, id="densenet of monai"),
    pytest.param(efficientnet, {}, id="efficientnet_pytorch"),
    pytest.param(lambda: unet("prelu"), {"BN201": 9}, id="unet of monai"),
    pytest.param(unet_3d, {"BN201": 3}, id="unet of monai, 3d"),
    pytest.param(mobilenet, {"BN202": 52}, id="mobilenet of transformers"),
    pytest.param(efficientnet_of_transformers, {"BN202": 18}, id="efficientnet of transformers"),
]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(("build", "expected"), MODELS)
def test_healthy_model_has_the_findings_that_are_right(build, expected):
    model = build().eval()
    three_dimensional = any(isinstance(m, nn.Conv3d) for m in model.modules())
    shape = (24, 1, 8, 8, 8) if three_dimensional else (24, 3, 32, 32)
    data = [torch.randn(shape) for _ in range(2)]
    batchnorm.recalibrate(model, data)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    findings = examine(model, data, select=["BN108", "BN2", "BN3", "BN4", "BN5"]).findings
    assert Counter(one.code for one in findings if one.code not in ("BN207", "BN501")) == expected
    # random networks of many layers on small images have noisy batches, and only that
    assert [one.message for one in findings if one.code == "BN207" and one.severity != "info"] == []
    assert [one.code for one in findings].count("BN501") == 1
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


VALUES = [0.0, 1e-45, 1e30, -1e30, float("inf"), -float("inf"), float("nan")]


@pytest.mark.parametrize("seed", range(12))
def test_no_value_makes_a_rule_fail(seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.tensor(VALUES)[torch.randint(len(VALUES), shape, generator=generator)]

    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1, bias=False), batchnorm.nn.BatchNorm2d(4), nn.Flatten()
    )
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point() and torch.rand((), generator=generator) < 0.5:
                tensor.copy_(draw(*tensor.shape))
    model[1].momentum, model[3].momentum = draw().item(), draw().item()
    data = [torch.randn(4, 3, 2, 2), draw(4, 3, 2, 2)]
    for one in examine(model.train(seed % 2 == 0), data, torch.optim.SGD(model.parameters(), 0.1)).findings:
        json.dumps([one.measured, one.threshold], allow_nan=False)
