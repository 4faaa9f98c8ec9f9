"""Backward: the sums of the gradient, then the gradient of the input, chunk by chunk.

With g the gradient before residual and activation, m = count and the batch's own statistics (section 3 of the paper)

    grad_bias = sum g,   grad_weight = invstd * sum g (x - mean)
    grad_input = weight * invstd * (g - sum g / m - (x - mean) * invstd^2 * sum g (x - mean) / m)

and with given statistics ``grad_input = weight * invstd * g``.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from batchnorm._kernels.cpu.activations import PIECEWISE, activation_functions
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
    ROW_STRIDE,
    SAVED,
    SPATIAL,
    STREAM,
    SUMS,
    WEIGHT,
    WIDTH,
    X,
)
from batchnorm._kernels.cpu.driver import kernel, piece, row_columns, streamed
from batchnorm._kernels.cpu.elements import ELEMENTS, carray, fused, inner, look_ahead, picker, pointer, simd, stream
from batchnorm._kernels.cpu.forward import affine_expander
from batchnorm._kernels.cpu.geometry import BLOCK
from batchnorm._kernels.cpu.masks import mask_words, masker
from batchnorm._kernels.cpu.statistics import (
    affine_function,
    channels_of,
    own_columns,
    repeat,
    total_of_columns,
    total_of_strip,
)

f8 = np.float64


def backward(form: str, dtype: str, activation: str | None, residual: bool, mask: bool) -> Callable[[int], None]:
    """The kernel for one form, dtype and epilogue, the same as the forward pass had."""
    columns = form == "columns"
    epilogue = (dtype, activation, residual, mask)
    reduce = (reduce_columns if columns else reduce_rows)(*epilogue)
    apply = (apply_columns if columns else apply_rows)(*epilogue)
    return kernel(reduce, finish_function(dtype, columns), apply, columns)


def keeps_gradient(activation: str | None, residual: bool) -> bool:
    """Whether ``reduce`` stores g for ``apply``: where it is a result, or costs more to compute than to read."""
    return activation is not None and (residual or activation not in PIECEWISE)


def finish_function(dtype: str, partial_columns: bool) -> Any:
    """``finish(a, u, partials)``: sums over the strips' chunks, and the gradients of weight and bias."""
    real = ELEMENTS[dtype][1]
    total = total_of_columns if partial_columns else total_of_strip

    @inner
    def finish(a, u, partials):
        if a[REDUCE] == 0:
            return
        channels = a[CHANNELS]
        saved = carray(pointer(a[SAVED]), (2 * channels,), np.float64)
        sums = carray(pointer(a[SUMS]), (2 * channels,), np.float64)
        grad_weight = carray(pointer(a[GRAD_WEIGHT]), (channels,), real)
        grad_bias = carray(pointer(a[GRAD_BIAS]), (channels,), real)
        first, last = channels_of(a, u)
        for c in range(first, last):
            sum_dy, sum_dy_xmu = total(a, c - first, partials)
            # summed with the rounded mean
            sum_dy_xmu -= (saved[c] - f8(real(saved[c]))) * sum_dy
            sums[c], sums[channels + c] = sum_dy, sum_dy_xmu
            if a[GRAD_WEIGHT] != 0:
                grad_weight[c] = real(sum_dy_xmu * saved[channels + c])
            if a[GRAD_BIAS] != 0:
                grad_bias[c] = real(sum_dy)

    return finish


