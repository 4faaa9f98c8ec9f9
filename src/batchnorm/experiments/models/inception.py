"""BN-Inception: the network of the paper's ImageNet experiments, Figure 5 of its appendix."""

from collections import OrderedDict
from typing import NamedTuple

import torch
from torch import Tensor, nn

from batchnorm.nn import BatchNorm2d, PerActivationBatchNorm

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

    def times(self, width: float) -> "Row":
        """The row of a network with more or fewer features."""
        numbers = {name: scaled(value, width) for name, value in self._asdict().items() if name != "pool"}
        return self._replace(**numbers)

    @property
    def stride(self) -> int:
        return 1 if self.direct else 2


def scaled(features: int, width: float) -> int:
    """Whole multiples of 8 features, at least 8; 0 stays."""
    return features and max(8, round(features * width / 8) * 8)


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
# the rows in which the table contradicts itself, and what it prints there
PRINTED_PROJECTION = {"4c": 128, "4d": 128}
# of the separable convolution that Figure 5 has first
DEPTH_MULTIPLIER = 8


class Layer(NamedTuple):
    """What every convolution of a network has in common."""

    batch_norm: bool
    activation: str
    fused: bool = True

    def after(self, features: int, *convolutions: nn.Conv2d) -> nn.Sequential:
        """``g(BN(Wu))``, or ``g(Wu + b)``: BN stands before the nonlinearity."""
        if self.batch_norm and self.fused:
            return nn.Sequential(*convolutions, BatchNorm2d(features, activation=self.activation))
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


class Inception(nn.Module):
    """Inception with or without batch normalization before every nonlinearity.

    Args:
        num_classes: outputs of the classifier.
        batch_norm: normalize every convolution's output and drop its bias. Without, the network is the one that the
            paper calls Inception.
        activation: "relu", or "sigmoid" as in the paper's BN-x5-Sigmoid.
        width: multiplies the features of every layer; they are rounded to multiples of 8.
        dropout: share of the last pooling's outputs that training drops.
        local_response_norm: GoogLeNet's, after the first pooling and before the second; section 4.2.1 removes it.
        initial_scale: multiplies the initial weights of all convolutions, as some networks of section 4.2.3 have it.
        per_activation_size: side of the input images. The last module then normalizes every activation on its own, as
            some networks of section 4.2.3 do, and the network takes images of this size alone.
        printed_projection: 128 features after the pooling of 4c and 4d, as the table prints, instead of 96.
        separable_stem: the first convolution is separable, as the table says; otherwise an ordinary one.
        fused: layers of ``batchnorm.nn`` with the activation inside; otherwise those of torch.nn, one by one.

    Shape:
        input (N, 3, 224, 224); output (N, num_classes), scores before the softmax. Other sizes work as well: the last
        pooling averages whatever is left.

    Source:
        Ioffe & Szegedy 2015, Figure 5 and sections 3.2, 4.2 and 4.2.3. The table contradicts itself in places, decided
        here so:

        - 3c and 4e print their input's size and have stride 2; the next rows show it. Their pooling is 3x3 with stride
          2 and no convolution, the two other branches have stride 2 in their last convolution.
        - 4c and 4d print 128 features after the pooling, which makes 608 and not the printed 576 in all. They have 96
          here, so that these and 4e's printed 1024 come out; Google's implementation in TensorFlow-Slim has 96.
        - The text says 13.6 million parameters. The table gives 11.2 million, and nothing in the paper explains the
          difference.

        The paper names neither initial values (here He's for ReLU), nor the padding of averages (not counted, as in
        TensorFlow), nor eps and momentum (torch's). The places and constants of local response normalization are
        those of Szegedy et al. 2014 (GoogLeNet, Figure 3) and of its usual implementations.

    Example:
        >>> network = Inception(num_classes=10, width=0.5)
        >>> network(torch.randn(2, 3, 64, 64)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        num_classes: int = 1000,
        *,
        batch_norm: bool = True,
        activation: str = "relu",
        width: float = 1.0,
        dropout: float = 0.0,
        local_response_norm: bool = False,
        initial_scale: float = 1.0,
        per_activation_size: int | None = None,
        printed_projection: bool = False,
        separable_stem: bool = True,
        fused: bool = True,
    ) -> None:
        super().__init__()
        layer = Layer(batch_norm, activation, fused)
        stem, second = scaled(STEM_FEATURES, width), scaled(SECOND_FEATURES, width)
        first = layer.separable_convolution if separable_stem else layer.convolution
        responses = [nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75)] if local_response_norm else []
        stages: OrderedDict[str, nn.Module] = OrderedDict()
        stages["conv1"] = first(3, stem, 7, stride=2)
        stages["pool1"] = nn.Sequential(pooling("max", 2), *responses)
        stages["conv2"] = nn.Sequential(layer.convolution(stem, stem, 1), layer.convolution(stem, second, 3))
        stages["pool2"] = nn.Sequential(*responses, pooling("max", 2))
        features = second
        for name, row in FIGURE_5.items():
            if printed_projection and name in PRINTED_PROJECTION:
                row = row._replace(projected=PRINTED_PROJECTION[name])
            module = InceptionModule(features, row.times(width), layer)
            stages[f"inception_{name}"] = module
            features = module.out_features
        self.stages = nn.Sequential(stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(features, num_classes)
        self.apply(initialize)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.data.mul_(initial_scale)
        if per_activation_size is not None:
            normalize_each_activation(self.stages[-1], last_size(per_activation_size))

    def forward(self, input: Tensor) -> Tensor:
        return self.classifier(self.dropout(self.pool(self.stages(input)).flatten(1)))


def last_size(size: int) -> int:
    """The side of the last feature maps: five layers halve it."""
    for _ in range(5):
        size = -(-size // 2)
    return size


def normalize_each_activation(module: nn.Module, size: int) -> None:
    """Exchange the fused layers of a module whose feature maps are ``size`` x ``size``."""
    for block in list(module.modules()):
        for name, layer in list(block.named_children()):
            if isinstance(layer, BatchNorm2d) and layer.activation is not None:
                shape = (layer.num_features, size, size)
                block.add_module(name, PerActivationBatchNorm(shape, activation=layer.activation))


def initialize(module: nn.Module) -> None:
    """He's initialization of the convolutions; biases begin at 0."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
