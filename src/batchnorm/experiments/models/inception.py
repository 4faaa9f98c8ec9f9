"""BN-Inception: the network of the paper's ImageNet experiments, Figure 5 of its appendix."""

from collections import OrderedDict
from typing import NamedTuple

import torch
from torch import Tensor, nn

ACTIVATIONS = {"relu": nn.ReLU, "sigmoid": nn.Sigmoid}


class Row(NamedTuple):
    """A row of Figure 5: the features of each branch. ``pool`` is followed by a 1x1 convolution to ``projected``.

    Rows without ``direct`` have stride 2 and pass their input through the pooling: features in are features out.
    """

    direct: int
    reduce: int
    conv: int
    double_reduce: int
    double: int
    pool: str
    projected: int

    @property
    def stride(self) -> int:
        return 1 if self.direct else 2


# Figure 5, with 96 instead of the printed 128 in the last column of 4c and 4d: see BNInception.
FIGURE_5 = {
    "3a": Row(64, 64, 64, 64, 96, "avg", 32),
    "3b": Row(64, 64, 96, 64, 96, "avg", 64),
    "3c": Row(0, 128, 160, 64, 96, "max", 0),
    "4a": Row(224, 64, 96, 96, 128, "avg", 128),
    "4b": Row(192, 96, 128, 96, 128, "avg", 128),
    "4c": Row(160, 128, 160, 128, 160, "avg", 96),
    "4d": Row(96, 128, 192, 160, 192, "avg", 96),
    "4e": Row(0, 128, 192, 192, 256, "max", 0),
    "5a": Row(352, 192, 320, 160, 224, "avg", 128),
    "5b": Row(352, 192, 320, 192, 224, "max", 128),
}
STEM_FEATURES, SECOND_FEATURES = 64, 192
# of the separable convolution that Figure 5 has first
DEPTH_MULTIPLIER = 8


class Layer(NamedTuple):
    """What every convolution of a network has in common."""

    batch_norm: bool
    activation: str

    def after(self, features: int, *convolutions: nn.Conv2d) -> nn.Sequential:
        """``g(BN(Wu))``, or ``g(Wu + b)``: BN stands before the nonlinearity."""
        norm = [nn.BatchNorm2d(features)] if self.batch_norm else []
        inplace = {"inplace": True} if self.activation == "relu" else {}
        return nn.Sequential(*convolutions, *norm, ACTIVATIONS[self.activation](**inplace))

    def convolution(self, in_features: int, features: int, size: int, stride: int = 1) -> nn.Sequential:
        bias = not self.batch_norm  # BN cancels it, and beta takes its place (section 3.2)
        return self.after(features, nn.Conv2d(in_features, features, size, stride, padding=size // 2, bias=bias))

    def separable_convolution(self, in_features: int, features: int, size: int, stride: int) -> nn.Sequential:
        """Each input feature becomes ``DEPTH_MULTIPLIER`` others, then a 1x1 convolution mixes them all."""
        deep = in_features * DEPTH_MULTIPLIER
        by_depth = nn.Conv2d(in_features, deep, size, stride, padding=size // 2, groups=in_features, bias=False)
        return self.after(features, by_depth, nn.Conv2d(deep, features, 1, bias=not self.batch_norm))


class InceptionModule(nn.Module):
    """Four branches side by side, or three with stride 2; their outputs are concatenated."""

    def __init__(self, in_features: int, row: Row, layer: Layer) -> None:
        super().__init__()
        stride = row.stride
        self.branch_1x1 = layer.convolution(in_features, row.direct, 1) if row.direct else None
        self.branch_3x3 = nn.Sequential(
            layer.convolution(in_features, row.reduce, 1),
            layer.convolution(row.reduce, row.conv, 3, stride),
        )
        self.branch_double_3x3 = nn.Sequential(
            layer.convolution(in_features, row.double_reduce, 1),
            layer.convolution(row.double_reduce, row.double, 3),
            layer.convolution(row.double, row.double, 3, stride),
        )
        projection = [layer.convolution(in_features, row.projected, 1)] if row.projected else []
        self.branch_pool = nn.Sequential(pooling(row.pool, stride), *projection)
        self.out_features = row.direct + row.conv + row.double + (row.projected or in_features)

    def forward(self, input: Tensor) -> Tensor:
        branches = (self.branch_1x1, self.branch_3x3, self.branch_double_3x3, self.branch_pool)
        return torch.cat([branch(input) for branch in branches if branch is not None], dim=1)


def pooling(kind: str, stride: int) -> nn.Module:
    """3x3 pooling that keeps the size, or halves it with stride 2. An average counts no padding."""
    if stride == 2:
        # windows may reach over the lower and right border, so that 112 becomes 56
        return nn.MaxPool2d(3, 2, ceil_mode=True)
    return nn.MaxPool2d(3, 1, padding=1) if kind == "max" else nn.AvgPool2d(3, 1, padding=1, count_include_pad=False)


class BNInception(nn.Module):
    """Inception with or without batch normalization before every nonlinearity.

    Args:
        num_classes: outputs of the classifier.
        batch_norm: normalize every convolution's output and drop its bias. Without, the network is the one that the
            paper calls Inception.
        activation: "relu", or "sigmoid" as in the paper's BN-x5-Sigmoid.

    Shape:
        input (N, 3, 224, 224); output (N, num_classes), scores before the softmax. Other sizes work as well: the last
        pooling averages whatever is left.

    Source:
        Ioffe & Szegedy 2015, Figure 5 and section 3.2. The table contradicts itself in places, decided here so:

        - 3c and 4e print their input's size and have stride 2; the next rows show it. Their pooling is 3x3 with stride
          2 and no convolution, the two other branches have stride 2 in their last convolution.
        - 4c and 4d print 128 features after the pooling, which makes 608 and not the printed 576 in all. They have 96
          here, so that these and 4e's printed 1024 come out; Google's implementation in TensorFlow-Slim has 96.
        - The text says 13.6 million parameters. The table gives 11.2 million, and nothing in the paper explains the
          difference.

        The paper names neither initial values (here He's for ReLU), nor the padding of averages (not counted, as in
        TensorFlow), nor eps and momentum (torch's). Of the networks in section 4.2 this is the one without local
        response normalization and without Dropout, which section 4.2.1 removes.

    Example:
        >>> network = BNInception(num_classes=10, batch_norm=True)
        >>> network(torch.randn(2, 3, 64, 64)).shape
        torch.Size([2, 10])
    """

    def __init__(self, num_classes: int = 1000, *, batch_norm: bool, activation: str = "relu") -> None:
        super().__init__()
        layer = Layer(batch_norm, activation)
        stages: OrderedDict[str, nn.Module] = OrderedDict()
        stages["conv1"] = layer.separable_convolution(3, STEM_FEATURES, 7, stride=2)
        stages["pool1"] = pooling("max", 2)
        stages["conv2"] = nn.Sequential(
            layer.convolution(STEM_FEATURES, STEM_FEATURES, 1),
            layer.convolution(STEM_FEATURES, SECOND_FEATURES, 3),
        )
        stages["pool2"] = pooling("max", 2)
        features = SECOND_FEATURES
        for name, row in FIGURE_5.items():
            module = InceptionModule(features, row, layer)
            stages[f"inception_{name}"] = module
            features = module.out_features
        self.stages = nn.Sequential(stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(features, num_classes)
        self.apply(initialize)

    def forward(self, input: Tensor) -> Tensor:
        return self.classifier(self.pool(self.stages(input)).flatten(1))


def initialize(module: nn.Module) -> None:
    """He's initialization of the convolutions; biases begin at 0."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
