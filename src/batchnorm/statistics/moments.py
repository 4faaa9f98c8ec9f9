"""Moments of many batches merged into those of all their values."""

import torch
from torch import Tensor

from batchnorm.reference import batch_mean, batch_var, covariance, values_per_channel, var_unbiased
from batchnorm.relatives.whitening import values_of_groups


class Moments:
    """Mean and variance of each feature over all batches so far, in float64 (Chan et al. 1979).

    Args:
        group_size: d features whose covariance is wanted together, (C / d, d, d); None for variances (C,).
    """

    def __init__(self, group_size: int | None = None) -> None:
        self.group_size = group_size
        self.batches = 0
        self.count = 0
        self.mean = self.squares = self.sum_of_means = self.sum_of_vars = torch.zeros((), dtype=torch.float64)

    def add(self, input: Tensor) -> None:
        """Count the values of a batch (N, C, *)."""
        wide = input.detach().double()
        if wide.numel():
            mean = batch_mean(wide)
            self.merge(values_per_channel(input), mean, self.spread(wide, mean))

    def merge(self, count: int, mean: Tensor, var: Tensor) -> None:
        """Count the values of a batch whose mean and spread, divided by ``count``, are known."""
        if count == 0:
            return
        mean, var = mean.detach().double(), var.detach().double()
        total = self.count + count
        delta = mean - self.mean
        self.mean = self.mean + delta * (count / total)
        self.squares = self.squares + var * count + self.product(delta) * (self.count * count / total)
        self.sum_of_means = self.sum_of_means + mean
        self.sum_of_vars = self.sum_of_vars + (var_unbiased(var, count) if count > 1 else var)
        self.count = total
        self.batches += 1

    def spread(self, wide: Tensor, mean: Tensor) -> Tensor:
        """Variances, or covariances of the groups, of one batch."""
        if self.group_size is None:
            return batch_var(wide, mean)
        return torch.stack([covariance(group) for group in values_of_groups(wide, self.group_size)])

    def product(self, delta: Tensor) -> Tensor:
        """What a difference of means adds to a spread."""
        if self.group_size is None:
            return delta.square()
        by_group = delta.view(-1, self.group_size, 1)
        return by_group @ by_group.mT

    def pooled(self) -> tuple[Tensor, Tensor]:
        """Mean and unbiased spread of all values as one population."""
        return self.mean, self.squares / max(self.count - 1, 1)

    def averaged(self) -> tuple[Tensor, Tensor]:
        """Algorithm 2: the averages over the batches of their means and unbiased spreads."""
        return self.sum_of_means / self.batches, self.sum_of_vars / self.batches
