"""DomainBatchNorm1d, DomainBatchNorm2d, DomainBatchNorm3d."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from batchnorm.nn.batchnorm import BatchNorm1d, BatchNorm2d, BatchNorm3d, FusedBatchNorm


class DomainBatchNorm(torch.nn.Module):
    """What the three layers share: a batch normalization per domain."""

    layer: ClassVar[type[FusedBatchNorm]]

    def __init__(
        self,
        num_features: int,
        num_domains: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        activation: str | None = None,
        implementation: str = "auto",
    ) -> None:
        if num_domains < 1:
            raise ValueError(f"num_domains should be at least 1, got {num_domains}")
        super().__init__()
        self.domains = torch.nn.ModuleList(
            self.layer(
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
            for _ in range(num_domains)
        )

    def forward(self, input: Tensor, domain: int, residual: Tensor | None = None) -> Tensor:
        """Normalize ``input``, all of one domain, add ``residual`` of the same shape, apply the activation."""
        if not isinstance(domain, int):
            raise TypeError(f"domain should be int, the domain of all samples, not {type(domain).__name__}")
        if not 0 <= domain < len(self.domains):
            raise IndexError(f"domain should be 0 to {len(self.domains) - 1}, got {domain}")
        return self.domains[domain](input, residual)


class DomainBatchNorm1d(DomainBatchNorm):
    r"""Domain-specific batch normalization of (N, C) or (N, C, L): statistics, gamma and beta for each domain.

    .. math:: y = \mathrm{act}\Big(\gamma_d \frac{x - \mu_d}{\sqrt{\sigma_d^2 + \epsilon}} + \beta_d
        + \mathrm{residual}\Big)

    Training, evaluation and frozen: as :class:`BatchNorm1d`. A batch has samples of one domain; the other domains'
    running statistics and counters stay. ``domains[d]`` is the layer of domain d.

    Args:
        num_features: C.
        num_domains: how many; all other arguments are those of :class:`BatchNorm1d`.

    Shape:
        input and residual (N, C) or (N, C, L); output the same. ``domain`` is an int, 0 to ``num_domains - 1``.

    Raises:
        IndexError: there is no such domain.
        TypeError: ``domain`` is not an int.
        ValueError: ``num_domains`` below 1; as :class:`BatchNorm1d`.
        RuntimeError: as :class:`BatchNorm1d`.

    Source:
        Chang et al. 2019 (arXiv:1906.03950), equation 4.

    Example:
        >>> layer = DomainBatchNorm1d(1, num_domains=2)
        >>> layer(torch.tensor([[1.0], [3.0]]), 1).detach().flatten()
        tensor([-1.0000,  1.0000])
        >>> [norm.running_mean.item() for norm in layer.domains]
        [0.0, 0.20000000298023224]
    """

    layer = BatchNorm1d


class DomainBatchNorm2d(DomainBatchNorm):
    """Domain-specific batch normalization of (N, C, H, W). See :class:`DomainBatchNorm1d`.

    Example:
        >>> DomainBatchNorm2d(3, num_domains=2)(torch.randn(4, 3, 5, 5), 0).shape
        torch.Size([4, 3, 5, 5])
    """

    layer = BatchNorm2d


class DomainBatchNorm3d(DomainBatchNorm):
    """Domain-specific batch normalization of (N, C, D, H, W). See :class:`DomainBatchNorm1d`.

    Example:
        >>> DomainBatchNorm3d(2, num_domains=2)(torch.randn(4, 2, 3, 3, 3), 0).shape
        torch.Size([4, 2, 3, 3, 3])
    """

    layer = BatchNorm3d
