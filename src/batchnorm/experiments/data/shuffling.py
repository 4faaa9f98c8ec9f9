"""The order in which a training run sees its images: from the seed, the epoch and the position alone."""

import hashlib
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from batchnorm.errors import DataError


def seed_of(*numbers: int) -> int:
    """A seed from several numbers, mixed so that neighbours have nothing in common.

    Example:
        >>> len({seed_of(seed, step) for seed in range(20) for step in range(20)})
        400
    """
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def epoch_order(shard_sizes: Sequence[int], seed: int, epoch: int, *, within_shards: bool) -> Tensor:
    """Shards in random order, and the images of each shard in random order or as they are.

    Section 4.2.1 of the paper shuffles within shards so that the same images do not always meet in a batch; with
    ``within_shards=False`` they do.

    Args:
        shard_sizes: the number of images of each shard.
        seed: of the run.
        epoch: from 0.
        within_shards: whether the images of a shard change places.

    Returns:
        int64 (n,): every image once.

    Example:
        >>> epoch_order([2, 3, 3], 0, 0, within_shards=False).tolist()
        [2, 3, 4, 5, 6, 7, 0, 1]
        >>> epoch_order([2, 3, 3], 0, 0, within_shards=True).tolist()
        [4, 3, 2, 6, 7, 5, 0, 1]
    """
    generator = torch.Generator().manual_seed(seed_of(seed, epoch))
    starts = list(accumulate(shard_sizes, initial=0))
    parts = []
    for shard in torch.randperm(len(shard_sizes), generator=generator).tolist():
        size = shard_sizes[shard]
        order = torch.randperm(size, generator=generator) if within_shards else torch.arange(size)
        parts.append(starts[shard] + order)
    return torch.cat(parts)


class Order:
    """Which images make up each training step of one process.

    A step of all processes takes the next ``world_size * batch_size`` images of the epoch's order, of which process
    ``rank`` gets those at ``rank, rank + world_size, ...``; what does not fill a last step is left out of that epoch.

    Args:
        shard_sizes: the number of images of each shard.
        seed: of the run; with the epoch it determines the order.
        batch_size: images per process and step.
        within_shards: as in :func:`epoch_order`.
        rank: of this process, from 0.
        world_size: number of processes.

    Raises:
        DataError: the images do not fill one step.

    Example:
        >>> order = Order([4, 4], seed=0, batch_size=2, rank=1, world_size=2)
        >>> order.steps_per_epoch, sorted(order.step(0) + order.step(1))
        (2, [0, 1, 5, 7])
    """

    def __init__(
        self,
        shard_sizes: Sequence[int],
        *,
        seed: int,
        batch_size: int,
        within_shards: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.shard_sizes, self.seed, self.within_shards = shard_sizes, seed, within_shards
        self.rank, self.world_size, self.step_size = rank, world_size, world_size * batch_size
        self.steps_per_epoch = sum(shard_sizes) // self.step_size
        if self.steps_per_epoch == 0:
            raise DataError(
                f"the training set has {sum(shard_sizes):,} images, expected at least the {self.step_size:,} of one "
                "step; take smaller batches"
            )
        self.epoch, self.order = -1, torch.empty(0)

    def step(self, step: int) -> list[int]:
        """The images of a step, counted from 0 over all epochs."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self.epoch:
            self.order = epoch_order(self.shard_sizes, self.seed, epoch, within_shards=self.within_shards)
            self.epoch = epoch
        start = position * self.step_size
        return self.order[start + self.rank : start + self.step_size : self.world_size].tolist()
