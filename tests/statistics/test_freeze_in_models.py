"""Frozen layers in models: of other libraries, converted, compiled, exported, traced, scripted and fused by torch."""

import copy
import itertools
import os
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from equivalence import assert_same_model
from torch import nn

import batchnorm
import batchnorm.nn as bnn
from batchnorm.surgery.fused import FusedForward
from every_layer import KINDS, state

os.environ["HF_HUB_OFFLINE"] = "1"


def resnet() -> nn.Module:
    from transformers import ResNetConfig, ResNetModel

    return ResNetModel(ResNetConfig(layer_type="basic", embedding_size=4, hidden_sizes=[8, 12], depths=[1, 1]))


def efficientnet() -> nn.Module:
    from efficientnet_pytorch import EfficientNet

    return EfficientNet.from_name("efficientnet-b0", num_classes=3, width_coefficient=0.1, image_size=32)


def unet() -> nn.Module:
    with warnings.catch_warnings():
        # monai's own imports warn
        warnings.simplefilter("ignore")
        from monai.networks.nets import UNet

    sizes = {"spatial_dims": 2, "in_channels": 3, "out_channels": 2, "channels": (4, 6), "strides": (2,)}
    return UNet(**sizes, num_res_units=1, act="relu", norm="batch")


def logits(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output.last_hidden_state


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    ("build", "part"), [(resnet, "encoder.stages.0*"), (efficientnet, "_blocks.1.*"), (unet, "model.0.*")]
)
def test_a_frozen_part_of_a_model_stays_while_the_rest_trains(build: Callable[[], nn.Module], part: str):
    torch.use_deterministic_algorithms(False)
    model, x = build(), torch.randn(2, 3, 32, 32)
    frozen = batchnorm.freeze(model, part, affine=True)
    assert 0 < len(frozen) < sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=0.1)
    before = state(model)
    with batchnorm.assert_unchanged(model, part):
        for _ in range(2):
            optimizer.zero_grad()
            logits(model.train()(x)).square().mean().backward()
            optimizer.step()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    own = {name for name in before for layer in frozen if name.startswith(f"{layer}.")}
    assert moved == set(before) - own


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_frozen_model_converts_and_is_fused_and_stays_frozen():
    torch.use_deterministic_algorithms(False)
    model, x = resnet(), torch.randn(2, 3, 32, 32)
    model(x)
    batchnorm.freeze(model, "*stages.1*", affine=True)
    original = copy.deepcopy(model)
    _, changes = batchnorm.convert(model)
    assert [change.what for change in changes].count("absorbed relu") == 3
    assert all(isinstance(m, bnn.BatchNorm2d) for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    assert_same_model(original, model, x)
    batchnorm.revert(model)
    with batchnorm.assert_unchanged(model, "*stages.1*"):
        model.train()(x)


def block() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Dropout(0.0))


@pytest.mark.parametrize("order", list(itertools.permutations(["convert", "revert", "freeze", "unfreeze"])), ids=str)
def test_a_fused_block_is_right_in_every_order(order: tuple[str, ...]):
    model = block()
    plain = copy.deepcopy(model)
    for action in order:
        getattr(batchnorm, action)(model)
        if action in ("freeze", "unfreeze"):
            getattr(batchnorm, action)(plain)
        for training in (True, False, True):
            x = torch.randn(5, 4)
            torch.testing.assert_close(model.train(training)(x), plain.train(training)(x))
            torch.testing.assert_close(state(model), state(plain))
        assert model[1].training is plain[1].training


def test_a_block_with_a_frozen_layer_runs_fused_in_training():
    model = block()
    batchnorm.freeze(model)
    batchnorm.convert(model)
    forward = vars(model)["forward"]
    assert isinstance(forward, FusedForward)
    own, seen = type(model).forward, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model), "forward", lambda *args: seen.append(args) or own(*args))
        model.train()(torch.randn(5, 4))
    assert not seen


def test_a_layer_whose_train_somebody_else_replaced_is_still_left_alone():
    model = block()
    model[1].train = lambda mode=True: model[1]
    _, changes = batchnorm.convert(model)
    assert changes[0].reason == "its method train is replaced on the instance"


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


# two depend on data in training: on how many values are valid, and on whether all are finite
WHOLE = [name for name in KINDS if name not in ("masked", "whitening")]


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.usefixtures("fresh_compiler")
def test_a_frozen_layer_compiles_to_one_graph_and_again_when_it_is_unfrozen(name: str):
    kind = KINDS[name]
    layer = kind.trained()
    again = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for change in (batchnorm.freeze, batchnorm.unfreeze):
        change(layer)
        change(again)
        x = kind.input()
        torch.testing.assert_close(kind.call(compiled.train(), x), kind.call(again.train(), x))
        torch.testing.assert_close(state(layer), state(again))


@pytest.mark.parametrize("name", ["torch 2d", "sync", "ours 2d", "whitening"])
def test_a_frozen_layer_is_exported(name: str):
    kind = KINDS[name]
    layer = kind.trained()
    batchnorm.freeze(layer)
    x = kind.input()
    for strict in (True, False):
        exported = torch.export.export(nn.Sequential(layer), (x,), strict=strict)
        torch.testing.assert_close(exported.module()(x), layer(x))


def test_torch_takes_a_frozen_layer_for_what_it_is():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).train()
    x = torch.randn(4, 3, 2, 2)
    model(x)
    batchnorm.freeze(model)
    expected = model(x)
    with warnings.catch_warnings():
        # torch says that it will drop TorchScript
        warnings.simplefilter("ignore", DeprecationWarning)
        for made in (torch.jit.script(model), torch.jit.trace(model, x), torch.fx.symbolic_trace(model)):
            torch.testing.assert_close(made(x), expected)
    folded = torch.nn.utils.fusion.fuse_conv_bn_eval(model[0].eval(), model[1])
    torch.testing.assert_close(folded(x), expected)
    fused = torch.ao.quantization.fuse_modules(model.eval(), [["0", "1"]])
    torch.testing.assert_close(fused(x), expected)
