"""Conditional batch normalization: what follows the normalization depends on a label."""

from torch import Tensor


def scale_and_shift_by_label(normalized: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    r""":math:`y_i = \gamma_{l_i} \hat x_i + \beta_{l_i}`: one gamma and beta per class.

    Args:
        normalized: shape (N, C, *).
        weight: gamma, shape (num_classes, C).
        bias: beta, shape (num_classes, C).
        labels: the class of each sample, shape (N,).

    Source:
        de Vries et al. 2017 (arXiv:1707.00683), with a table of classes in place of a network; Dumoulin, Shlens &
        Kudlur 2017 (arXiv:1610.07629) for the table.
    """
    shape = (*normalized.shape[:2], *[1] * (normalized.dim() - 2))
    return normalized * weight[labels].view(shape) + bias[labels].view(shape)
