"""Moments of many batches merged into those of all their values."""

import torch
from torch import Tensor

from batchnorm.reference import batch_mean, batch_var, covariance, values_per_channel
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
        # of the squares (C,), those of the differences between the batches' means
        self.between = self.mean

    def add(self, input: Tensor) -> None:
        """Count the values of a batch (N, C, *)."""
        wide = input.detach().double()
        if wide.numel():
            mean = batch_mean(wide)
            self.merge(values_per_channel(input), mean, self.spread(wide, mean))

    def merge(self, count: int, mean: Tensor, var: Tensor) -> None:
        """Count the values of a batch whose mean and spread, divided by ``count``, are known."""
        self.merge_squares(count, mean.detach().double(), var.detach().double() * count)

    def merge_squares(self, count: int, mean: Tensor, squares: Tensor) -> None:
        """Count the values of a batch whose mean, and squares about it, summed, are known in float64."""
        if count == 0:
            return
        batch = Moments(self.group_size)
        batch.batches, batch.count, batch.mean, batch.squares = 1, count, mean, squares
        batch.sum_of_means, batch.sum_of_vars = mean, squares / max(count - 1, 1)
        self.join(batch)

    def join(self, other: "Moments") -> None:
        """Count the batches of other moments, which are as good as lost then."""
        if other.count == 0:
            return
        if self.count == 0:
            vars(self).update(vars(other))
            return
        total = self.count + other.count
        delta = other.mean - self.mean
        spread = self.product(delta) * (self.count * other.count / total)
        self.mean = self.mean + delta * (other.count / total)
        self.squares = self.squares + other.squares + spread
        self.between = self.between + other.between + diagonal(spread)
        self.sum_of_means = self.sum_of_means + other.sum_of_means
        self.sum_of_vars = self.sum_of_vars + other.sum_of_vars
        self.count = total
        self.batches += other.batches

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

    def standard_error(self) -> float:
        r"""The largest of the channels' standard errors of the mean, in standard deviations; NaN of one batch.

        .. math:: \sqrt{\frac{1}{N} \cdot \frac{\sum_b n_b (\mu_b - \mu)^2}{B - 1}} \Big/ \sigma

        What was drawn are B batches, not N values: those of one image resemble each other.
        """
        if self.batches < 2 or self.mean.numel() == 0:
            return float("nan")
        squares = diagonal(self.squares)
        # a channel without variance has a mean without error
        shares = torch.where(squares > 0, self.between / squares, squares * 0)
        return (shares.max() * (self.count - 1) / self.count / (self.batches - 1)).sqrt().item()

    def packed(self, num_features: int) -> Tensor:
        """Everything in one vector, for another process; of the same length with and without batches."""
        d = self.group_size or 1
        fields = [self.mean, self.between, self.sum_of_means, self.squares, self.sum_of_vars]
        sizes = [num_features] * 3 + [num_features * d] * 2
        counts = self.mean.new_tensor([self.count, self.batches])
        return torch.cat([counts, *(field.expand(size) if field.dim() == 0 else field.flatten()
                                    for field, size in zip(fields, sizes, strict=True))])  # fmt: skip

    @staticmethod
    def unpacked(vector: Tensor, num_features: int, group_size: int | None) -> "Moments":
        """What :meth:`packed` packed."""
        d = group_size or 1
        counts, *fields = vector.split([2] + [num_features] * 3 + [num_features * d] * 2)
        moments = Moments(group_size)
        moments.count, moments.batches = (int(number) for number in counts.tolist())
        shape = (num_features,) if group_size is None else (num_features // d, d, d)
        moments.mean, moments.between, moments.sum_of_means = fields[:3]
        moments.squares, moments.sum_of_vars = (field.view(shape) for field in fields[3:])
        return moments


def diagonal(spread: Tensor) -> Tensor:
    """The variances (C,) of variances or covariances."""
    return spread if spread.dim() < 3 else spread.diagonal(dim1=-2, dim2=-1).flatten()
