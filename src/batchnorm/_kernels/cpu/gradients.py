"""The parts of the backward pass: g before residual and activation, its sums per channel, and what they give.

With m = count and the batch's own statistics (section 3 of the paper)

    grad_bias = sum g,   grad_weight = invstd * sum g (x - mean)
    grad_input = weight * invstd * (g - sum g / m - (x - mean) * invstd^2 * sum g (x - mean) / m)

and with given statistics ``grad_input = weight * invstd * g``.
"""

from functools import cache
from typing import Any

import numpy as np

from batchnorm._kernels.cpu.activations import BY_OUTPUT, PIECEWISE, activation_functions
from batchnorm._kernels.cpu.arguments import (
    BATCH,
    CHANNELS,
    COUNT,
    GIVEN,
    GRAD_BIAS,
    GRAD_INPUT,
    GRAD_OUTPUT,
    GRAD_RESIDUAL,
    GRAD_WEIGHT,
    REDUCE,
    RESIDUAL,
    SAVED,
    SPATIAL,
    SUMS,
    WEIGHT,
    WIDTH,
    X,
)
from batchnorm._kernels.cpu.elements import ELEMENTS, PER_CHANNEL, carray, fused, inner, picker, pointer, simd
from batchnorm._kernels.cpu.masks import mask_words, masker
from batchnorm._kernels.cpu.statistics import (
    channels_of,
    own_columns,
    repeat,
    saved_of,
    spread,
    sums_of_columns,
    sums_of_strip,
)

f8 = np.float64


def keeps_gradient(activation: str | None, residual: bool) -> bool:
    """Whether ``reduce`` stores g for ``apply``: where it is a result, or costs more to compute than to read."""
    return activation is not None and (residual or activation not in (*PIECEWISE, *BY_OUTPUT))


def source_of_gradient(activation: str | None, residual: bool) -> int:
    """Where the sums read g: where it is kept, or grad_output."""
    if not keeps_gradient(activation, residual):
        return GRAD_OUTPUT
    return GRAD_RESIDUAL if residual else GRAD_INPUT


@cache
def gradient_function(dtype: str, activation: str | None, residual: bool, per_column: bool) -> Any:
    """``gradient(x, dy, z, i, mu, scale, shift)``: g of element i; z holds residuals, or outputs."""
    _, real, read, _ = ELEMENTS[dtype]
    _, derivative = activation_functions(activation, real)
    at = picker(per_column)

    if activation is None:

        @inner
        def gradient(x, dy, z, i, mu, scale, shift):
            return read(dy[i])

    elif activation in BY_OUTPUT:

        @fused
        def gradient(x, dy, z, i, mu, scale, shift):
            return derivative(read(z[i]), read(dy[i]))

    elif residual:

        @fused
        def gradient(x, dy, z, i, mu, scale, shift):
            value = (read(x[i]) - at(mu, i)) * at(scale, i) + at(shift, i)
            return derivative(value + read(z[i]), read(dy[i]))

    else:

        @fused
        def gradient(x, dy, z, i, mu, scale, shift):
            value = (read(x[i]) - at(mu, i)) * at(scale, i) + at(shift, i)
            return derivative(value, read(dy[i]))

    return gradient


@cache
def keep_function(dtype: str, activation: str | None, residual: bool, mask: bool, per_column: bool) -> Any:
    """``keep(a, u, k, row, first, offset, n, mu, scale, shift)``: store g of a piece of a row, where it is kept."""
    element, _, _, write = ELEMENTS[dtype]
    kept = GRAD_RESIDUAL if residual else GRAD_INPUT
    gradient = gradient_function(dtype, None if mask else activation, residual, per_column)
    set_masked = masker(activation if mask else None, dtype)
    stores = keeps_gradient(activation, residual)

    @simd
    def set_gradient(x, dy, z, out, n, mu, scale, shift):
        for i in range(n):
            out[i] = write(gradient(x, dy, z, i, mu, scale, shift))

    @inner
    def keep(a, u, k, row, first, offset, n, mu, scale, shift):
        if mask:
            set_masked(a[GRAD_OUTPUT] + offset, n, mask_words(a, u, k, row, first), a[kept] + offset)
        elif stores:
            x = carray(pointer(a[X] + offset), (n,), element)
            dy = carray(pointer(a[GRAD_OUTPUT] + offset), (n,), element)
            z = carray(pointer(a[RESIDUAL] + offset), (n,), element)
            set_gradient(x, dy, z, carray(pointer(a[kept] + offset), (n,), element), n, mu, scale, shift)

    return keep


