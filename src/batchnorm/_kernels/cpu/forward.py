"""Forward: sums of the batch, then ``act((x - mean) * invstd * weight + bias + residual)``, chunk by chunk."""

from collections.abc import Callable
from typing import Any

import numpy as np

from batchnorm._kernels.cpu.activations import activation_functions
from batchnorm._kernels.cpu.arguments import RESIDUAL, ROW_STRIDE, SPATIAL, WIDTH, X, Y
from batchnorm._kernels.cpu.driver import kernel, piece
from batchnorm._kernels.cpu.elements import ELEMENTS, carray, inner, picker, pointer, simd
from batchnorm._kernels.cpu.masks import mask_words, packer
from batchnorm._kernels.cpu.statistics import affine_function, finish_function, shift_function

f8 = np.float64


def forward(form: str, dtype: str, activation: str | None, residual: bool, mask: bool) -> Callable[[int], None]:
    """The kernel for one form, dtype and epilogue; ``mask`` notes where the gradient passes the activation."""
    columns = form == "columns"
    reduce = (reduce_columns if columns else reduce_rows)(dtype)
    apply = (apply_columns if columns else apply_rows)(dtype, activation, residual, mask)
    return kernel(reduce, finish_function(dtype, columns), apply, columns)


def reduce_rows(dtype: str) -> Any:
    element, _, read, _ = ELEMENTS[dtype]
    size = np.dtype(element).itemsize
    shift_of = shift_function(dtype)

    @simd
    def sums(x, n, shift):
        s, q = 0.0, 0.0
        for i in range(n):
            d = f8(read(x[i])) - shift
            s += d
            q += d * d
        return s, q

    @inner
    def reduce(a, u, k, partials, scratch):
        shift = shift_of(a, u)
        first_row, last_row, left, n = piece(a, u, k)
        s, q = 0.0, 0.0
        for row in range(first_row, last_row):
            x = carray(pointer(a[X] + size * (row * a[ROW_STRIDE] + left)), (n,), element)
            row_s, row_q = sums(x, n, shift)
            s += row_s
            q += row_q
        out = carray(pointer(partials + 16 * k), (2,), np.float64)
        out[0], out[1] = s, q

    return reduce


def apply_rows(dtype: str, activation: str | None, residual: bool, mask: bool) -> Any:
    element, real, _, _ = ELEMENTS[dtype]
    size = np.dtype(element).itemsize
    affine = affine_function(real)
    write_row = row_writer(dtype, activation, residual, mask, per_column=False)

    @inner
    def apply(a, u, k, scratch):
        mu, scale, shift = affine(a, u)
        first_row, last_row, left, n = piece(a, u, k)
        for row in range(first_row, last_row):
            write_row(a, u, k, row, size * (row * a[ROW_STRIDE] + left), n, mu, scale, shift)

    return apply


def row_writer(dtype: str, activation: str | None, residual: bool, mask: bool, per_column: bool) -> Any:
    """Write one row of a chunk; mu, scale and shift are arrays with ``per_column``, numbers otherwise."""
    element, real, read, write = ELEMENTS[dtype]
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
    def write_row(a, u, k, row, offset, n, mu, scale, shift):
        x = carray(pointer(a[X] + offset), (n,), element)
        y = carray(pointer(a[Y] + offset), (n,), element)
        z = carray(pointer(a[RESIDUAL] + offset), (n,), element)
        normalize(x, z, y, n, mu, scale, shift)
        if mask:
            pack(y, n, mask_words(a, u, k, row))

    return write_row


def reduce_columns(dtype: str) -> Any:
    element, _, read, _ = ELEMENTS[dtype]
    size = np.dtype(element).itemsize
    expand = expander(shift_function(dtype))

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
    def reduce(a, u, k, partials, scratch):
        first_row, last_row, left, n = piece(a, u, k)
        width, stride = a[WIDTH], size * a[ROW_STRIDE]
        shift = carray(pointer(scratch), (n,), np.float64)
        expand(a, left, n, shift)
        out = partials + 16 * width * k
        s, q = carray(pointer(out), (n,), np.float64), carray(pointer(out + 8 * width), (n,), np.float64)
        s[:], q[:] = 0.0, 0.0
        row, base = first_row, a[X] + size * left + stride * first_row
        while row + 4 <= last_row:
            x0, x1 = carray(pointer(base), (n,), element), carray(pointer(base + stride), (n,), element)
            x2, x3 = (
                carray(pointer(base + 2 * stride), (n,), element),
                carray(pointer(base + 3 * stride), (n,), element),
            )
            add_four(x0, x1, x2, x3, shift, s, q, n)
            row += 4
            base += 4 * stride
        while row < last_row:
            add_one(carray(pointer(base), (n,), element), shift, s, q, n)
            row += 1
            base += stride

    return reduce


def expander(value_of: Any) -> Any:
    """``expand(a, left, n, out)``: the number of every column's channel."""

    @inner
    def expand(a, left, n, out):
        spatial = a[SPATIAL]
        if spatial == 1:
            for i in range(n):
                out[i] = value_of(a, left + i)
            return
        for j in range(n // spatial):
            value = value_of(a, left // spatial + j)
            for i in range(j * spatial, (j + 1) * spatial):
                out[i] = value

    return expand


def apply_columns(dtype: str, activation: str | None, residual: bool, mask: bool) -> Any:
    element, real, _, _ = ELEMENTS[dtype]
    size = np.dtype(element).itemsize
    expand = affine_expander(real)
    write_row = row_writer(dtype, activation, residual, mask, per_column=True)

    @inner
    def apply(a, u, k, scratch):
        first_row, last_row, left, n = piece(a, u, k)
        mu, scale, shift = expand(a, left, n, scratch)
        for row in range(first_row, last_row):
            write_row(a, u, k, row, size * (row * a[ROW_STRIDE] + left), n, mu, scale, shift)

    return apply


def affine_expander(real: type) -> Any:
    """``expand(a, left, n, scratch)``: arrays of mu, scale and shift, one number per column."""
    affine = affine_function(real)

    @inner
    def expand(a, left, n, scratch):
        spatial, width = a[SPATIAL], 8 * a[WIDTH]
        mu = carray(pointer(scratch + width), (n,), real)
        scale = carray(pointer(scratch + 2 * width), (n,), real)
        shift = carray(pointer(scratch + 3 * width), (n,), real)
        for j in range(n // spatial):
            m, c, b = affine(a, left // spatial + j)
            for i in range(j * spatial, (j + 1) * spatial):
                mu[i], scale[i], shift[i] = m, c, b
        return mu, scale, shift

    return expand