def slopes_function(real: type) -> Any:
    """``slopes(a, c)``: (mu, of_g, of_x, constant) with ``grad_input = g of_g + (x - mu) of_x + constant``."""

    @inner
    def slopes(a, c):
        channels = a[CHANNELS]
        saved = carray(pointer(a[SAVED]), (2 * channels,), np.float64)
        mean, invstd = saved[c], saved[channels + c]
        mu = real(mean)
        of_g = invstd
        if a[WEIGHT] != 0:
            of_g *= f8(carray(pointer(a[WEIGHT]), (channels,), real)[c])
        if a[GIVEN] != BATCH:
            return mu, real(of_g), real(0), real(0)
        sums = carray(pointer(a[SUMS]), (2 * channels,), np.float64)
        mean_g = sums[c] / f8(a[COUNT])
        slope = sums[channels + c] * invstd * invstd / f8(a[COUNT])
        return mu, real(of_g), real(-of_g * slope), real(of_g * ((mean - f8(mu)) * slope - mean_g))

    return slopes


def gradient_function(dtype: str, activation: str | None, residual: bool, per_column: bool) -> Any:
    """``gradient(x, dy, z, i, mu, scale, shift)``: g of element i."""
    _, real, read, _ = ELEMENTS[dtype]
    _, derivative = activation_functions(activation, real)
    at = picker(per_column)

    if activation is None:

        @inner
        def gradient(x, dy, z, i, mu, scale, shift):
            return read(dy[i])

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


def row_function(dtype: str, activation: str | None, residual: bool, mask: bool, per_column: bool) -> Any:
    """``reduce_row(a, u, k, row, first, offset, n, mu, scale, shift, s, q)``: the sums of a piece of a row.

    Stores g where it is kept. With ``per_column`` the sums are added to the arrays s and q.
    """
    element, _, read, write = ELEMENTS[dtype]
    stores = keeps_gradient(activation, residual)
    kept = GRAD_RESIDUAL if residual else GRAD_INPUT
    gradient = gradient_function(dtype, None if mask else activation, residual, per_column)
    set_masked = masker(activation if mask else None, dtype)
    stores_here = stores and not mask

    if per_column:

        @simd
        def sums(x, dy, z, out, n, mu, scale, shift, s, q):
            for i in range(n):
                g = gradient(x, dy, z, i, mu, scale, shift)
                if stores_here:
                    out[i] = write(g)
                s[i] += f8(g)
                q[i] += f8(g) * f8(read(x[i]) - mu[i])
            return 0.0, 0.0

    else:

        @simd
        def sums(x, dy, z, out, n, mu, scale, shift, s, q):
            sum_dy, sum_dy_xmu = 0.0, 0.0
            for i in range(n):
                g = gradient(x, dy, z, i, mu, scale, shift)
                if stores_here:
                    out[i] = write(g)
                sum_dy += f8(g)
                sum_dy_xmu += f8(g) * f8(read(x[i]) - mu)
            return sum_dy, sum_dy_xmu

    @inner
    def reduce_row(a, u, k, row, first, offset, n, mu, scale, shift, s, q):
        x = carray(pointer(a[X] + offset), (n,), element)
        dy = carray(pointer(a[GRAD_OUTPUT] + offset), (n,), element)
        z = carray(pointer(a[RESIDUAL] + offset), (n,), element)
        out = carray(pointer(a[kept] + offset), (n,), element)
        if mask:
            set_masked(a[GRAD_OUTPUT] + offset, n, mask_words(a, u, k, row, first), a[kept] + offset)
            return sums(x, out, z, out, n, mu, scale, shift, s, q)
        return sums(x, dy, z, out, n, mu, scale, shift, s, q)

    return reduce_row


def reduce_rows(dtype: str, activation: str | None, residual: bool, mask: bool) -> Any:
    element, real, _, _ = ELEMENTS[dtype]
    size = np.dtype(element).itemsize
    affine = affine_function(real)
    reduce_row = row_function(dtype, activation, residual, mask, per_column=False)

    @inner
    def reduce(a, u, k, partials, scratch, new):
        mu, scale, shift = affine(a, u)
        first_row, last_row, left, n = piece(a, u, k)
        s, q, stride = 0.0, 0.0, size * a[ROW_STRIDE]
        for row in range(first_row, last_row):
            for first in range(0, n, BLOCK):
                block = min(BLOCK, n - first)
                offset = row * stride + size * (left + first)
                look_ahead(a[X] + offset + stride, size * block)
                look_ahead(a[GRAD_OUTPUT] + offset + stride, size * block)
                row_s, row_q = reduce_row(a, u, k, row, first, offset, block, mu, scale, shift, 0.0, 0.0)
                s += row_s
                q += row_q
        out = carray(pointer(partials + 16 * k), (2,), np.float64)
        out[0], out[1] = s, q

    return reduce


