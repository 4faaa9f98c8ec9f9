"""Backward: the sums of the gradient, then the gradient of the input, by chunks. ``gradients.py`` has the formulas."""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from batchnorm._kernels.cpu.arguments import (
    GRAD_INPUT,
    GRAD_OUTPUT,
    GRAD_RESIDUAL,
    RESIDUAL,
    ROW_STRIDE,
    ROWS,
    SPATIAL,
    STREAM,
    WIDTH,
    X,
)
from batchnorm._kernels.cpu.driver import kernel, piece, row_columns, streamed
from batchnorm._kernels.cpu.elements import (
    ELEMENTS,
    carray,
    inner,
    look_ahead,
    minus,
    picker,
    pointer,
    simd,
    stream,
    summing,
    times,
)
from batchnorm._kernels.cpu.forward import affine_expander, channel_function
from batchnorm._kernels.cpu.geometry import BLOCK
from batchnorm._kernels.cpu.gradients import (
    finish_function,
    gradient_function,
    keep_function,
    keeps_gradient,
    slopes_expander,
    slopes_function,
    source_of_gradient,
)
from batchnorm._kernels.cpu.masks import mask_words, masker

f8 = np.float64


def backward(form: str, dtype: str, activation: str | None, residual: bool, mask: bool) -> Callable[[int], None]:
    """The kernel for one form, dtype and epilogue, the same as the forward pass had."""
    columns = form == "columns"
    epilogue = (dtype, activation, residual, mask)
    reduce = (reduce_columns if columns else reduce_rows)(*epilogue)
    apply = (apply_columns if columns else apply_rows)(*epilogue)
    return kernel(reduce, finish_function(dtype, columns), apply, columns)


@cache
def reduce_rows(dtype: str, activation: str | None, residual: bool, mask: bool) -> Any:
    element, _, read, _ = ELEMENTS[dtype]
    size = np.dtype(element).itemsize
    channel = channel_function(dtype)
    keep = keep_function(dtype, activation, residual, mask, per_column=False)
    source = source_of_gradient(activation, residual)
    gradient = gradient_function(dtype, activation if source == GRAD_OUTPUT else None, residual, per_column=False)

    @summing
    def sums(x, g, z, n, mu, scale, shift):
        sum_dy, sum_dy_xmu = 0.0, 0.0
        for i in range(n):
            value = gradient(x, g, z, i, mu, scale, shift)
            sum_dy += f8(value)
            sum_dy_xmu += times(f8(value), f8(minus(read(x[i]), mu)))
        return sum_dy, sum_dy_xmu

    @inner
    def reduce(a, u, k, partials, scratch, new):
        mu, scale, shift = channel(a, u, scratch)
        first_row, last_row, left, n = piece(a, u, k)
        s, q, stride = 0.0, 0.0, size * a[ROW_STRIDE]
        for row in range(first_row, last_row):
            for first in range(0, n, BLOCK):
                m = min(BLOCK, n - first)
                offset = row * stride + size * (left + first)
                look_ahead(a[X] + offset + stride, size * m)
                look_ahead(a[GRAD_OUTPUT] + offset + stride, size * m)
                keep(a, u, k, row, first, offset, m, mu, scale, shift)
                x = carray(pointer(a[X] + offset), (m,), element)
                g = carray(pointer(a[source] + offset), (m,), element)
                z = carray(pointer(a[RESIDUAL] + offset), (m,), element)
                row_s, row_q = sums(x, g, z, m, mu, scale, shift)
                s += row_s
                q += row_q
        out = carray(pointer(partials + 16 * k), (2,), np.float64)
        out[0], out[1] = s, q

    return reduce


@cache
def reduce_columns(dtype: str, activation: str | None, residual: bool, mask: bool) -> Any:
    element, _, read, _ = ELEMENTS[dtype]
    size = np.dtype(element).itemsize
    expand = affine_expander(dtype)
    keep = keep_function(dtype, activation, residual, mask, per_column=True)
    source = source_of_gradient(activation, residual)
    gradient = gradient_function(dtype, activation if source == GRAD_OUTPUT else None, residual, per_column=True)

    @simd
    def one(x, g, z, n, mu, scale, shift, s, q):
        for i in range(n):
            value = gradient(x, g, z, i, mu, scale, shift)
            s[i] += f8(value)
            q[i] += f8(value) * f8(read(x[i]) - mu[i])

    @simd
    def four(x0, x1, x2, x3, g0, g1, g2, g3, z0, z1, z2, z3, n, mu, scale, shift, s, q):
        for i in range(n):
            v0, v1 = gradient(x0, g0, z0, i, mu, scale, shift), gradient(x1, g1, z1, i, mu, scale, shift)
            v2, v3 = gradient(x2, g2, z2, i, mu, scale, shift), gradient(x3, g3, z3, i, mu, scale, shift)
            s[i] += (f8(v0) + f8(v1)) + (f8(v2) + f8(v3))
            d0, d1 = f8(read(x0[i]) - mu[i]), f8(read(x1[i]) - mu[i])
            d2, d3 = f8(read(x2[i]) - mu[i]), f8(read(x3[i]) - mu[i])
            q[i] += (f8(v0) * d0 + f8(v1) * d1) + (f8(v2) * d2 + f8(v3) * d3)

    @inner
    def rows_of(base, offset, stride, m):
        return (
            carray(pointer(base + offset), (m,), element),
            carray(pointer(base + offset + stride), (m,), element),
            carray(pointer(base + offset + 2 * stride), (m,), element),
            carray(pointer(base + offset + 3 * stride), (m,), element),
        )

    @inner
    def reduce(a, u, k, partials, scratch, new):
        first_row, last_row, left, n = piece(a, u, k)
        mu, scale, shift = expand(a, left, n, scratch, new)
        out = partials + 16 * a[WIDTH] * k
        s, q = carray(pointer(out), (n,), np.float64), carray(pointer(out + 8 * a[WIDTH]), (n,), np.float64)
        s[:] = 0.0
        q[:] = 0.0
        stride = size * a[ROW_STRIDE]
        row = first_row
        while row < last_row:
            # the last row of all may be shorter
            rows = 4 if row + 4 <= last_row and row + 4 < a[ROWS] else 1
            offset = row * stride + size * left
            m = row_columns(a, row, left, n)
            for r in range(rows):
                if a[STREAM] != 0:
                    look_ahead(a[X] + offset + (rows + r) * stride, size * n)
                    look_ahead(a[GRAD_OUTPUT] + offset + (rows + r) * stride, size * n)
                keep(a, u, k, row + r, 0, offset + r * stride, m, mu, scale, shift)
            x0, x1, x2, x3 = rows_of(a[X], offset, stride, m)
            g0, g1, g2, g3 = rows_of(a[source], offset, stride, m)
            z0, z1, z2, z3 = rows_of(a[RESIDUAL], offset, stride, m)
            if rows == 4:
                four(x0, x1, x2, x3, g0, g1, g2, g3, z0, z1, z2, z3, m, mu, scale, shift, s, q)
            else:
                one(x0, g0, z0, m, mu, scale, shift, s, q)
            row += rows

    return reduce


