"""Gradients that can be differentiated again: autograd's own, of the reference's formulas."""

from collections.abc import Sequence

import torch
from torch import Tensor

from batchnorm import reference
from batchnorm.reference import per_channel, scale_and_shift, widen


def differentiable_gradients(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str | None,
    needed: Sequence[bool],
    given: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor]:
    """Gradients of input, weight, bias and of the sum before the activation; all as functions of the arguments.

    Args:
        grad_output: gradient of the output.
        input: shape (N, C, *).
        weight: gamma or None.
        bias: beta or None.
        residual: added before the activation, or None.
        eps: added to the variance of the batch.
        activation: a name or None.
        needed: of input, weight and bias, whether their gradients are wanted.
        given: mean and 1 / standard deviation that normalized instead of the batch's.
    """
    with torch.enable_grad():
        wide = widen(input)
        if given is None:
            mean = reference.batch_mean(wide)
            given = mean, torch.rsqrt(reference.batch_var(wide, mean) + eps)
        mean, invstd = (per_channel(statistic.to(wide.dtype), wide) for statistic in given)
        z = scale_and_shift((wide - mean) * invstd, weight, bias)
        grad_sum = grad_output
        if activation is not None:
            total = reference.activate(z, residual, None)
            if not total.requires_grad:
                total = total.detach().requires_grad_()
            output = reference.activate(total, None, activation)
            (grad_sum,) = torch.autograd.grad(output, total, grad_output.to(total.dtype), create_graph=True)
        wanted = [t for t, is_needed in zip((input, weight, bias), needed, strict=True) if is_needed and t is not None]
        grads = iter(torch.autograd.grad(z, wanted, grad_sum.to(z.dtype), create_graph=True) if wanted else ())
        grad_input, grad_weight, grad_bias = (next(grads) if is_needed else None for is_needed in needed)
        return grad_input, grad_weight, grad_bias, grad_sum.to(grad_output.dtype)