def reduce_columns(dtype: str, activation: str | None, residual: bool, mask: bool) -> Any:
    element, real, _, _ = ELEMENTS[dtype]
    size = np.dtype(element).itemsize
    expand = affine_expander(real)
    reduce_row = row_function(dtype, activation, residual, mask, per_column=True)

    @inner
    def reduce(a, u, k, partials, scratch, new):
        first_row, last_row, left, n = piece(a, u, k)
        mu, scale, shift = expand(a, left, n, scratch, new)
        out = partials + 16 * a[WIDTH] * k
        s, q = carray(pointer(out), (n,), np.float64), carray(pointer(out + 8 * a[WIDTH]), (n,), np.float64)
        s[:] = 0.0
        q[:] = 0.0
        stride = size * a[ROW_STRIDE]
        for row in range(first_row, last_row):
            offset = size * (row * a[ROW_STRIDE] + left)
            if a[STREAM] != 0:
                look_ahead(a[X] + offset + 2 * stride, size * n)
                look_ahead(a[GRAD_OUTPUT] + offset + 2 * stride, size * n)
            reduce_row(a, u, k, row, 0, offset, row_columns(a, row, left, n), mu, scale, shift, s, q)

    return reduce


def input_gradient_function(dtype: str, activation: str | None, residual: bool, mask: bool, per_column: bool) -> Any:
    """``apply_row(a, offset, n, mu, ..., constant, buffer)``: grad_input of a piece of a row."""
    element, _, read, write = ELEMENTS[dtype]
    size = np.dtype(element).itemsize
    stored = keeps_gradient(activation, residual)
    in_place = stored and not residual
    source = GRAD_RESIDUAL if stored and residual else GRAD_OUTPUT
    gradient = gradient_function(dtype, None if stored else activation, False, per_column)
    at = picker(per_column)

    @simd
    def combine(x, dy, dx, n, mu, scale, shift, of_g, of_x, constant):
        for i in range(n):
            g = read(dx[i]) if in_place else gradient(x, dy, dy, i, mu, scale, shift)
            d = read(x[i]) - at(mu, i)
            slope = at(of_x, i)
            dx[i] = write(g * at(of_g, i) + (d * slope + at(constant, i)))

    @inner
    def apply_row(a, offset, n, mu, scale, shift, of_g, of_x, constant, buffer):
        x = carray(pointer(a[X] + offset), (n,), element)
        dy = carray(pointer(a[source] + offset), (n,), element)
        target = a[GRAD_INPUT] + offset
        streams = not in_place and streamed(a, target, size * n)
        dx = carray(pointer(buffer if streams else target), (n,), element)
        combine(x, dy, dx, n, mu, scale, shift, of_g, of_x, constant)
        if streams:
            stream(target, buffer, size * n)

    return apply_row


def apply_rows(dtype: str, activation: str | None, residual: bool, mask: bool) -> Any:
    element, real, _, _ = ELEMENTS[dtype]
    size = np.dtype(element).itemsize
    affine, slopes = affine_function(real), slopes_function(real)
    apply_row = input_gradient_function(dtype, activation, residual, mask, per_column=False)

    @inner
    def apply(a, u, k, scratch, new):
        _, scale, shift = affine(a, u)
        mu, of_g, of_x, constant = slopes(a, u)
        first_row, last_row, left, n = piece(a, u, k)
        for row in range(first_row, last_row):
            for first in range(0, n, BLOCK):
                offset = size * (row * a[ROW_STRIDE] + left + first)
                apply_row(a, offset, min(BLOCK, n - first), mu, scale, shift, of_g, of_x, constant, scratch)

    return apply


