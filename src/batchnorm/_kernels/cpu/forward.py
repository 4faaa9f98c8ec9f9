"""Forward: sums of the batch, then ``act((x - mean) * invstd * weight + bias + residual)``, chunk by chunk."""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from batchnorm._kernels.cpu.activations import activation_functions
from batchnorm._kernels.cpu.arguments import RESIDUAL, ROW_STRIDE, ROWS, SPATIAL, WIDTH, X, Y
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
)
from batchnorm._kernels.cpu.geometry import BLOCK
from batchnorm._kernels.cpu.masks import mask_words, packer
from batchnorm._kernels.cpu.statistics import (
    affine_function,
    finish_function,
    own_columns,
    repeat,
    shifts_function,
    spread,
)

f8 = np.float64


def forward(form: str, dtype: str, activation: str | None, residual: bool, mask: bool) -> Callable[[int], None]:
    """The kernel for one form, dtype and epilogue; ``mask`` notes where the gradient passes the activation."""
    columns = form == "columns"
    reduce = (reduce_columns if columns else reduce_rows)(dtype)
    apply = (apply_columns if columns else apply_rows)(dtype, activation, residual, mask)
    return kernel(reduce, finish_function(dtype, columns), apply, columns)


@cache
def reduce_rows(dtype: str) -> Any:
    element, _, read, _ = ELEMENTS[dtype]
    size = np.dtype(element).itemsize
    shifts = shifts_function(dtype)

    @summing
    def sums(x, n, shift):
        s, q = 0.0, 0.0
        for i in range(n):
            d = minus(f8(read(x[i])), shift)
            s += d
            q += d * d
        return s, q

    @inner
    def reduce(a, u, k, partials, scratch, new):
        shifts(a, u, 1, carray(pointer(scratch), (1,), np.float64))
        shift = carray(pointer(scratch), (1,), np.float64)[0]
        first_row, last_row, left, n = piece(a, u, k)
        s, q = 0.0, 0.0
        stride = size * a[ROW_STRIDE]
        for row in range(first_row, last_row):
            for first in range(0, n, BLOCK):
                block = min(BLOCK, n - first)
                x = a[X] + size * (left + first) + row * stride
                look_ahead(x + stride, size * block)
                row_s, row_q = sums(carray(pointer(x), (block,), element), block, shift)
                s += row_s
                q += row_q
        out = carray(pointer(partials + 16 * k), (2,), np.float64)
        out[0], out[1] = s, q

    return reduce


@cache
def apply_rows(dtype: str, activation: str | None, residual: bool, mask: bool) -> Any:
    element, *_ = ELEMENTS[dtype]
    size = np.dtype(element).itemsize
    channel = channel_function(dtype)
    write_row = row_writer(dtype, activation, residual, mask, per_column=False)

    @inner
    def apply(a, u, k, scratch, new):
        mu, scale, shift = channel(a, u, scratch)
        first_row, last_row, left, n = piece(a, u, k)
        for row in range(first_row, last_row):
            for first in range(0, n, BLOCK):
                offset = size * (row * a[ROW_STRIDE] + left + first)
                write_row(a, u, k, row, first, offset, min(BLOCK, n - first), mu, scale, shift, scratch)

    return apply


@cache
def channel_function(dtype: str) -> Any:
    """``channel(a, c, scratch)``: mu, scale and shift of one channel, as numbers."""
    real = ELEMENTS[dtype][1]
    affine = affine_function(dtype)

    @inner
    def channel(a, c, scratch):
        mu = carray(pointer(scratch), (1,), real)
        scale = carray(pointer(scratch + 8), (1,), real)
        shift = carray(pointer(scratch + 16), (1,), real)
        affine(a, c, 1, mu, scale, shift)
        return mu[0], scale[0], shift[0]

    return channel


@cache
def row_writer(dtype: str, activation: str | None, residual: bool, mask: bool, per_column: bool) -> Any:
    """Write a piece of a row; mu, scale and shift are arrays with ``per_column``, numbers otherwise."""
    element, real, read, write = ELEMENTS[dtype]
    size = np.dtype(element).itemsize
    act, _ = activation_functions(activation, real)
    pack = packer(activation if mask else None, dtype)

    at = picker(per_column)

    if residual:

        @simd
        def normalize(x, z, y, n, mu, scale, shift):
            for i in range(n):
                value = (read(x[i]) - at(mu, i)) * at(scale, i) + at(shift, i)
                y[i] = write(act(value + read(z[i])))

    else:

        @simd
        def normalize(x, z, y, n, mu, scale, shift):
            for i in range(n):
                y[i] = write(act((read(x[i]) - at(mu, i)) * at(scale, i) + at(shift, i)))

    @inner
    def write_row(a, u, k, row, first, offset, n, mu, scale, shift, buffer):
        x = carray(pointer(a[X] + offset), (n,), element)
        z = carray(pointer(a[RESIDUAL] + offset), (n,), element)
        target = a[Y] + offset
        streams = streamed(a, target, size * n)
        y = carray(pointer(buffer if streams else target), (n,), element)
        normalize(x, z, y, n, mu, scale, shift)
        if mask:
            pack(buffer if streams else target, n, mask_words(a, u, k, row, first))
        if streams:
            stream(target, buffer, size * n)

    return write_row


