"""One autograd function around the whitening of a mini-batch: a few batched products forward, as few backward.

A block is (B, groups, d, L): the statistics of a group run over B and L. Contiguous (N, C, *) is such blocks as it lies
in memory, if L is long enough for a product; everything else is the transpose of a matrix (m, C), with B = 1.
"""

import math
from typing import Any

import torch
from torch import Tensor

from batchnorm._ops.dtypes import dense_format
from batchnorm._ops.whitening_matrix import Method, whitening_matrix
from batchnorm.reference import widen
from batchnorm.relatives import whitening

# Fewer positions than so many times the features of a group, and one product per sample is slower than a transposition
LONG = 2
# Elements that are made float64 at once; a copy of a large input costs more in page faults than the product
PIECE = 2**16


def whiten_batch(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, group_size: int, how: Method
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, mean (C,) and covariance (groups, d, d) of a checked mini-batch; no gradient flows into the last two."""
    blocks = as_blocks(input, group_size)
    output, mean, cov = WhitenBatch.apply(blocks, weight, bias, how)  # pyright: ignore[reportGeneralTypeIssues]
    return from_blocks(output, input), mean, cov


def whiten_by(input: Tensor, mean: Tensor, matrix: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Whiten by a given mean (C,) and matrix (groups, d, d); differentiable with respect to input, weight and bias."""
    groups, d = matrix.shape[:2]
    blocks = as_blocks(input, d)
    with torch.autocast(input.device.type, enabled=False):
        wide = widen(blocks)
        scaled = scaled_rows(matrix.to(wide.dtype), weight)
        output = product(scaled, center(wide, mean.view(groups, d, 1)))
        if bias is not None:
            output = output + bias.view(groups, d, 1)
    return from_blocks(output.to(input.dtype), input)


def as_blocks(input: Tensor, group_size: int) -> Tensor:
    """(N, C, *) as blocks; a copy only where the memory has neither form."""
    size, channels = input.shape[:2]
    groups, positions = channels // group_size, math.prod(input.shape[2:])
    if positions >= LONG * group_size and input.is_contiguous():
        return input.view(size, groups, group_size, positions)
    values = input.movedim(1, -1).reshape(-1, channels)
    return values.T.unflatten(0, (groups, group_size))[None]


def from_blocks(blocks: Tensor, like: Tensor) -> Tensor:
    """Blocks as a tensor of the shape and memory format of the input that they were made of."""
    size, channels, *positions = like.shape
    if len(blocks) == size and blocks.is_contiguous() and like.is_contiguous():
        return blocks.view(like.shape)
    values = blocks[0].movedim(-1, 0).reshape(-1, channels)
    output = values.view(size, *positions, channels).movedim(-1, 1)
    return output.contiguous(memory_format=dense_format(like) or torch.contiguous_format)


def product(matrix: Tensor, blocks: Tensor) -> Tensor:
    """A matrix per group (groups, d, d) times blocks, in the memory layout of the blocks."""
    if blocks.stride(-1) == 1:
        return matrix @ blocks
    return (blocks.mT @ matrix.mT).mT


def add_product(sums: Tensor, matrix: Tensor, blocks: Tensor) -> Tensor:
    """``sums += matrix @ blocks`` for sums that :func:`product` made."""
    matrices = matrix.expand(len(blocks), *matrix.shape).flatten(0, 1)
    if sums.is_contiguous():
        sums.flatten(0, 1).baddbmm_(matrices, blocks.flatten(0, 1))
    else:
        sums.mT.flatten(0, 1).baddbmm_(blocks.mT.flatten(0, 1), matrices.mT)
    return sums


def sum_of_products(a: Tensor, b: Tensor) -> Tensor:
    """Of a and b transposed, over all positions: (groups, d, d)."""
    return (a @ b.mT).sum(0)


def moments(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (groups, d, 1) and covariance in float64, so that zeros of a singular one stay zeros in any dtype."""
    dim, count = 0 if len(blocks) > 1 else -1, len(blocks) * blocks.shape[-1]
    shift = blocks.mean((0, -1))[..., None].double()
    total = squares = shift.new_zeros(())
    for piece in blocks.split(max(1, PIECE * blocks.shape[dim] // blocks.numel()), dim):
        shifted = piece.double() - shift
        total = total + shifted.sum((0, -1))[..., None]
        squares = squares + sum_of_products(shifted, shifted)
    rest = total / count
    return shift + rest, squares / count - rest @ rest.mT


def scaled_rows(matrix: Tensor, weight: Tensor | None) -> Tensor:
    return matrix if weight is None else matrix * weight.view(*matrix.shape[:2], 1)


def center(blocks: Tensor, mean: Tensor) -> Tensor:
    """Subtract a mean, and what it loses when rounded: at 10^4 standard deviations one float32 number is not enough."""
    rounded = mean.to(blocks.dtype)
    centered = blocks - rounded
    return centered if mean.dtype == blocks.dtype else centered.sub_((mean - rounded).to(blocks.dtype))


class WhitenBatch(torch.autograd.Function):
    """Keeps the input and small matrices; the centered input is computed again."""

    @staticmethod
    def forward(
        ctx: Any, blocks: Tensor, weight: Tensor | None, bias: Tensor | None, how: Method
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(blocks.device.type, enabled=False):
            wide = widen(blocks)
            mean, cov = moments(wide)
            matrix, ctx.derivative = whitening_matrix(cov, how)
            matrix = matrix.to(wide.dtype)
            output = product(scaled_rows(matrix, weight), center(wide, mean))
            if bias is not None:
                output += bias.view_as(mean)
        ctx.how = how
        ctx.save_for_backward(blocks, weight, bias, mean, matrix)
        mean, cov = mean.flatten().to(wide.dtype), cov.to(wide.dtype)
        ctx.mark_non_differentiable(mean, cov)
        return output.to(blocks.dtype), mean, cov

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad_output = grad_outputs[0]
        blocks, weight, bias, mean, matrix = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *differentiable_gradients(grad_output, blocks, weight, bias, ctx.how, ctx.needs_input_grad), None
        with torch.autocast(blocks.device.type, enabled=False):
            grad, centered = widen(grad_output), center(widen(blocks), mean)
            count = len(blocks) * blocks.shape[-1]
            sum_dy, sum_dy_x = grad.sum((0, -1)), sum_of_products(grad, centered)
            grad_input = grad_weight = grad_bias = None
            if weight is not None and ctx.needs_input_grad[1]:
                grad_weight = (matrix * sum_dy_x).sum(-1).flatten().to(weight.dtype)
            if bias is not None and ctx.needs_input_grad[2]:
                grad_bias = sum_dy.flatten().to(bias.dtype)
            if ctx.needs_input_grad[0]:
                grad_cov = ctx.derivative(scaled_rows(sum_dy_x, weight).double())
                direct = scaled_rows(matrix, weight).mT
                grad_input = product(direct, grad - sum_dy[..., None] / count)
                add_product(grad_input, (grad_cov * (2 / count)).to(grad.dtype), centered)
                grad_input = grad_input.to(blocks.dtype)
        return grad_input, grad_weight, grad_bias, None


def differentiable_gradients(
    grad_output: Tensor, blocks: Tensor, weight: Tensor | None, bias: Tensor | None, how: Method, needed: Any
) -> list[Tensor | None]:
    """Gradients that can be differentiated again: autograd's own, of the plain formulas."""
    inputs = [blocks, weight, bias]
    with torch.enable_grad():
        group_size = blocks.shape[2]
        output = whitening.whiten_train(
            blocks.flatten(1, 2), weight, bias, group_size=group_size, **how._asdict()
        ).output
        wanted = [tensor for tensor, is_needed in zip(inputs, needed, strict=False) if is_needed]
        gradients = torch.autograd.grad(output.unflatten(1, blocks.shape[1:3]), wanted, grad_output, create_graph=True)
    if output.isfinite().all() and not all(gradient.isfinite().all() for gradient in gradients):
        raise RuntimeError(
            f"the gradient of {how.method} whitening cannot be differentiated again here, where eigenvalues of the "
            "covariance coincide: use method='cholesky' or 'newton_schulz', or no create_graph=True"
        )
    found = iter(gradients)
    return [next(found) if is_needed else None for is_needed in needed[:3]]
