"""BatchRenorm1d, BatchRenorm2d, BatchRenorm3d."""

from typing import Any

import torch
from torch import Tensor

from batchnorm import functional
from batchnorm._ops.choice import Choice, choose
from batchnorm._ops.running import snapshot
from batchnorm.nn.batchnorm import FusedBatchNorm
from batchnorm.reference import widen


class BatchRenorm(FusedBatchNorm):
    """What the three layers share: the correction, and how far it may go at which step."""

    schedule_step: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.01,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        rmax: float = 3.0,
        dmax: float = 5.0,
        warmup_steps: int = 5000,
        rmax_steps: int = 40_000,
        dmax_steps: int = 25_000,
        bias: bool = True,
        activation: str | None = None,
        implementation: str = "auto",
    ) -> None:
        if not rmax >= 1 or not dmax >= 0:
            raise ValueError(f"expected rmax of at least 1 and dmax of at least 0, got rmax={rmax} and dmax={dmax}")
        if not 0 <= warmup_steps <= min(rmax_steps, dmax_steps):
            raise ValueError(
                f"expected 0 <= warmup_steps <= rmax_steps and dmax_steps, got warmup_steps={warmup_steps}, "
                f"rmax_steps={rmax_steps} and dmax_steps={dmax_steps}"
            )
        super().__init__(
            num_features,
            eps,
            momentum,
            affine,
            track_running_stats,
            device,
            dtype,
            bias=bias,
            activation=activation,
            implementation=implementation,
        )
        self.rmax, self.dmax = rmax, dmax
        self.warmup_steps, self.rmax_steps, self.dmax_steps = warmup_steps, rmax_steps, dmax_steps
        self.register_buffer("schedule_step", torch.zeros((), dtype=torch.int64, device=device))

    def limits(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """rmax and dmax of the next training step."""
        after_warmup = (self.schedule_step + 1 - self.warmup_steps).to(dtype)
        shares = [
            (after_warmup / max(last - self.warmup_steps, 1)).clamp(0, 1) for last in (self.rmax_steps, self.dmax_steps)
        ]
        return 1 + shares[0] * (self.rmax - 1), shares[1] * self.dmax

    def train_and_track(
        self,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float | Tensor,
        num_batches_tracked: Tensor | None,
        choice: Choice,
    ) -> Tensor:
        """Batch normalization with the correction inside gamma and beta."""
        if running_mean is None or running_var is None or not input.numel():
            return super().train_and_track(
                input, weight, bias, residual, running_mean, running_var, momentum, num_batches_tracked, choice
            )
        r, d = self.correction(input, weight, bias, running_mean, running_var)
        if torch.compiler.is_compiling():
            # both depend on buffers that move below
            r, d = snapshot(r, d)
        shift = d if weight is None else weight * d
        bias = shift if bias is None else shift + bias
        weight = r if weight is None else weight * r
        choice = choose(
            self.implementation, input, True, residual, self.activation, weight, bias, running_mean, running_var
        )
        output = super().train_and_track(
            input, weight, bias, residual, running_mean, running_var, momentum, num_batches_tracked, choice
        )
        self.schedule_step.add_(1)
        return output

    @torch.no_grad()
    def correction(
        self, input: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor, running_var: Tensor
    ) -> tuple[Tensor, Tensor]:
        """r and d of a batch; also checks the tensors, before anything is changed."""
        # the output is dropped: a kernel that normalizes is still much faster than torch.var_mean
        _, mean, var, _ = functional.normalize_batch(
            input, weight, bias, running_mean, running_var, None, None, self.eps, self.implementation
        )
        sigma = (widen(running_var) + self.eps).sqrt()
        rmax, dmax = self.limits(mean.dtype)
        r = ((var + self.eps).sqrt() / sigma).clamp(1 / rmax, rmax)
        return r, ((mean - running_mean) / sigma).clamp(-dmax, dmax)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        # torch's constructor comes here too, before there is a schedule
        if "schedule_step" in self._buffers:
            self.schedule_step.zero_()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        state_dict.setdefault(f"{prefix}schedule_step", torch.zeros((), dtype=torch.int64))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, rmax={self.rmax}, dmax={self.dmax}, warmup_steps={self.warmup_steps}, "
            f"rmax_steps={self.rmax_steps}, dmax_steps={self.dmax_steps}"
        )