@cache
def reduce_columns(dtype: str) -> Any:
    element, _, read, _ = ELEMENTS[dtype]
    size = np.dtype(element).itemsize
    shifts = shifts_function(dtype)

    @simd
    def add_four(x0, x1, x2, x3, shift, s, q, n):
        for i in range(n):
            d0, d1 = f8(read(x0[i])) - shift[i], f8(read(x1[i])) - shift[i]
            d2, d3 = f8(read(x2[i])) - shift[i], f8(read(x3[i])) - shift[i]
            s[i] += (d0 + d1) + (d2 + d3)
            q[i] += (d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3)

    @simd
    def add_one(x, shift, s, q, n):
        for i in range(n):
            d = f8(read(x[i])) - shift[i]
            s[i] += d
            q[i] += d * d

    @inner
    def reduce(a, u, k, partials, scratch, new):
        first_row, last_row, left, n = piece(a, u, k)
        width, stride = a[WIDTH], size * a[ROW_STRIDE]
        shift = carray(pointer(scratch), (n,), np.float64)
        if new:
            values = carray(pointer(scratch + 8 * width), (n,), np.float64)
            shifts(a, left // a[SPATIAL], own_columns(a, n) // a[SPATIAL], values)
            spread(a, values, n, shift)
        out = partials + 16 * width * k
        s, q = carray(pointer(out), (n,), np.float64), carray(pointer(out + 8 * width), (n,), np.float64)
        s[:], q[:] = 0.0, 0.0
        row, base = first_row, a[X] + size * left + stride * first_row
        # the last row of all may be shorter
        while row + 4 <= last_row and row + 4 < a[ROWS]:
            x0, x1 = carray(pointer(base), (n,), element), carray(pointer(base + stride), (n,), element)
            x2, x3 = (
                carray(pointer(base + 2 * stride), (n,), element),
                carray(pointer(base + 3 * stride), (n,), element),
            )
            add_four(x0, x1, x2, x3, shift, s, q, n)
            row += 4
            base += 4 * stride
        while row < last_row:
            present = row_columns(a, row, left, n)
            add_one(carray(pointer(base), (present,), element), shift, s, q, present)
            row += 1
            base += stride

    return reduce


@cache
def apply_columns(dtype: str, activation: str | None, residual: bool, mask: bool) -> Any:
    element, *_ = ELEMENTS[dtype]
    size = np.dtype(element).itemsize
    expand = affine_expander(dtype)
    write_row = row_writer(dtype, activation, residual, mask, per_column=True)

    @inner
    def apply(a, u, k, scratch, new):
        first_row, last_row, left, n = piece(a, u, k)
        mu, scale, shift = expand(a, left, n, scratch, new)
        buffer = scratch + 7 * 8 * a[WIDTH]
        for row in range(first_row, last_row):
            offset = size * (row * a[ROW_STRIDE] + left)
            write_row(a, u, k, row, 0, offset, row_columns(a, row, left, n), mu, scale, shift, buffer)

    return apply


@cache
def affine_expander(dtype: str) -> Any:
    """``expand(a, left, n, scratch, new)``: arrays of mu, scale and shift, one number per column."""
    real = ELEMENTS[dtype][1]
    affine = affine_function(dtype)

    @inner
    def expand(a, left, n, scratch, new):
        width = 8 * a[WIDTH]
        mu = carray(pointer(scratch + width), (n,), real)
        scale = carray(pointer(scratch + 2 * width), (n,), real)
        shift = carray(pointer(scratch + 3 * width), (n,), real)
        if new:
            first, channels = left // a[SPATIAL], own_columns(a, n) // a[SPATIAL]
            if a[SPATIAL] == 1:
                affine(a, first, channels, mu, scale, shift)
                repeat(mu, channels, n)
                repeat(scale, channels, n)
                repeat(shift, channels, n)
            else:
                values = carray(pointer(scratch + 4 * width), (n,), real)
                more = carray(pointer(scratch + 5 * width), (n,), real)
                last = carray(pointer(scratch + 6 * width), (n,), real)
                affine(a, first, channels, values, more, last)
                spread(a, values, n, mu)
                spread(a, more, n, scale)
                spread(a, last, n, shift)
        return mu, scale, shift

    return expand
