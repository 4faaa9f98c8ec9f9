"""Per channel: from sums to statistics, and from statistics to the three numbers that normalize."""

import math
from functools import cache
from typing import Any

import numpy as np

from batchnorm._kernels.cpu.arguments import (
    BIAS,
    CHANNELS,
    CHUNKS,
    COLUMNS,
    COUNT,
    COUNTER,
    EPS,
    GIVEN,
    MEAN,
    MOMENTUM,
    RUNNING,
    RUNNING_MEAN,
    RUNNING_VAR,
    SAVED,
    SAVED_BEFORE,
    SPATIAL,
    TILES,
    VAR,
    WEIGHT,
    WIDTH,
    X,
)
from batchnorm._kernels.cpu.elements import ELEMENTS, PER_CHANNEL, carray, inner, number, pointer, simd

f8 = np.float64


@inner
def channels_of(a, u):
    """First and last channel of strip u."""
    left = u * a[WIDTH]
    return left // a[SPATIAL], min(left + a[WIDTH], a[COLUMNS]) // (a[SPATIAL] * a[TILES])


@inner
def add_chunks(a, partials, columns):
    """Add the sums of all chunks of a strip to those of its first."""
    both = carray(pointer(partials), (2 * columns,), np.float64)
    for k in range(1, a[CHUNKS]):
        add(both, carray(pointer(partials + k * 16 * columns), (2 * columns,), np.float64), 2 * columns)


@simd
def add(total, more, n):
    for i in range(n):
        total[i] += more[i]


@inner
def sums_of_strip(a, partials):
    """The two sums of a strip that is one channel, as arrays of one number."""
    add_chunks(a, partials, 1)
    return carray(pointer(partials), (1,), np.float64), carray(pointer(partials + 8), (1,), np.float64)