class BatchRenorm1d(BatchRenorm, torch.nn.BatchNorm1d):
    r"""Batch renormalization of (N, C) or (N, C, L): training normalizes nearly as evaluation will.

    .. math:: y = \mathrm{act}\Big(\gamma \Big(\frac{x - \mu_B}{\sigma_B} r + d\Big) + \beta + \mathrm{residual}\Big),
        \quad r = \mathrm{clip}_{[1/r_{max}, r_{max}]}\Big(\frac{\sigma_B}{\sigma}\Big), \quad
        d = \mathrm{clip}_{[-d_{max}, d_{max}]}\Big(\frac{\mu_B - \mu}{\sigma}\Big)

    with :math:`\sigma_B = \sqrt{\sigma_B^2 + \epsilon}` of the batch and :math:`\mu`, :math:`\sigma =
    \sqrt{\mathrm{running\_var} + \epsilon}` as they were before it; the running variance is unbiased, as BN's. No
    gradient passes through r and d. Where nothing is clipped, :math:`y = \gamma (x - \mu) / \sigma + \beta`.

    Training: step t, counted from 1, is clipped at :math:`r_{max} = 1, d_{max} = 0` (BN) up to ``warmup_steps``;
    then both grow linearly, up to ``rmax`` at step ``rmax_steps`` and ``dmax`` at ``dmax_steps``. The buffer
    ``schedule_step`` counts the steps that were taken and is part of the state_dict, so a resumed training goes on
    where it was; an empty batch, a forward that fails and ``batchnorm.recalibrate`` do not count. Evaluation and
    frozen: as :class:`BatchNorm1d`. Without running statistics there is nothing to correct towards: training is BN's.

    Args:
        num_features: C.
        eps: added to the variances; positive.
        momentum: weight of the *new* batch in the running statistics; None for the cumulative average.
        affine: learn gamma (``weight``) and beta (``bias``).
        track_running_stats: keep running statistics.
        device: of parameters and buffers.
        dtype: of parameters and buffers.
        rmax: largest r; the smallest is its inverse. At least 1.
        dmax: largest absolute d, in running standard deviations. At least 0.
        warmup_steps: training steps without a correction.
        rmax_steps: the step from which on ``rmax`` holds; not before ``warmup_steps``.
        dmax_steps: the step from which on ``dmax`` holds; not before ``warmup_steps``.
        bias: learn beta; only with ``affine``.
        activation: what follows the normalization, as in :class:`BatchNorm1d`.
        implementation: as in :class:`BatchNorm1d`.

    Shape:
        input and residual (N, C) or (N, C, L); output the same.

    Raises:
        ValueError: as :class:`BatchNorm1d`; limits or steps of the schedule out of their range.
        RuntimeError: as :class:`BatchNorm1d`.

    Same as torch.nn: evaluation and running statistics, with a momentum of 0.01. A state_dict of ``BatchNorm1d``
    loads; the schedule is then at its beginning. ``BatchNorm1d`` loads ours with ``strict=False``, since it does not
    know ``schedule_step``.

    Source:
        Ioffe 2017 (arXiv:1702.03275), Algorithm 1 and section 4, with the schedule and the momentum given there.

    Example:
        >>> layer = BatchRenorm1d(1, warmup_steps=0, rmax_steps=0, dmax_steps=0)
        >>> layer(torch.tensor([[1.0], [2.0]])).detach().flatten()
        tensor([1.0000, 2.0000])
        >>> layer.schedule_step
        tensor(1)
    """


class BatchRenorm2d(BatchRenorm, torch.nn.BatchNorm2d):
    """Batch renormalization of (N, C, H, W). See :class:`BatchRenorm1d`.

    Example:
        >>> BatchRenorm2d(3, activation="relu")(torch.randn(4, 3, 5, 5)).shape
        torch.Size([4, 3, 5, 5])
    """


class BatchRenorm3d(BatchRenorm, torch.nn.BatchNorm3d):
    """Batch renormalization of (N, C, D, H, W). See :class:`BatchRenorm1d`.

    Example:
        >>> BatchRenorm3d(2)(torch.randn(4, 2, 3, 3, 3)).shape
        torch.Size([4, 2, 3, 3, 3])
    """
