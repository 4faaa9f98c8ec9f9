"""Checks of the arguments: torch's kinds of errors, with the values in them, before anything is changed."""

import numbers

import torch
from torch import Tensor

from batchnorm._ops.dtypes import HALF
from batchnorm.reference import ACTIVATIONS, values_per_channel


def check_input(input: Tensor, residual: Tensor | None, activation: str | None) -> None:
    if not isinstance(input, Tensor):
        raise TypeError(f"input must be Tensor, not {type(input).__name__}")
    if input.dim() < 2 and input.numel() > 0:
        raise RuntimeError(f"expected input of size (N, C, *), got input size {tuple(input.shape)}")
    if not input.is_floating_point():
        raise NotImplementedError(f"\"batch_norm\" not implemented for '{input.dtype}'")
    if activation is not None:
        check_activation(activation)
    if residual is not None and not isinstance(residual, Tensor):
        raise TypeError(f"residual must be Tensor, not {type(residual).__name__}")
    if residual is not None and (
        residual.shape != input.shape or residual.dtype != input.dtype or residual.device != input.device
    ):
        raise RuntimeError(
            f"residual should have the size, dtype and device of the input: expected {tuple(input.shape)} "
            f"{input.dtype} {input.device}, got {tuple(residual.shape)} {residual.dtype} {residual.device}"
        )


def check_training(input: Tensor, eps: float) -> None:
    """A batch needs two values per channel to have a variance, and eps to divide by where that is 0."""
    shape = input.shape
    if len(shape) > 1 and shape[0] < 2 and values_per_channel(input) == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {shape}")
    if not eps > 0.0:
        raise ValueError(f"batch_norm eps must be positive during training, but got {eps}")


def check_not_differentiated(running_mean: Tensor, running_var: Tensor) -> None:
    if running_mean.requires_grad or running_var.requires_grad:
        raise RuntimeError("running_mean and running_var cannot require a gradient: they are updated in place")


def check_momentum(momentum: object) -> None:
    if isinstance(momentum, Tensor):
        if momentum.dim() or momentum.requires_grad:
            raise TypeError(
                f"momentum must be a number or a 0-dim tensor without gradient, not a tensor of shape "
                f"{tuple(momentum.shape)} with requires_grad={momentum.requires_grad}"
            )
    elif not isinstance(momentum, numbers.Real):
        raise TypeError(f"momentum must be float, not {type(momentum).__name__}")


def check_per_channel(input: Tensor, **tensors: Tensor | None) -> None:
    num_features = 0 if input.dim() < 2 else input.shape[1]
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be Tensor, not {type(tensor).__name__}")
        if tensor.dim() != 1 or tensor.shape[0] != num_features:
            raise RuntimeError(
                f"{name} should contain {num_features} elements not {tensor.numel()}: "
                f"expected shape ({num_features},), got {tuple(tensor.shape)}"
            )
        check_dtype_and_device(input, name, tensor)


def check_dtype_and_device(input: Tensor, name: str, tensor: Tensor) -> None:
    if tensor.dtype != input.dtype and not (input.dtype in HALF and tensor.dtype == torch.float32):
        raise RuntimeError(f"mixed dtype: {name} is {tensor.dtype}, but the input is {input.dtype}")
    if tensor.device != input.device:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but {name} is on {tensor.device} "
            f"and the input on {input.device}"
        )


def of_one_dtype(*tensors: Tensor | None) -> bool:
    """Whether torch's kernels take these per-channel tensors as they are."""
    return len({tensor.dtype for tensor in tensors if isinstance(tensor, Tensor)}) < 2


def suits_torch(weight: Tensor | None, bias: Tensor | None, mean: Tensor | None, var: Tensor | None) -> bool:
    """Whether torch's training call does what ours promises: it takes one dtype and updates bfloat16 in bfloat16."""
    return of_one_dtype(weight, bias, mean, var) and (mean is None or mean.dtype not in HALF)


def check_not_vmapped(mean: Tensor, running_mean: Tensor | None) -> None:
    if running_mean is None or torch.compiler.is_compiling():
        return
    is_batched = torch._C._functorch.is_batchedtensor  # pyright: ignore[reportAttributeAccessIssue]
    if is_batched(mean) and not is_batched(running_mean):
        raise RuntimeError(
            f"running statistics of shape {tuple(running_mean.shape)} cannot be updated inside vmap, where every "
            "sample has a mean and a variance of its own: use eval(), track_running_stats=False or "
            "torch.func.replace_all_batch_norm_modules_"
        )


def check_activation(activation: str) -> str:
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}: expected None or one of {', '.join(ACTIVATIONS)}")
    return activation
