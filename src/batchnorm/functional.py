"""Batch normalization as functions: check the arguments, choose an implementation, call it."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from batchnorm import reference
from batchnorm._ops import kernel, kernel_autograd
from batchnorm._ops.batch_norm import seen_through, train
from batchnorm._ops.checks import (
    check_momentum,
    check_not_vmapped,
    check_per_channel,
    check_training,
    of_one_dtype,
    suits_torch,
)
from batchnorm._ops.choice import READY, Choice, choose, instead
from batchnorm._ops.dtypes import HALF, statistics_dtype
from batchnorm._ops.running import update_running_statistics
from batchnorm._ops.whiten import whiten as whiten
from batchnorm.errors import ImplementationError
from batchnorm.reference import TrainOutput, activate, values_per_channel


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
    implementation: str = "auto",
) -> Tensor:
    r"""Batch normalization with the arguments of :func:`torch.nn.functional.batch_norm`, fused with what follows it.

    .. math:: y = \mathrm{act}\Big(\gamma \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta + \mathrm{residual}\Big)

    Args:
        input: shape (N, C, *), floating point.
        running_mean: shape (C,). Updated in place when training; used to normalize otherwise.
        running_var: shape (C,), as ``running_mean``. It receives the unbiased batch variance.
        weight: gamma, shape (C,), or None for 1.
        bias: beta, shape (C,), or None for 0.
        training: normalize by the statistics of this batch instead of the running ones.
        momentum: weight of the new batch in the running statistics, 0 to 1.
        eps: added to the variance.
        residual: added before the activation, same shape as ``input``.
        activation: "relu", "relu6", "leaky_relu", "elu", "silu", "gelu", "mish", "sigmoid", "tanh",
            "hardswish" (with torch's default parameters), or None.
        implementation: "auto", "kernel", "aten" or "reference". A named one never falls back to another.

    Returns:
        Tensor of the shape and dtype of ``input``.

    Raises:
        ValueError: one value per channel in training, ``eps`` not positive in training, an unknown activation or
            implementation, or only one of the two running statistics when training.
        RuntimeError: a per-channel tensor or the residual has the wrong size, dtype or device, or running statistics
            are missing in evaluation.
        NotImplementedError: the input is not floating point.
        TypeError: an argument that should be a tensor, or ``momentum``, is of another type.

        When an error is raised, the running statistics are as they were before the call. An empty batch leaves
        them unchanged too.

    Source:
        Ioffe & Szegedy 2015, Algorithm 1 and section 3.1; argument order and errors of torch 2.13.

    Example:
        >>> import torch
        >>> running_mean, running_var = torch.zeros(1), torch.ones(1)
        >>> x = torch.tensor([[1.0], [3.0]])
        >>> batch_norm(x, running_mean, running_var, training=True, activation="relu", eps=1e-12)
        tensor([[0.],
                [1.]])
        >>> running_mean, running_var
        (tensor([0.2000]), tensor([1.1000]))
    """
    tensors = (input, running_mean, running_var, weight, bias, residual)
    if has_torch_function_variadic(*tensors):
        return handle_torch_function(
            batch_norm,
            tensors,
            input,
            running_mean,
            running_var,
            weight,
            bias,
            training,
            momentum,
            eps,
            residual=residual,
            activation=activation,
            implementation=implementation,
        )
    check_momentum(momentum)
    if not training:
        return batch_norm_inference(
            input,
            running_mean,
            running_var,
            weight,
            bias,
            eps=eps,
            residual=residual,
            activation=activation,
            implementation=implementation,
        )
    choice = choose(implementation, input, True, residual, activation, weight, bias, running_mean, running_var)
    return train_and_track(
        input, weight, bias, residual, eps, activation, running_mean, running_var, momentum, None, choice
    )


def train_and_track(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float | Tensor,
    num_batches_tracked: Tensor | None,
    choice: Choice,
) -> Tensor:
    """Normalize a mini-batch, which has been checked; move running statistics and counter, where there are any."""
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must either both be None or neither be None")
    if choice is READY or (choice.implementation == "kernel" and input.numel() and not seen_through()):
        train = kernel_autograd.train if choice is READY else kernel_autograd.train_checked
        try:
            return train(
                input, weight, bias, residual, eps, activation, running_mean, running_var, momentum, num_batches_tracked
            )
        except ImplementationError as error:
            choice = instead(choice, error)
    suits = input.dtype not in HALF or suits_torch(weight, bias, running_mean, running_var)
    if choice.implementation == "aten" and suits and not isinstance(momentum, Tensor) and not seen_through():
        # torch updates in the same call. It also checks, but a wrong bias only after the update
        check_per_channel(input, running_mean=running_mean, running_var=running_var, weight=weight, bias=bias)
        mean, var = (None, None) if momentum == 0 else (running_mean, running_var)
        output = activate(F.batch_norm(input, mean, var, weight, bias, True, momentum, eps), residual, activation)
    else:
        statistics = normalize_batch(
            input, weight, bias, running_mean, running_var, residual, activation, eps, choice.implementation
        )
        if running_mean is not None and running_var is not None:
            update_running_statistics(running_mean, running_var, statistics, momentum)
        output = statistics.output
    if num_batches_tracked is not None and input.numel():
        num_batches_tracked.add_(1)
    return output


def batch_norm_train(
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
    eps: float = 1e-5,
    implementation: str = "auto",
) -> TrainOutput:
    """Normalize a mini-batch by its own statistics, and return them. Nothing is updated in place.

    Args, errors and source as in :func:`batch_norm`.

    Returns:
        ``(output, mean, var, count)``: mean and var of shape (C,), in float32 for half-precision inputs, var divided
        by ``count``, the number of values per channel. No gradient flows into ``mean`` and ``var`` themselves; the
        gradient of ``output`` does account for their dependence on the input.

    Example:
        >>> import torch
        >>> batch_norm_train(torch.tensor([[1.0], [3.0]]), eps=1e-12)
        TrainOutput(output=tensor([[-1.],
                [ 1.]]), mean=tensor([2.]), var=tensor([1.]), count=2)
    """
    return normalize_batch(input, weight, bias, None, None, residual, activation, eps, implementation)


def normalize_batch(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    eps: float,
    implementation: str,
) -> TrainOutput:
    """:func:`batch_norm_train` for callers that update running statistics next: these are checked, not changed."""
    choice = choose(implementation, input, True, residual, activation)
    check_training(input, eps)
    count = values_per_channel(input)
    # an empty vector, which torch accepts
    if count == 0 and input.dim() < 2:
        return TrainOutput(input.clone(), input.new_zeros(0), input.new_zeros(0), 0)
    check_per_channel(input, running_mean=running_mean, running_var=running_var, weight=weight, bias=bias)
    if choice.implementation == "kernel" and input.numel() and not seen_through():
        mean = input.new_empty(input.shape[1], dtype=statistics_dtype(input))
        var = torch.empty_like(mean)
        try:
            input, residual, (weight, bias) = kernel_autograd.made_ready(input, residual, weight, bias)
            statistics = kernel.Statistics(kernel.BATCH, mean=mean, var=var)
            output = kernel_autograd.batch_norm(input, weight, bias, residual, eps, activation, statistics)
        except ImplementationError as error:
            choice = instead(choice, error)
        else:
            return TrainOutput(output, mean, var, count)
    if choice.implementation != "reference":
        output, mean, var = train(input, weight, bias, residual, eps, activation, choice.implementation)
        return TrainOutput(output, mean, var, count)
    output, mean, var, _ = reference.batch_norm_train(
        input, weight, bias, residual=residual, activation=activation, eps=eps
    )
    check_not_vmapped(mean, running_mean)
    return TrainOutput(output, mean.detach(), var.detach(), count)


def batch_norm_inference(
    input: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
    eps: float = 1e-5,
    implementation: str = "auto",
) -> Tensor:
    """Normalize by given statistics: population or running mean and variance, shape (C,).

    Other args, errors and source as in :func:`batch_norm`.

    Example:
        >>> import torch
        >>> batch_norm_inference(torch.tensor([[1.0], [3.0]]), torch.tensor([1.0]), torch.tensor([4.0]), eps=0.0)
        tensor([[0.],
                [1.]])
    """
    choice = choose(implementation, input, False, residual, activation, weight, bias, mean, var)
    return evaluate(input, mean, var, weight, bias, residual, activation, eps, choice)


def evaluate(
    input: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    eps: float,
    choice: Choice,
) -> Tensor:
    """:func:`batch_norm_inference` after the choice."""
    if mean is None or var is None:
        raise RuntimeError(f"running_{'mean' if mean is None else 'var'} must be defined in evaluation mode")
    if not eps >= 0.0:
        raise ValueError(f"batch_norm eps must be non-negative, but got {eps}")
    if choice is READY or (choice.implementation == "kernel" and input.numel() and not seen_through()):
        try:
            running: list[Any] = [mean, var]
            if choice is not READY:
                check_per_channel(input, running_mean=mean, running_var=var, weight=weight, bias=bias)
                tensors = (weight, bias, mean, var)
                input, residual, (weight, bias, *running) = kernel_autograd.made_ready(input, residual, *tensors)
            statistics = kernel.Statistics(kernel.RUNNING, *running)
            return kernel_autograd.batch_norm(input, weight, bias, residual, eps, activation, statistics)
        except ImplementationError as error:
            choice = instead(choice, error)
    # an input of two or more dimensions but without channels fails in torch's own kernel
    empty = choice.implementation == "kernel" and input.dim() > 1 and not seen_through()
    if choice.implementation == "reference" or empty:
        check_per_channel(input, running_mean=mean, running_var=var, weight=weight, bias=bias)
        return reference.batch_norm_inference(
            input, mean, var, weight, bias, residual=residual, activation=activation, eps=eps
        )
    if input.dtype in HALF and not of_one_dtype(mean, var, weight, bias):
        check_per_channel(input, running_mean=mean, running_var=var, weight=weight, bias=bias)
        mean, var = mean.float(), var.float()
        weight, bias = (None if tensor is None else tensor.float() for tensor in (weight, bias))
    # it checks sizes, dtypes and devices itself
    z = torch.batch_norm(input, weight, bias, mean, var, False, 0.0, eps, torch.backends.cudnn.enabled)
    return activate(z, residual, activation)
