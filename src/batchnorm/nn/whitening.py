"""Whitening1d, Whitening2d, Whitening3d."""

from typing import Any

import torch
from torch import Tensor, nn

from batchnorm._ops.dtypes import statistics_dtype
from batchnorm._ops.whiten import check_group_size, check_method, train_and_track, whiten_inference
from batchnorm.nn.batchnorm import traced


class Whitening(nn.Module):
    """What the three layers share: everything but the numbers of dimensions that they accept."""

    dimensions: tuple[int, ...]
    weight: nn.Parameter | None
    bias: nn.Parameter | None
    running_mean: Tensor | None
    running_cov: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        method: str = "zca",
        group_size: int | None = None,
        iterations: int = 5,
        shrinkage: float = 0.0,
    ) -> None:
        super().__init__()
        check_method(method, eps, iterations, shrinkage)
        d = check_group_size(num_features, group_size)
        self.num_features, self.eps, self.momentum = num_features, eps, momentum
        self.affine, self.track_running_stats = affine, track_running_stats
        self.method, self.group_size, self.iterations, self.shrinkage = method, group_size, iterations, shrinkage

        def parameter(exists: bool) -> nn.Parameter | None:
            return nn.Parameter(torch.empty(num_features, device=device, dtype=dtype)) if exists else None

        def buffer(*shape: int, dtype: Any = dtype) -> Tensor | None:
            return torch.empty(shape, device=device, dtype=dtype) if track_running_stats else None

        self.register_parameter("weight", parameter(affine))
        self.register_parameter("bias", parameter(affine and bias))
        self.register_buffer("running_mean", buffer(num_features))
        self.register_buffer("running_cov", buffer(num_features // d, d, d))
        self.register_buffer("num_batches_tracked", buffer(dtype=torch.long))
        self.reset_parameters()

    def reset_running_stats(self) -> None:
        """Mean 0, covariance the identity: evaluation before training changes nothing but a factor of nearly 1."""
        if self.running_mean is not None and self.running_cov is not None and self.num_batches_tracked is not None:
            self.running_mean.zero_()
            self.running_cov.zero_().diagonal(dim1=-2, dim2=-1).fill_(1)
            self.num_batches_tracked.zero_()

    def reset_parameters(self) -> None:
        self.reset_running_stats()
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        """Whiten ``input``."""
        if not isinstance(input, Tensor):
            return traced(self, input)
        if input.dim() not in self.dimensions:
            wanted = " or ".join(f"{dim}D" for dim in self.dimensions)
            raise ValueError(f"expected {wanted} input (got {input.dim()}D input)")
        running_mean, running_cov = self.running_mean, self.running_cov
        tensors = self.weight, self.bias
        how = check_method(self.method, self.eps, self.iterations, self.shrinkage, self.training)
        if not self.training and not (running_mean is None and running_cov is None):
            return whiten_inference(input, running_mean, running_cov, *tensors, how, self.group_size)
        if not (self.training and self.track_running_stats):
            running_mean = running_cov = None
        return train_and_track(
            input,
            running_mean,
            running_cov,
            *tensors,
            how,
            self.group_size,
            self.next_momentum(),
            self.num_batches_tracked,
        )

    def next_momentum(self) -> float | Tensor:
        """The weight of this batch; for ``momentum=None`` the one that makes the running statistics an average."""
        if self.momentum is not None:
            return self.momentum
        if self.num_batches_tracked is None or self.running_mean is None:
            return 0.0
        return 1.0 / (self.num_batches_tracked + 1).to(statistics_dtype(self.running_mean))

    def extra_repr(self) -> str:
        iterations = f", iterations={self.iterations}" if self.method == "newton_schulz" else ""
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
            f"bias={self.bias is not None}, track_running_stats={self.track_running_stats}, method={self.method}, "
            f"group_size={self.group_size}{iterations}, shrinkage={self.shrinkage}, "
            f"mode={'training' if self.training else 'evaluation'}"
        )


class Whitening1d(Whitening):
    r"""Whitening of (N, C) or (N, C, L): features are decorrelated, not only scaled as by batch normalization.

    .. math:: y = \gamma W (x - \mu) + \beta, \quad W \Sigma_a W^T = I, \quad
        \Sigma_a = (1 - a) \Sigma + a \frac{tr \Sigma}{d} I + \epsilon I

    Training: mean and covariance (divided by m) of the mini-batch whiten it; running statistics move towards the batch
    mean and the unbiased covariance. Evaluation: W is made of the running covariance, at every call. Frozen, that is
    ``eval()`` and ``requires_grad_(False)``: as evaluation, with a gradient for the input alone.

    Args:
        num_features: C.
        eps: added to the diagonal of the covariance; positive.
        momentum: weight of the *new* batch in the running statistics; None for the cumulative average.
        affine: learn gamma (``weight``) and beta (``bias``).
        track_running_stats: keep running statistics. Without them, evaluation whitens by the batch too.
        device: of parameters and buffers.
        dtype: of parameters and buffers.
        bias: learn beta; only with ``affine``.
        method: "zca", "pca", "cholesky" or "newton_schulz", explained at :func:`batchnorm.functional.whiten`.
        group_size: d, the features that are whitened together, neighbours in C; None for all C.
        iterations: of Newton-Schulz, in training and in evaluation.
        shrinkage: a, 0 to 1, for covariances of fewer values than features.

    Shape:
        input (N, C) or (N, C, L); output the same. ``running_cov``: (C / d, d, d).

    Raises:
        ValueError: another number of dimensions; one value per channel when training; ``eps`` not positive, an unknown
            method, a group size that does not divide C, iterations below 1, a shrinkage outside 0 to 1.
        RuntimeError: C, dtype or device differ from the layer's.

    Same as torch.nn.BatchNorm1d: constructor up to ``bias``, names of parameters and buffers but ``running_cov``.

    Differs from torch.nn.BatchNorm1d in:

    - ``running_cov`` stands for ``running_var``, which is its diagonal;
    - a forward that fails, an empty batch, and a batch with inf or NaN leave running statistics and
      ``num_batches_tracked`` as they were; inf and NaN make their whole group NaN in the output;
    - covariances are decomposed in float64 whatever the dtype, and autocast does not reach them.

    Differs from the research code in: what is averaged is the covariance, not W, so evaluation whitens the population;
    the running covariance starts at the identity.

    Source:
        Huang et al. 2018 (arXiv:1804.08450), Siarohin et al. 2019 (arXiv:1806.00420), Huang et al. 2019
        (arXiv:1904.03441).

    Example:
        >>> import torch
        >>> layer = Whitening1d(4, method="cholesky", group_size=2, affine=False)
        >>> y = layer(torch.randn(100, 4) @ torch.randn(4, 4))
        >>> torch.allclose(torch.cov(y[:, :2].T, correction=0), torch.eye(2), atol=1e-2)
        True
        >>> layer.running_cov.shape
        torch.Size([2, 2, 2])
    """

    dimensions = (2, 3)


class Whitening2d(Whitening):
    """Whitening of (N, C, H, W) over batch and positions. See :class:`Whitening1d`.

    Example:
        >>> import torch
        >>> Whitening2d(64, group_size=16)(torch.randn(4, 64, 5, 5)).shape
        torch.Size([4, 64, 5, 5])
    """

    dimensions = (4,)


class Whitening3d(Whitening):
    """Whitening of (N, C, D, H, W) over batch and positions. See :class:`Whitening1d`.

    Example:
        >>> import torch
        >>> Whitening3d(2, method="newton_schulz")(torch.randn(3, 2, 4, 4, 4)).shape
        torch.Size([3, 2, 4, 4, 4])
    """

    dimensions = (5,)