@inner
def sums_of_columns(a, partials):
    """The two sums of every channel of a strip that has a sum per column."""
    width, spatial = a[WIDTH], a[SPATIAL]
    add_chunks(a, partials, width)
    first = carray(pointer(partials), (width,), np.float64)
    second = carray(pointer(partials + 8 * width), (width,), np.float64)
    own = width // a[TILES]
    for tile in range(own, width, own):
        add(first, first[tile:], own)
        add(second, second[tile:], own)
    if spatial > 1:
        for j in range(own // spatial):
            s, q = 0.0, 0.0
            for i in range(j * spatial, (j + 1) * spatial):
                s += first[i]
                q += second[i]
            first[j], second[j] = s, q
    return first, second


@cache
def shifts_function(dtype: str) -> Any:
    """``shifts(a, first, n, out)``: a value of each of n channels. Sums of what is left after it keep their digits.

    Source:
        Chan, Golub, LeVeque: Algorithms for computing the sample variance, 1983 (shifted data).
    """
    element, _, read, _ = ELEMENTS[dtype]

    @simd
    def first_values(x, spatial, n, out):
        for j in range(n):
            value = f8(read(x[j * spatial]))
            # with inf as shift, every difference would be NaN
            out[j] = value if abs(value) < np.inf else 0.0

    @inner
    def shifts(a, first, n, out):
        spatial = a[SPATIAL]
        x = carray(pointer(a[X]), (a[CHANNELS] * spatial,), element)[first * spatial :]
        if spatial == 1:
            first_values(x, 1, n, out)
        else:
            first_values(x, spatial, n, out)

    return shifts


@cache
def affine_function(dtype: str) -> Any:
    """``affine(a, first, n, mu, scale, shift)`` of n channels, with z = (x - mu) * scale + shift.

    ``x - mu`` is exact where x is near mu; what mu lost when it was rounded is part of the shift.
    """
    real = ELEMENTS[dtype][1]
    stored, read, _ = PER_CHANNEL[dtype]
    size = np.dtype(stored).itemsize

    @simd
    def combine(mean, invstd, weight, bias, has_weight, has_bias, n, mu, scale, shift):
        for j in range(n):
            slope = invstd[j] * (f8(read(weight[j])) if has_weight else 1.0)
            center = real(mean[j])
            rest = mean[j] - f8(center)
            # inf - inf
            rest = rest if rest == rest else 0.0
            mu[j] = center
            scale[j] = real(slope)
            shift[j] = real((f8(read(bias[j])) if has_bias else 0.0) - rest * slope)

    @inner
    def affine(a, first, n, mu, scale, shift):
        mean, invstd = saved_of(a, first, n)
        # where there is none, it is not read
        weight = carray(pointer((a[WEIGHT] if a[WEIGHT] != 0 else a[SAVED]) + first * size), (n,), stored)
        bias = carray(pointer((a[BIAS] if a[BIAS] != 0 else a[SAVED]) + first * size), (n,), stored)
        combine(mean, invstd, weight, bias, a[WEIGHT] != 0, a[BIAS] != 0, n, mu, scale, shift)

    return affine


@inner
def saved_of(a, first, n):
    """Mean and 1 / sqrt(var + eps) of n channels."""
    start = a[SAVED] + 8 * first
    mean = carray(pointer(start), (n,), np.float64)
    return mean, carray(pointer(start + 8 * a[CHANNELS]), (n,), np.float64)


@cache
def finish_function(dtype: str, partial_columns: bool) -> Any:
    """``finish(a, u, partials)``: the statistics of the channels of strip u; the running statistics follow them."""
    real = ELEMENTS[dtype][1]
    size = np.dtype(real).itemsize
    stored, read, write = PER_CHANNEL[dtype]
    stored_size = np.dtype(stored).itemsize
    shifts = shifts_function(dtype)
    sums = sums_of_columns if partial_columns else sums_of_strip

    @simd
    def moments(s, q, count, n, means, variances):
        """In: the shifts in ``means``. Out: mean and variance."""
        for j in range(n):
            mean = s[j] / count
            var = q[j] / count - mean * mean
            # rounding; NaN stays
            variances[j] = 0.0 if var < 0.0 else var
            means[j] += mean

    @simd
    def widen(source, n, target):
        for j in range(n):
            target[j] = f8(read(source[j]))

    @simd
    def narrow(source, n, target):
        for j in range(n):
            target[j] = real(source[j])

    @simd
    def move(running, new, n, momentum, factor):
        for j in range(n):
            running[j] = write(real((1.0 - momentum) * f8(read(running[j])) + momentum * (new[j] * factor)))

    @simd
    def invert(variances, n, eps):
        for j in range(n):
            variances[j] = 1.0 / math.sqrt(variances[j] + eps)

    @inner
    def finish(a, u, partials):
        given = a[GIVEN]
        if given == SAVED_BEFORE:
            return
        first, last = channels_of(a, u)
        n = last - first
        # the place of 1 / sqrt(var + eps) holds the variance at first
        means, variances = saved_of(a, first, n)
        running_mean = carray(pointer(a[RUNNING_MEAN] + stored_size * first), (n,), stored)
        running_var = carray(pointer(a[RUNNING_VAR] + stored_size * first), (n,), stored)
        if given == RUNNING:
            widen(running_mean, n, means)
            widen(running_var, n, variances)
        else:
            count = f8(a[COUNT])
            s, q = sums(a, partials)
            shifts(a, first, n, means)
            moments(s, q, count, n, means, variances)
            if a[RUNNING_MEAN] != 0:
                momentum = number(a[MOMENTUM])
                move(running_mean, means, n, momentum, 1.0)
                move(running_var, variances, n, momentum, count / (count - 1.0))
            if a[MEAN] != 0:
                narrow(means, n, carray(pointer(a[MEAN] + size * first), (n,), real))
                narrow(variances, n, carray(pointer(a[VAR] + size * first), (n,), real))
            if a[COUNTER] != 0 and u == 0:
                carray(pointer(a[COUNTER]), (1,), np.int64)[0] += 1
        invert(variances, n, number(a[EPS]))

    return finish


@inner
def own_columns(a, n):
    """The first columns of a strip's n: those that show every channel of the strip once."""
    return n // a[TILES]


@simd
def copy(source, target, n):
    for i in range(n):
        target[i] = source[i]


@inner
def spread(a, values, n, out):
    """The number of every column's channel, from those of the strip's channels."""
    own, spatial = own_columns(a, n), a[SPATIAL]
    if spatial == 1:
        copy(values, out, own)
    else:
        for j in range(own // spatial):
            fill(out[j * spatial :], values[j], spatial)
    repeat(out, own, n)


@simd
def fill(out, value, n):
    for i in range(n):
        out[i] = value


@inner
def repeat(out, own, n):
    """What stands in the first columns stands in all tiles."""
    filled = own
    while filled < n:
        more = min(filled, n - filled)
        copy(out, out[filled:], more)
        filled += more