@cache
def finish_function(dtype: str, partial_columns: bool) -> Any:
    """``finish(a, u, partials)``: sums over the strip's chunks, and the gradients of weight and bias."""
    real = ELEMENTS[dtype][1]
    stored, _, write = PER_CHANNEL[dtype]
    size = np.dtype(stored).itemsize
    sums = sums_of_columns if partial_columns else sums_of_strip

    @simd
    def gradients(sum_dy, sum_dy_xmu, mean, invstd, n, sums_dy, sums_dy_xmu, grad_weight, grad_bias):
        for j in range(n):
            s = sum_dy[j]
            # summed with the rounded mean
            q = sum_dy_xmu[j] - (mean[j] - f8(real(mean[j]))) * s
            sums_dy[j], sums_dy_xmu[j] = s, q
            grad_weight[j], grad_bias[j] = write(real(q * invstd[j])), write(real(s))

    @inner
    def finish(a, u, partials):
        if a[REDUCE] == 0:
            return
        first, last = channels_of(a, u)
        n = last - first
        mean, invstd = saved_of(a, first, n)
        sum_dy, sum_dy_xmu = sums(a, partials)
        sums_dy, sums_dy_xmu = totals_of(a, first, n)
        grad_weight = carray(pointer(a[GRAD_WEIGHT] + size * first), (n,), stored)
        grad_bias = carray(pointer(a[GRAD_BIAS] + size * first), (n,), stored)
        gradients(sum_dy, sum_dy_xmu, mean, invstd, n, sums_dy, sums_dy_xmu, grad_weight, grad_bias)

    return finish


@inner
def totals_of(a, first, n):
    """sum_dy and sum_dy_xmu of n channels."""
    start = a[SUMS] + 8 * first
    return carray(pointer(start), (n,), np.float64), carray(pointer(start + 8 * a[CHANNELS]), (n,), np.float64)


@cache
def slopes_function(dtype: str) -> Any:
    """``slopes(a, first, n, of_g, of_x, constant)``: grad_input = g of_g + (x - mu) of_x + constant, of n channels."""
    real = ELEMENTS[dtype][1]
    stored, read, _ = PER_CHANNEL[dtype]
    size = np.dtype(stored).itemsize

    @simd
    def by_batch(mean, invstd, weight, has_weight, sum_dy, sum_dy_xmu, count, n, of_g, of_x, constant):
        for j in range(n):
            slope = invstd[j] * (f8(read(weight[j])) if has_weight else 1.0)
            curve = sum_dy_xmu[j] * invstd[j] * invstd[j] / count
            rest = mean[j] - f8(real(mean[j]))
            of_g[j] = real(slope)
            of_x[j] = real(-slope * curve)
            constant[j] = real(slope * (rest * curve - sum_dy[j] / count))

    @simd
    def by_given(invstd, weight, has_weight, n, of_g, of_x, constant):
        for j in range(n):
            of_g[j] = real(invstd[j] * (f8(read(weight[j])) if has_weight else 1.0))
            of_x[j] = real(0)
            constant[j] = real(0)

    @inner
    def slopes(a, first, n, of_g, of_x, constant):
        mean, invstd = saved_of(a, first, n)
        # where there is none, it is not read
        weight = carray(pointer((a[WEIGHT] if a[WEIGHT] != 0 else a[SAVED]) + first * size), (n,), stored)
        if a[GIVEN] == BATCH:
            sum_dy, sum_dy_xmu = totals_of(a, first, n)
            count = f8(a[COUNT])
            by_batch(mean, invstd, weight, a[WEIGHT] != 0, sum_dy, sum_dy_xmu, count, n, of_g, of_x, constant)
        else:
            by_given(invstd, weight, a[WEIGHT] != 0, n, of_g, of_x, constant)

    return slopes


@cache
def slopes_expander(dtype: str) -> Any:
    """``expand(a, left, n, scratch, new)``: arrays of of_g, of_x and constant, one number per column."""
    real = ELEMENTS[dtype][1]
    slopes = slopes_function(dtype)

    @inner
    def expand(a, left, n, scratch, new):
        width = 8 * a[WIDTH]
        of_g = carray(pointer(scratch + 4 * width), (n,), real)
        of_x = carray(pointer(scratch + 5 * width), (n,), real)
        constant = carray(pointer(scratch + 6 * width), (n,), real)
        if new:
            channels = own_columns(a, n) // a[SPATIAL]
            # the last array of the private memory is free until rows are written
            values = carray(pointer(scratch + 7 * width), (3 * channels,), real)
            if a[SPATIAL] == 1:
                slopes(a, left, channels, of_g, of_x, constant)
                repeat(of_g, channels, n)
                repeat(of_x, channels, n)
                repeat(constant, channels, n)
            else:
                slopes(a, left // a[SPATIAL], channels, values, values[channels:], values[2 * channels :])
                spread(a, values, n, of_g)
                spread(a, values[channels:], n, of_x)
                spread(a, values[2 * channels :], n, constant)
        return of_g, of_x, constant

    return expand
