"""Why a layer of batch normalization does something else in evaluation than in training, told from its statistics."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# how many times the difference that sampling explains is more than sampling; few batches of few channels raise it
FAR = 3.0
# a difference, in standard deviations or as a share of the variance, below which none matters
SLIGHT = 0.01
# values per channel below which the standard deviation of a batch has an error of 12 % and more, 1 / sqrt(2 n)
FEW_VALUES = 32

# causes for which a layer's own statistics are to blame
AT_FAULT = ("not finite", "initial values left over", "stale average", "other data")
REMEDIES = {
    "not finite": "measure new statistics: batchnorm.recalibrate(model, loader)",
    "initial values left over": "measure the statistics: batchnorm.recalibrate(model, loader), or train longer",
    "stale average": "measure new statistics on training data: batchnorm.recalibrate(model, loader)",
    "other data": "compare the preparation of these data with that of the training data",
    "inherited": "repair the layers before it first",
    "few values": "use larger batches in training, or SyncBatchNorm: evaluation is the better mode here",
    "sampling noise": "nothing: evaluation is the better mode here",
}


@dataclass
class Batches:
    """Mean and biased variance of each batch that a layer saw, in float64.

    Attributes:
        samples: (B,), how many samples were behind each.
        counts: (B,), values per channel.
        means: (B, C).
        variances: (B, C).
    """

    samples: Tensor
    counts: Tensor
    means: Tensor
    variances: Tensor

    def pooled(self) -> tuple[Tensor, Tensor]:
        """Mean and unbiased variance of all values (law of total variance)."""
        share = (self.counts / self.counts.sum())[:, None]
        mean = (share * self.means).sum(0)
        var = (share * (self.variances + (self.means - mean).square())).sum(0)
        total = self.counts.sum()
        return mean, var * (total / (total - 1).clamp(min=1))

    def noise(self) -> tuple[Tensor, Tensor]:
        """The variance of the mean and of the variance of one batch, (C,) each.

        What is drawn are samples, not values: those of one image resemble each other. Of one batch alone nothing tells
        how much batches differ: then each sample counts as one value.
        """
        if len(self.counts) > 1:
            unbiased = self.variances * (self.counts / (self.counts - 1).clamp(min=1))[:, None]
            return self.means.var(0), unbiased.var(0)
        return self.variances[0] / self.samples[0], 2 * self.variances[0].square() / self.samples[0]


@dataclass(frozen=True)
class Cause:
    """Why, and the numbers that say so.

    Attributes:
        name: one of the keys of :data:`REMEDIES`.
        reason: in words.
        mean_off: how far the running mean is from the measured one, in standard deviations; over the channels the root
            of the mean square.
        var_off: the same of the variances, as a share of the measured one.
        noise: how far sampling would bring them, the larger of the two.
    """

    name: str
    reason: str
    mean_off: float
    var_off: float
    noise: float


@dataclass(frozen=True)
class Evidence:
    """What tells the cause of one layer.

    Attributes:
        mean: running mean, (C,), and
        var: running variance, in float64.
        counter: ``num_batches_tracked``, None if there is none.
        momentum: weight of a new batch; None for the cumulative average.
        eps: of the layer.
        by_batch: the batches it saw while all layers normalized by their batches, as in training.
        by_running: those it saw in evaluation.
        sees_data: no weights come before it, so nothing but the data can have moved its input.
    """

    mean: Tensor
    var: Tensor
    counter: int | None
    momentum: float | None
    eps: float
    by_batch: Batches
    by_running: Batches
    sees_data: bool = False


def cause_of(seen: Evidence) -> Cause:
    """Name the cause: what is certain first, then what explains the difference, then what cannot be told apart."""
    target = seen.by_batch.pooled()
    mean_off, var_off = distances(seen, seen.mean, seen.var, *target)
    noise_of_mean, noise_of_var = expected_noise(seen, target[1])
    numbers = (mean_off, var_off, max(noise_of_mean, noise_of_var))

    def cause(name: str, reason: str) -> Cause:
        return Cause(name, reason, *numbers)

    if not (seen.mean.isfinite().all() and seen.var.isfinite().all()) or (seen.var < 0).any():
        return cause("not finite", "its running statistics are NaN, infinite or negative")
    share = share_of_initial_values(seen)
    if share == 1:
        return cause("initial values left over", "its running statistics are those of a new layer, mean 0, variance 1")
    off = f"they are {mean_off:.2g} sigma and {var_off:.0%} of the variance from what these batches have"
    limits = [max(SLIGHT, far_of(seen) * noise) for noise in (noise_of_mean, noise_of_var)]
    if not (mean_off <= limits[0] and var_off <= limits[1]):
        # a thousandth of variance 1 is much where the variance is a thousandth
        if share > 0 and explained_by_initial_values(seen, share, target):
            return cause("initial values left over", f"{share:.2g} of its running statistics is mean 0, variance 1")
        if seen.sees_data:
            return cause("other data", f"no weights come before it, and {off}: these are not the data of its training")
        why = "the weights moved after the average was taken, or these are other data"
        return cause("stale average", f"{off}, where sampling explains {numbers[2]:.2g}: {why}")
    in_evaluation = distances(seen, *seen.by_running.pooled(), *target)
    # NaN is far, too
    if not (in_evaluation[0] <= limits[0] and in_evaluation[1] <= limits[1]):
        return cause("inherited", "its own statistics fit, but layers before it hand it something else in evaluation")
    count = int(seen.by_batch.counts.min())
    if count < FEW_VALUES:
        return cause("few values", f"{count} values per channel make a noisy mean and variance of a batch")
    return cause("sampling noise", "its running statistics fit what these batches have")


def distances(seen: Evidence, mean: Tensor, var: Tensor, true_mean: Tensor, true_var: Tensor) -> tuple[float, float]:
    """How far a mean and a variance are from the true ones, in standard deviations and as a share of the variance."""
    wide = true_var + seen.eps
    return rms((mean - true_mean) / wide.sqrt()), rms((var - true_var) / wide)


def rms(values: Tensor) -> float:
    return values.square().mean().sqrt().item() if values.numel() else 0.0


def expected_noise(seen: Evidence, true_var: Tensor) -> tuple[float, float]:
    r"""How far apart sampling brings running and measured statistics.

    .. math:: \sqrt{s^2 \Big(\frac{1}{B} + \frac{m}{2 - m}\Big)}

    of B batches with the variance :math:`s^2`, and an average with momentum m over batches like these.
    """
    of_mean, of_var = seen.by_batch.noise()
    wide = true_var + seen.eps
    weight = 1 / len(seen.by_batch.counts)
    if seen.momentum is not None:
        # one batch that was pasted in has the noise of one batch; so has anything odd
        weight += seen.momentum / (2 - seen.momentum) if 0 <= seen.momentum <= 1 else 1.0
    elif seen.counter:
        weight += 1 / seen.counter
    return tuple(  # pyright: ignore[reportReturnType]
        (noise * weight).mean().sqrt().item() if noise.numel() else 0.0
        for noise in (of_mean / wide, of_var / wide.square())
    )


def far_of(seen: Evidence) -> float:
    """What is estimated from few differences may be too small by chance: 3 from many, 6 from four."""
    number = max(len(seen.by_batch.counts) - 1, 1) * max(len(seen.mean), 1)
    return FAR * (1 + 2 / number**0.5)


def share_of_initial_values(seen: Evidence) -> float:
    r"""How much of mean 0 and variance 1 is in the running statistics: :math:`(1 - m)^k` after k batches."""
    if not seen.mean.any() and (seen.var == 1).all():
        return 1.0
    # a counter at 0 with statistics that moved was lost on the way
    if not seen.counter or seen.momentum is None or not 0 <= seen.momentum <= 1:
        return 0.0
    return (1 - seen.momentum) ** min(seen.counter, 10**6)


def explained_by_initial_values(seen: Evidence, share: float, target: tuple[Tensor, Tensor]) -> bool:
    """Whether at least half of the difference is gone without the share of mean 0 and variance 1."""
    without = (seen.mean / (1 - share), (seen.var - share) / (1 - share))
    before, after = (sum(x * x for x in distances(seen, *pair, *target)) for pair in ((seen.mean, seen.var), without))
    return after <= before / 4


def evidence_of(layer: Any, by_batch: Batches, by_running: Batches, *, sees_data: bool) -> Evidence:
    """Read what a layer has; of a whitening layer the diagonal of its covariance."""
    cov = getattr(layer, "running_cov", None)
    var = layer.running_var if cov is None else cov.diagonal(dim1=-2, dim2=-1).flatten()
    counter = getattr(layer, "num_batches_tracked", None)
    return Evidence(
        layer.running_mean.detach().double().cpu(),
        var.detach().double().cpu(),
        None if counter is None else int(counter),
        layer.momentum,
        layer.eps,
        by_batch,
        by_running,
        sees_data,
    )


def stacked(rows: list[tuple[int, int, Tensor, Tensor]]) -> Batches:
    """Of (samples, values per channel, mean, variance) of each batch."""
    samples, counts, means, variances = zip(*rows, strict=True)
    numbers = torch.tensor([samples, counts], dtype=torch.float64)
    return Batches(numbers[0], numbers[1], torch.stack(means).cpu(), torch.stack(variances).cpu())
