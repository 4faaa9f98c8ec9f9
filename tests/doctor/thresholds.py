"""Statistics of networks of three libraries after a short training: where the limits of BN103 and BN104 come from.

    PYTHONPATH=tests python tests/doctor/thresholds.py [NETWORK ...]

Networks have random weights, as published ones are not in the packages, and train on MNIST for 150 steps. About ten
minutes for all of them on one core. Prints a table.
"""

import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchnorm.experiments.data.mnist import load_mnist

STEPS, BATCH, CLASSES = 150, 32, 10
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, 0.01, momentum=0.9, weight_decay=5e-4),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, 1e-3),
}


def transformers_network(name: str, **config: Any) -> nn.Module:
    import transformers

    settings = getattr(transformers, f"{name}Config")(num_labels=CLASSES, **config)
    return getattr(transformers, f"{name}ForImageClassification")(settings)


def efficientnet() -> nn.Module:
    from efficientnet_pytorch import EfficientNet

    return EfficientNet.from_name("efficientnet-b0", num_classes=CLASSES)


def monai_network(name: str) -> nn.Module:
    from monai.networks import nets

    if name == "unet":
        network = nets.UNet(2, 3, CLASSES, (16, 32, 64, 128), (2, 2, 2), num_res_units=2, norm="batch")
        return nn.Sequential(network, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    if name == "resnet18":
        return nets.resnet18(spatial_dims=2, n_input_channels=3, num_classes=CLASSES)
    return nets.DenseNet121(2, 3, CLASSES)


SIZES = {"embedding_size": 32, "hidden_sizes": [32, 64, 128, 256]}
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "ResNet, basic": lambda: transformers_network("ResNet", **SIZES, depths=[2, 2, 2, 2], layer_type="basic"),
    "ResNet, bottleneck": lambda: transformers_network(
        "ResNet", embedding_size=32, hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2]
    ),
    "RegNet": lambda: transformers_network("RegNet", **SIZES, depths=[1, 2, 4, 2], groups_width=16),
    "MobileNetV1": lambda: transformers_network("MobileNetV1", image_size=32, depth_multiplier=0.5),
    "MobileNetV2": lambda: transformers_network("MobileNetV2", image_size=32, depth_multiplier=0.5),
    "EfficientNet": lambda: transformers_network(
        "EfficientNet", image_size=32, width_coefficient=0.5, depth_coefficient=0.5, hidden_dim=640
    ),
    "efficientnet_pytorch b0": efficientnet,
    "monai DenseNet121": lambda: monai_network("densenet121"),
    "monai UNet": lambda: monai_network("unet"),
    "monai ResNet18": lambda: monai_network("resnet18"),
}


def scores(model: nn.Module, pixels: Tensor) -> Tensor:
    x = F.pad(pixels.view(-1, 1, 28, 28), (2, 2, 2, 2)).expand(-1, 3, -1, -1) * 3 - 0.4
    output = model(x)
    return getattr(output, "logits", output)


def measure(make: Callable[[], nn.Module], optimizer: str) -> list[str]:
    """Accuracy, eps, and of all channels the largest factor of evaluation, smallest variance and weight."""
    torch.manual_seed(0)
    data = load_mnist(input="gray")
    model = make().train()
    stepper = OPTIMIZERS[optimizer](model.parameters())
    for _ in range(STEPS):
        chosen = torch.randint(len(data.train_images), (BATCH,))
        loss = F.cross_entropy(scores(model, data.inputs(data.train_images[chosen])), data.train_labels[chosen])
        stepper.zero_grad()
        loss.backward()
        stepper.step()
    model.eval()
    with torch.no_grad():
        right = scores(model, data.inputs(data.test_images[:500])).argmax(1) == data.test_labels[:500]
    layers: list[Any] = [layer for layer in model.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    weight = torch.cat([layer.weight.detach().double().abs() for layer in layers])
    var = torch.cat([layer.running_var.double() for layer in layers])
    eps = layers[0].eps
    factor = (weight / (var + eps).sqrt()).max()
    numbers = (right.float().mean(), eps, factor, var.min(), weight.min())
    return [str(len(weight)), *(f"{float(number):.3g}" for number in numbers)]


def main() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print("| network | optimizer | channels | accuracy | eps | largest factor | least variance | least weight |")
    print("|---|---|---|---|---|---|---|---|")
    for name in sys.argv[1:] or NETWORKS:
        for optimizer in OPTIMIZERS:
            print("|", " | ".join([name, optimizer, *measure(NETWORKS[name], optimizer)]), "|", flush=True)


if __name__ == "__main__":
    main()
