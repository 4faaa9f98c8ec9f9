"""ConditionalBatchNorm1d, ConditionalBatchNorm2d, ConditionalBatchNorm3d."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from batchnorm._ops.checks import check_activation
from batchnorm.nn.batchnorm import BatchNorm1d, BatchNorm2d, BatchNorm3d, FusedBatchNorm
from batchnorm.reference import activate


class ConditionalBatchNorm(torch.nn.Module):
    """What the three layers share: one normalization, and gamma and beta by class."""

    layer: ClassVar[type[FusedBatchNorm]]

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        *,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        bias: bool = True,
        activation: str | None = None,
        implementation: str = "auto",
    ) -> None:
        if num_classes < 1:
            raise ValueError(f"num_classes should be at least 1, got {num_classes}")
        super().__init__()
        self.norm = self.layer(
            num_features, eps, momentum, False, track_running_stats, device, dtype, implementation=implementation
        )
        size, where = (num_classes, num_features), {"device": device, "dtype": dtype}
        self.weight = torch.nn.Parameter(torch.ones(size, **where))
        self.bias = torch.nn.Parameter(torch.zeros(size, **where)) if bias else None
        self.activation = None if activation is None else check_activation(activation)

    def forward(self, input: Tensor, labels: Tensor) -> Tensor:
        """Normalize ``input``, scale and shift each sample by gamma and beta of its class, apply the activation."""
        self.check_labels(input, labels)
        weight, bias = self.weight[labels], None if self.bias is None else self.bias[labels]
        normalized = self.norm(input)
        shape = (*input.shape[:2], *[1] * (input.dim() - 2))
        z = normalized * weight.view(shape)
        if bias is not None:
            z = z + bias.view(shape)
        return activate(z, None, self.activation).to(input.dtype)

    def check_labels(self, input: Tensor, labels: Tensor) -> None:
        if labels.dtype != torch.int64 or labels.shape != input.shape[:1]:
            raise ValueError(
                f"labels should be torch.int64 of shape {tuple(input.shape[:1])}, one for each sample: "
                f"got {labels.dtype} of shape {tuple(labels.shape)}"
            )
        # a graph cannot depend on values; what is compiled checks indices itself
        if torch.compiler.is_compiling():
            return
        outside = labels[(labels < 0) | (labels >= len(self.weight))]
        if len(outside):
            raise IndexError(f"labels should be 0 to {len(self.weight) - 1}, got {outside[0].item()}")

    def extra_repr(self) -> str:
        num_classes, num_features = self.weight.shape
        return f"{num_features}, num_classes={num_classes}, bias={self.bias is not None}, activation={self.activation}"


class ConditionalBatchNorm1d(ConditionalBatchNorm):
    r"""Class-conditional batch normalization of (N, C) or (N, C, L): shared statistics, gamma and beta for each class.

    .. math:: y_i = \mathrm{act}\Big(\gamma_{l_i} \frac{x_i - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta_{l_i}\Big)

    Training, evaluation and frozen: as :class:`BatchNorm1d`, which normalizes as ``norm``. A class that is not in the
    batch gets a gradient of 0.

    Args:
        num_features: C.
        num_classes: rows of ``weight`` (gamma) and ``bias`` (beta), both of shape (num_classes, C).
        eps: added to the variance; positive.
        momentum: weight of the *new* batch in the running statistics; None for the cumulative average.
        track_running_stats: keep running statistics. Without them, evaluation normalizes by the batch too.
        device: of parameters and buffers.
        dtype: of parameters and buffers.
        bias: learn beta.
        activation: what follows, as in :class:`BatchNorm1d`.
        implementation: of the normalization, as in :class:`BatchNorm1d`.

    Shape:
        input (N, C) or (N, C, L), labels (N,) of int64, 0 to ``num_classes - 1``; output as the input.

    Raises:
        IndexError: a label that is no class.
        ValueError: labels of another dtype or shape; ``num_classes`` below 1; as :class:`BatchNorm1d`.
        RuntimeError: as :class:`BatchNorm1d`.

    Source:
        de Vries et al. 2017 (arXiv:1707.00683), with a table of classes in place of a network; Dumoulin, Shlens &
        Kudlur 2017 (arXiv:1610.07629) for the table.

    Example:
        >>> layer = ConditionalBatchNorm1d(1, num_classes=2)
        >>> with torch.no_grad():
        ...     _ = layer.weight[1].fill_(10.0)
        >>> layer(torch.tensor([[1.0], [3.0]]), torch.tensor([0, 1])).detach().flatten()
        tensor([-1.0000, 10.0000])
    """

    layer = BatchNorm1d


class ConditionalBatchNorm2d(ConditionalBatchNorm):
    """Class-conditional batch normalization of (N, C, H, W). See :class:`ConditionalBatchNorm1d`.

    Example:
        >>> layer = ConditionalBatchNorm2d(3, num_classes=10, activation="relu")
        >>> layer(torch.randn(4, 3, 5, 5), torch.tensor([0, 9, 3, 3])).shape
        torch.Size([4, 3, 5, 5])
    """

    layer = BatchNorm2d


class ConditionalBatchNorm3d(ConditionalBatchNorm):
    """Class-conditional batch normalization of (N, C, D, H, W). See :class:`ConditionalBatchNorm1d`.

    Example:
        >>> layer = ConditionalBatchNorm3d(2, num_classes=2)
        >>> layer(torch.randn(4, 2, 3, 3, 3), torch.tensor([0, 1, 1, 0])).shape
        torch.Size([4, 2, 3, 3, 3])
    """

    layer = BatchNorm3d
