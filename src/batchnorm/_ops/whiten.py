"""Whitening as a function: check the arguments, whiten, move the running statistics."""

import torch
from torch import Tensor

from batchnorm._ops.batch_norm import seen_through
from batchnorm._ops.checks import (
    check_dtype_and_device,
    check_momentum,
    check_not_differentiated,
    check_per_channel,
)
from batchnorm._ops.running import update_running_statistics
from batchnorm._ops.whitening_autograd import whiten_batch, whiten_by
from batchnorm._ops.whitening_matrix import METHODS, Method, whitening_matrix
from batchnorm.reference import values_per_channel
from batchnorm.relatives import whitening
from batchnorm.relatives.whitening import WhitenOutput


def whiten(
    input: Tensor,
    running_mean: Tensor | None,
    running_cov: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    *,
    method: str = "zca",
    group_size: int | None = None,
    iterations: int = 5,
    shrinkage: float = 0.0,
) -> Tensor:
    r"""Whiten the features of a mini-batch: decorrelate them and scale each to variance 1, then scale and shift.

    .. math:: y = \gamma W (x - \mu) + \beta, \quad W \Sigma_a W^T = I, \quad
        \Sigma_a = (1 - a) \Sigma + a \frac{tr \Sigma}{d} I + \epsilon I

    =================  ====================================================================================
    method             W
    =================  ====================================================================================
    ``zca``            :math:`\Sigma_a^{-1/2}`: the features stay as close as possible to what they were
    ``pca``            principal components, the largest variance first; signs do not flip with the noise of
                       a batch (``relatives.whitening.signs``), but components of about the same variance mix
    ``cholesky``       :math:`L^{-1}` with :math:`L L^T = \Sigma_a`: feature i is made of features 0 to i
    ``newton_schulz``  ZCA by ``iterations`` steps of Newton's iteration: products only, and complete
                       where eigenvalues are not small compared with their sum
    =================  ====================================================================================

    Gradients pass through mean and covariance. Equal eigenvalues need no care: the derivatives are written without
    their differences. PCA has none where eigenvalues coincide, unless the loss does not depend on the directions in
    their plane; these are held fixed there, which is exact for such a loss.

    Args:
        input: shape (N, C, \*), floating point.
        running_mean: shape (C,). Updated in place when training; used to whiten otherwise.
        running_cov: shape (C / d, d, d) with d = ``group_size``, as ``running_mean``. It receives the unbiased
            covariance of the batch, before shrinkage.
        weight: gamma, shape (C,), or None for 1.
        bias: beta, shape (C,), or None for 0.
        training: whiten by the statistics of this batch instead of the running ones.
        momentum: weight of the new batch in the running statistics, 0 to 1.
        eps: added to the diagonal of the covariance. A covariance of m < d values is singular; ``eps`` and
            ``shrinkage`` alone bound W then. At large scale (a standard deviation of 1000) ``eps`` is far below
            float32's rounding, and a singular covariance needs ``shrinkage``, which follows the scale.
        method: as above.
        group_size: d, the features that are whitened together; None for all C.
        iterations: of Newton-Schulz.
        shrinkage: a, 0 to 1.

    Returns:
        Tensor of the shape and dtype of ``input``. Covariances and W are computed in float64. inf or NaN in the
        input gives NaN in its whole group. Inside compilers, exporters and ``torch.func`` the plain formulas of
        ``batchnorm.relatives.whitening`` run instead, in the dtype of the input.

    Raises:
        ValueError: one value per channel or an ``eps`` that is not positive in training, an unknown method,
            a group size that does not divide C, iterations below 1, a shrinkage outside 0 to 1, or only one of the
            two running statistics when training.
        RuntimeError: a tensor has the wrong size, dtype or device, or running statistics are missing in evaluation.
            In the second derivative of "zca" and "pca": eigenvalues coincide.
        NotImplementedError: the input is not floating point.
        TypeError: an argument that should be a tensor, or ``momentum``, is of another type.

        When an error is raised, the running statistics are as they were before the call. Neither an empty batch nor
        one whose covariance is not finite changes them.

    Source:
        Ioffe & Szegedy 2015, section 2; Huang et al. 2018 (arXiv:1804.08450) for ZCA in groups; Siarohin et al. 2019
        (arXiv:1806.00420) for Cholesky; Huang et al. 2019 (arXiv:1904.03441) for Newton-Schulz.

    Example:
        >>> import torch
        >>> x = torch.tensor([[2.0, 1.0], [-2.0, -1.0], [1.0, 2.0], [-1.0, -2.0]])
        >>> y = whiten(x, None, None, training=True, eps=1e-12)
        >>> torch.allclose(y.T @ y / 4, torch.eye(2), atol=1e-6)
        True
    """
    check_momentum(momentum)
    how = check_method(method, eps, iterations, shrinkage, training)
    if not training:
        return whiten_inference(input, running_mean, running_cov, weight, bias, how, group_size)
    return train_and_track(input, running_mean, running_cov, weight, bias, how, group_size, momentum, None)


