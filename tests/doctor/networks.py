"""Small networks that the corpus of checkpoints is made of, ours and those of other libraries."""

import copy
import os
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

STEPS = 12


class Block(nn.Module):
    """Residual, of two layers; ``calls`` runs it again on its output."""

    def __init__(self, channels: int, layer: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = layer(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = layer(channels)
        self.calls, self.recomputed = 1, False

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.calls):
            x = checkpoint(self.body, x, use_reentrant=False) if self.recomputed else self.body(x)
        return x

    def body(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


class Network(nn.Module):
    """Five BN layers: bn1, block1.bn1, block1.bn2, block2.bn1, block2.bn2."""

    def __init__(self, layer: Callable[..., nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = layer(8)
        self.block1, self.block2 = Block(8, layer), Block(8, layer)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.fc(self.block2(self.block1(x)).mean((2, 3)))


def examples(count: int, samples: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of noise whose mean tells the class, always the same."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        labels = torch.randint(4, (samples,), generator=generator)
        x = torch.randn(samples, 3, size, size, generator=generator)
        yield x + labels.view(-1, 1, 1, 1) - 1.5, labels


def train(model: nn.Module, steps: int = STEPS, size: int = 6, learning_rate: float = 0.02) -> nn.Module:
    """A few steps on :func:`examples`."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], learning_rate, momentum=0.9)
    for x, labels in examples(steps, 16, size):
        output = model(x)
        loss = nn.functional.cross_entropy(getattr(output, "logits", output), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


def as_it_is(model: Network) -> None:
    pass


def trained(
    prepare: Callable[[Network], object] = as_it_is, layer: Callable[..., nn.Module] = nn.BatchNorm2d
) -> Network:
    return copy.deepcopy(trained_once(prepare, layer))


@cache
def trained_once(prepare: Callable[[Network], object], layer: Callable[..., nn.Module]) -> Any:
    model: Any = seeded(lambda: Network(layer))
    prepare(model)
    return train(model)


def of_a_library(make: Callable[[], nn.Module], steps: int = STEPS) -> nn.Module:
    """A network of another library, with random weights, after a few steps."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    with warnings.catch_warnings():
        # their imports warn
        warnings.simplefilter("ignore")
        model = seeded(make)
    return train(model, steps, size=32, learning_rate=0.01)


def transformers_resnet() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    return ResNetForImageClassification(
        ResNetConfig(embedding_size=4, hidden_sizes=[8, 12], depths=[2, 1], num_labels=4)
    )


def transformers_regnet() -> nn.Module:
    from transformers import RegNetConfig, RegNetForImageClassification

    sizes = {"embedding_size": 4, "hidden_sizes": [8, 12], "depths": [2, 1], "groups_width": 4}
    return RegNetForImageClassification(RegNetConfig(**sizes, num_labels=4))


def transformers_mobilenet_v1() -> nn.Module:
    from transformers import MobileNetV1Config, MobileNetV1ForImageClassification

    return MobileNetV1ForImageClassification(MobileNetV1Config(depth_multiplier=0.1, num_labels=4))


def transformers_mobilenet_v2() -> nn.Module:
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    sizes = {"depth_multiplier": 0.1, "min_depth": 4, "depth_divisible_by": 4}
    return MobileNetV2ForImageClassification(MobileNetV2Config(**sizes, num_labels=4))


def transformers_efficientnet() -> nn.Module:
    from transformers import EfficientNetConfig, EfficientNetForImageClassification

    sizes = {"width_coefficient": 0.1, "depth_coefficient": 0.3, "hidden_dim": 128, "depth_divisor": 4}
    return EfficientNetForImageClassification(EfficientNetConfig(image_size=32, num_labels=4, **sizes))


def efficientnet() -> nn.Module:
    from efficientnet_pytorch import EfficientNet

    return EfficientNet.from_name("efficientnet-b0", num_classes=4, width_coefficient=0.1, image_size=32)


def monai_densenet() -> nn.Module:
    from monai.networks.nets.densenet import DenseNet

    return DenseNet(2, 3, 4, init_features=8, growth_rate=4, block_config=(2, 2))


def monai_resnet() -> nn.Module:
    from monai.networks.nets.resnet import ResNet

    return ResNet("basic", [1, 1, 1, 1], [4, 8, 8, 12], spatial_dims=2, n_input_channels=3, num_classes=4)


def monai_unet() -> nn.Module:
    from monai.networks.nets.unet import UNet

    network = UNet(2, 3, 4, (4, 6, 8), (2, 2), num_res_units=2, norm="batch")
    return nn.Sequential(network, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def monai_unet_3d() -> nn.Module:
    from monai.networks.nets.unet import UNet

    return UNet(3, 1, 2, (4, 6), (2,), num_res_units=1, norm="batch")


MODELS = (
    transformers_resnet,
    transformers_regnet,
    efficientnet,
    monai_densenet,
    monai_resnet,
    monai_unet,
)
MOBILENETS = (transformers_mobilenet_v1, transformers_mobilenet_v2)
