"""Small networks for rules about live models, each for one trap."""

import copy

import torch
import torch.nn.functional as F
from torch import nn

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
