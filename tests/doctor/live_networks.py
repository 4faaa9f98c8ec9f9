"""Small networks for rules about live models, each for one trap."""

import copy

import torch
import torch.nn.functional as F
from torch import nn

import batchnorm.nn as bnn
from every_layer import Kind
from examined import batches, network


class FunctionalDropout(nn.Module):
    def __init__(self, norm, always=False):
        super().__init__()
        self.conv, self.norm, self.always = nn.Conv2d(3, 4, 1, bias=False), norm.BatchNorm2d(4), always

    def forward(self, x):
        return self.norm(F.dropout(self.conv(x), 0.2, True if self.always else self.training))


class Teacher(nn.Module):
    """A student, and a teacher that follows it by parameters alone."""

    def __init__(self, norm):
        super().__init__()
        self.student = network(norm)
        self.teacher = copy.deepcopy(self.student)
        self.student(batches(1)[0])
        for old, new in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            old.data.lerp_(new.data + 0.01, 0.5)

    def forward(self, x):
        return self.student(x)


class Paths(nn.Module):
    """One layer used twice, one never."""

    def __init__(self, norm, second=lambda x: x):
        super().__init__()
        self.shared, self.unused, self.second = norm.BatchNorm1d(3), norm.BatchNorm1d(3), second

    def forward(self, x):
        return torch.cat([self.shared(x), self.shared(self.second(x))], 1)


class Siamese(nn.Module):
    """One layer for two values."""

    def __init__(self, norm, second=lambda x: x):
        super().__init__()
        self.shared, self.second = norm.BatchNorm1d(3), second

    def forward(self, x):
        return torch.cat([self.shared(x), self.shared(self.second(x).flip(0))], 1)


class WithHead(nn.Module):
    """A head that only training uses."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
        self(torch.randn(64, 3))

    def forward(self, x):
        x = self.body(x)
        return (x, self.head(x)) if self.training else x


class Branching(nn.Module):
    """A layer whose input cannot be told without data."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.conv(x if x.sum() > 0 else -x))


class TwoDomains(nn.Module):
    """Every second sample is of the other domain."""

    def __init__(self):
        super().__init__()
        self.layer = bnn.DomainBatchNorm1d(3, 2)

    def forward(self, x):
        return torch.cat([self.layer(x[::2], 0), self.layer(x[1::2], 1)])


class Around(nn.Module):
    """A convolution, a layer of some kind, and an activation."""

    def __init__(self, kind: Kind):
        super().__init__()
        convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(kind.positions) - 1]
        self.conv, self.layer, self.kind = convolution(3, 3, 3, padding=1, bias=False), kind.make(3), kind

    def forward(self, x):
        return torch.relu(self.kind.call(self.layer, self.conv(x)))