@cache
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
    def combine(x, dy, z, dx, n, mu, scale, shift, of_g, of_x, constant):
        for i in range(n):
            g = read(dx[i]) if in_place else gradient(x, dy, z, i, mu, scale, shift)
            d = read(x[i]) - at(mu, i)
            slope = at(of_x, i)
            dx[i] = write(g * at(of_g, i) + (d * slope + at(constant, i)))

    @inner
    def apply_row(a, offset, n, mu, scale, shift, of_g, of_x, constant, buffer):
        x = carray(pointer(a[X] + offset), (n,), element)
        dy = carray(pointer(a[source] + offset), (n,), element)
        z = carray(pointer(a[RESIDUAL] + offset), (n,), element)
        target = a[GRAD_INPUT] + offset
        streams = not in_place and streamed(a, target, size * n)
        dx = carray(pointer(buffer if streams else target), (n,), element)
        combine(x, dy, z, dx, n, mu, scale, shift, of_g, of_x, constant)
        if streams:
            stream(target, buffer, size * n)

    return apply_row


@cache
def apply_rows(dtype: str, activation: str | None, residual: bool, mask: bool) -> Any:
    element, real, _, _ = ELEMENTS[dtype]
    size = np.dtype(element).itemsize
    channel, slopes = channel_function(dtype), slopes_function(dtype)
    apply_row = input_gradient_function(dtype, activation, residual, mask, per_column=False)

    @inner
    def apply(a, u, k, scratch, new):
        mu, scale, shift = channel(a, u, scratch)
        numbers = carray(pointer(scratch), (3,), real)
        slopes(a, u, 1, numbers, numbers[1:], numbers[2:])
        of_g, of_x, constant = numbers[0], numbers[1], numbers[2]
        first_row, last_row, left, n = piece(a, u, k)
        for row in range(first_row, last_row):
            for first in range(0, n, BLOCK):
                offset = size * (row * a[ROW_STRIDE] + left + first)
                apply_row(a, offset, min(BLOCK, n - first), mu, scale, shift, of_g, of_x, constant, scratch)

    return apply


@cache
def apply_columns(dtype: str, activation: str | None, residual: bool, mask: bool) -> Any:
    element, *_ = ELEMENTS[dtype]
    size = np.dtype(element).itemsize
    expand, expand_slopes = affine_expander(dtype), slopes_expander(dtype)
    apply_row = input_gradient_function(dtype, activation, residual, mask, per_column=True)

    @inner
    def apply(a, u, k, scratch, new):
        first_row, last_row, left, n = piece(a, u, k)
        mu, scale, shift = expand(a, left, n, scratch, new)
        of_g, of_x, constant = expand_slopes(a, left, n, scratch, new)
        buffer = scratch + 7 * 8 * a[WIDTH]
        for row in range(first_row, last_row):
            offset = size * (row * a[ROW_STRIDE] + left)
            apply_row(a, offset, row_columns(a, row, left, n), mu, scale, shift, of_g, of_x, constant, buffer)

    return apply


def frozen(form: str, dtype: str, activation: str | None, residual: bool, mask: bool) -> Callable[[int], None]:
    """Given statistics and no gradient of weight and bias: ``grad_input`` from grad_output and the mask alone."""
    element, real, read, write = ELEMENTS[dtype]
    size = np.dtype(element).itemsize
    per_column = form == "columns"
    slopes = slopes_function(dtype)
    at = picker(per_column)
    kept = GRAD_RESIDUAL if residual else GRAD_INPUT
    set_masked = masker(activation if mask else None, dtype)

    @simd
    def scale_row(g, dx, n, of_g):
        for i in range(n):
            dx[i] = write(read(g[i]) * at(of_g, i))

    expand = slopes_expander(dtype)

    @inner
    def slope_of_columns(a, left, n, scratch, new):
        return expand(a, left, n, scratch, new)[0]

    @inner
    def slope_of_strip(a, left, n, scratch, new):
        numbers = carray(pointer(scratch), (3,), real)
        slopes(a, left // a[SPATIAL], 1, numbers, numbers[1:], numbers[2:])
        return numbers[0]

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