def apply_columns(dtype: str, activation: str | None, residual: bool, mask: bool) -> Any:
    element, real, _, _ = ELEMENTS[dtype]
    size = np.dtype(element).itemsize
    expand, slopes = affine_expander(real), slopes_function(real)
    apply_row = input_gradient_function(dtype, activation, residual, mask, per_column=True)

    @inner
    def apply(a, u, k, scratch, new):
        first_row, last_row, left, n = piece(a, u, k)
        mu, scale, shift = expand(a, left, n, scratch, new)
        spatial, width = a[SPATIAL], 8 * a[WIDTH]
        of_g = carray(pointer(scratch + 4 * width), (n,), real)
        of_x = carray(pointer(scratch + 5 * width), (n,), real)
        constant = carray(pointer(scratch + 6 * width), (n,), real)
        own = own_columns(a, n)
        if new:
            for j in range(own // spatial):
                _, g, x, c = slopes(a, left // spatial + j)
                for i in range(j * spatial, (j + 1) * spatial):
                    of_g[i], of_x[i], constant[i] = g, x, c
            repeat(of_g, own, n)
            repeat(of_x, own, n)
            repeat(constant, own, n)
        buffer = scratch + 7 * width
        for row in range(first_row, last_row):
            offset = size * (row * a[ROW_STRIDE] + left)
            apply_row(a, offset, row_columns(a, row, left, n), mu, scale, shift, of_g, of_x, constant, buffer)

    return apply


def frozen(form: str, dtype: str, activation: str | None, residual: bool, mask: bool) -> Callable[[int], None]:
    """Given statistics and no gradient of weight and bias: ``grad_input`` from grad_output and the mask alone."""
    element, real, read, write = ELEMENTS[dtype]
    size = np.dtype(element).itemsize
    per_column = form == "columns"
    slopes = slopes_function(real)
    at = picker(per_column)
    kept = GRAD_RESIDUAL if residual else GRAD_INPUT
    set_masked = masker(activation if mask else None, dtype)

    @simd
    def scale_row(g, dx, n, of_g):
        for i in range(n):
            dx[i] = write(read(g[i]) * at(of_g, i))

    @inner
    def slope_of_columns(a, left, n, scratch, new):
        spatial = a[SPATIAL]
        of_g = carray(pointer(scratch), (n,), real)
        if not new:
            return of_g
        own = own_columns(a, n)
        for j in range(own // spatial):
            value = slopes(a, left // spatial + j)[1]
            for i in range(j * spatial, (j + 1) * spatial):
                of_g[i] = value
        repeat(of_g, own, n)
        return of_g

    @inner
    def slope_of_strip(a, left, n, scratch, new):
        return slopes(a, left // a[SPATIAL])[1]

    slope = slope_of_columns if per_column else slope_of_strip

    @inner
    def apply(a, u, k, scratch, new):
        first_row, last_row, left, n = piece(a, u, k)
        of_g = slope(a, left, n, scratch, new)
        for row in range(first_row, last_row):
            offset = size * (row * a[ROW_STRIDE] + left)
            m = row_columns(a, row, left, n)
            dy = carray(pointer(a[GRAD_OUTPUT] + offset), (m,), element)
            out = carray(pointer(a[kept] + offset), (m,), element)
            dx = carray(pointer(a[GRAD_INPUT] + offset), (m,), element)
            if mask:
                set_masked(a[GRAD_OUTPUT] + offset, m, mask_words(a, u, k, row, 0), a[kept] + offset)
                scale_row(out, dx, m, of_g)
            else:
                scale_row(dy, dx, m, of_g)

    @inner
    def nothing(a, u, k, partials, scratch, new):
        pass

    @inner
    def finish(a, u, partials):
        pass

    return kernel(nothing, finish, apply, per_column)