def train_and_track(
    input: Tensor,
    running_mean: Tensor | None,
    running_cov: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    how: Method,
    group_size: int | None,
    momentum: float | Tensor,
    num_batches_tracked: Tensor | None,
) -> Tensor:
    """Whiten a mini-batch; move running statistics and counter, where there are any and the batch has statistics."""
    if (running_mean is None) != (running_cov is None):
        raise ValueError("running_mean and running_cov must either both be None or neither be None")
    statistics = whiten_train(input, weight, bias, how, group_size, running_mean, running_cov)
    if running_mean is not None and running_cov is not None and usable(statistics):
        update_running_statistics(running_mean, running_cov, statistics, momentum)
        if num_batches_tracked is not None:
            num_batches_tracked.add_(1)
    return statistics.output


def whiten_train(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    how: Method,
    group_size: int | None,
    running_mean: Tensor | None,
    running_cov: Tensor | None,
) -> WhitenOutput:
    """Whiten a mini-batch by its own statistics, and return them. The running ones are checked, not changed."""
    groups = check_tensors(input, group_size, running_mean, running_cov, weight, bias)
    if running_mean is not None and running_cov is not None:
        check_not_differentiated(running_mean, running_cov)
    count = values_per_channel(input)
    if count == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {input.shape}")
    if input.numel() == 0:
        d = input.shape[1] // groups
        return WhitenOutput(input.clone(), input.new_zeros(input.shape[1]), input.new_zeros(groups, d, d), 0)
    d = input.shape[1] // groups
    if seen_through():
        output, mean, cov, _ = whitening.whiten_train(input, weight, bias, group_size=d, **how._asdict())
        return WhitenOutput(output, mean.detach(), cov.detach(), count)
    return WhitenOutput(*whiten_batch(input, weight, bias, d, how), count)


def whiten_inference(
    input: Tensor,
    mean: Tensor | None,
    cov: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    how: Method,
    group_size: int | None,
) -> Tensor:
    """Whiten by given statistics."""
    if mean is None or cov is None:
        raise RuntimeError(f"running_{'mean' if mean is None else 'cov'} must be defined in evaluation mode")
    check_tensors(input, group_size, mean, cov, weight, bias)
    if seen_through():
        return whitening.whiten_inference(input, mean, cov, weight, bias, **how._asdict())
    with torch.no_grad():
        matrix, _ = whitening_matrix(cov, how)
    return whiten_by(input, mean, matrix, weight, bias)


def usable(statistics: WhitenOutput) -> bool:
    """Whether running statistics may follow: an empty batch has none, and inf and NaN would stay for ever."""
    _, mean, cov, count = statistics
    return count > 1 and bool(mean.isfinite().all() and cov.isfinite().all())


def check_method(method: str, eps: float, iterations: int, shrinkage: float, training: bool = True) -> Method:
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: expected one of {', '.join(METHODS)}")
    if not (eps > 0.0 if training else eps >= 0.0):
        wanted = "positive during training" if training else "non-negative"
        raise ValueError(f"whitening eps must be {wanted}, but got {eps}")
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, but got {iterations}")
    if not 0.0 <= shrinkage <= 1.0:
        raise ValueError(f"shrinkage must lie between 0 and 1, but got {shrinkage}")
    return Method(method, eps, iterations, shrinkage)


def check_group_size(num_features: int, group_size: int | None) -> int:
    """The features of a group: all without a group size."""
    if group_size is None:
        return num_features
    if group_size < 1 or num_features % group_size:
        raise ValueError(
            f"group_size must divide the number of features, but got {group_size} for {num_features} features: "
            "choose a divisor, or None for one group"
        )
    return group_size


def check_tensors(
    input: Tensor,
    group_size: int | None,
    mean: Tensor | None,
    cov: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
) -> int:
    """Check all of them against the input; the number of groups."""
    if not isinstance(input, Tensor):
        raise TypeError(f"input must be Tensor, not {type(input).__name__}")
    if input.dim() < 2:
        raise RuntimeError(f"expected input of size (N, C, *), got input size {tuple(input.shape)}")
    if not input.is_floating_point():
        raise NotImplementedError(f"whitening is not implemented for '{input.dtype}'")
    num_features = input.shape[1]
    d = check_group_size(num_features, group_size)
    groups = num_features // d if d else 0
    check_per_channel(input, running_mean=mean, weight=weight, bias=bias)
    if cov is not None:
        expected = (groups, d, d)
        if not isinstance(cov, Tensor):
            raise TypeError(f"running_cov must be Tensor, not {type(cov).__name__}")
        if cov.shape != expected:
            raise RuntimeError(
                f"running_cov should have shape {expected}, got {tuple(cov.shape)}: "
                f"{num_features} features in groups of {d}"
            )
        check_dtype_and_device(input, "running_cov", cov)
    return groups
