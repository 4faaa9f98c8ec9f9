"""A network and data for the commands that run the user's code."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

SAMPLES = 24
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 5, 3)
        self.bn2 = nn.BatchNorm2d(5)
        self.fc = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)))
        return self.fc(x.mean((2, 3)))


class Twice(nn.Module):
    """A layer under two names, and one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.again = nn.BatchNorm2d(3)
        self.idle = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.first(x))


def make() -> Network:
    return Network()


def on_meta() -> Network:
    with torch.device("meta"):
        return Network()


def lazy() -> Network:
    network = Network()
    network.bn1, network.bn2 = nn.LazyBatchNorm2d(), nn.LazyBatchNorm2d()
    return network


def inputs() -> Tensor:
    return 2 * torch.randn(SAMPLES, 3, 8, 8, generator=torch.Generator().manual_seed(1)) + 1


def loader() -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs with labels, in batches of 8."""
    for batch in inputs().split(8):
        yield batch, torch.zeros(len(batch))


def trained() -> Network:
    """As after some training: weights and statistics that moved."""
    torch.manual_seed(2)
    network = make()
    for _ in range(5):
        network(inputs() + torch.randn(()))
    return network.eval()


def without_statistics(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state_dict whose running statistics were lost."""
    return {name: value for name, value in state.items() if not name.endswith(STATISTICS)}


def save(path: Path, document: object) -> Path:
    torch.save(document, path)
    return path


def population(network: Network, x: Tensor) -> dict[str, Tensor]:
    """The statistics of one batch with all samples, in float64 and straight from the formulas."""
    found = {}
    network, x = network.double(), x.double()
    for name, conv, bn in (("bn1", network.conv1, network.bn1), ("bn2", network.conv2, network.bn2)):
        x = conv(x)
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
        found[f"{name}.running_mean"] = mean
        found[f"{name}.running_var"] = x.var((0, 2, 3), correction=1)
        shape = (1, -1, 1, 1)
        x = (x - mean.view(shape)) / (var + bn.eps).sqrt().view(shape)
        x = torch.relu(x * bn.weight.view(shape) + bn.bias.view(shape))
    return found
