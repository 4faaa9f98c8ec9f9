"""Per channel: from sums to statistics, and from statistics to the three numbers that normalize."""

import math
from typing import Any

import numpy as np

from batchnorm._kernels.cpu.arguments import (
    BIAS,
    CHANNELS,
    CHUNKS,
    COLUMNS,
    COUNT,
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
from batchnorm._kernels.cpu.elements import ELEMENTS, carray, inner, number, pointer, simd

f8 = np.float64


@inner
def channels_of(a, u):
    """First and last channel of strip u."""
    left = u * a[WIDTH]
    return left // a[SPATIAL], min(left + a[WIDTH], a[COLUMNS]) // (a[SPATIAL] * a[TILES])


@inner
def total_of_strip(a, j, partials):
    """The two sums of a strip that is one channel."""
    chunks = a[CHUNKS]
    sums = carray(pointer(partials), (2 * chunks,), np.float64)
    first, second = 0.0, 0.0
    for k in range(chunks):
        first += sums[2 * k]
        second += sums[2 * k + 1]
    return first, second


@inner
def total_of_columns(a, j, partials):
    """The two sums of channel j of a strip with a sum per column."""
    width, spatial, chunks = a[WIDTH], a[SPATIAL], a[CHUNKS]
    first, second = 0.0, 0.0
    for k in range(chunks):
        sums = carray(pointer(partials + k * 16 * width), (2 * width,), np.float64)
        for tile in range(0, width, width // a[TILES]):
            for i in range(tile + j * spatial, tile + (j + 1) * spatial):
                first += sums[i]
                second += sums[width + i]
    return first, second


def shift_function(dtype: str) -> Any:
    """``shift(a, c)``: a value of channel c. Sums of what is left after it is subtracted keep their digits.

    Source:
        Chan, Golub, LeVeque: Algorithms for computing the sample variance, 1983 (shifted data).
    """
    element, _, read, _ = ELEMENTS[dtype]

    @inner
    def shift(a, c):
        spatial = a[SPATIAL]
        value = f8(read(carray(pointer(a[X]), (a[CHANNELS] * spatial,), element)[c * spatial]))
        # with inf as shift, every difference would be NaN
        return value if abs(value) < np.inf else 0.0

    return shift


def affine_function(real: type) -> Any:
    """``affine(a, c)``: (mu, scale, shift) of channel c, with z = (x - mu) * scale + shift.

    ``x - mu`` is exact where x is near mu; what mu lost when it was rounded is part of the shift.
    """

    @inner
    def affine(a, c):
        channels = a[CHANNELS]
        saved = carray(pointer(a[SAVED]), (2 * channels,), np.float64)
        mean, scale, shift = saved[c], saved[channels + c], 0.0
        if a[WEIGHT] != 0:
            scale *= f8(carray(pointer(a[WEIGHT]), (channels,), real)[c])
        if a[BIAS] != 0:
            shift = f8(carray(pointer(a[BIAS]), (channels,), real)[c])
        mu = real(mean)
        rest = mean - f8(mu)
        # inf - inf
        if rest == rest:
            shift -= rest * scale
        return mu, real(scale), real(shift)

    return affine


def finish_function(dtype: str, partial_columns: bool) -> Any:
    """``finish(a, u, partials)``: the statistics of the channels of strip u; the running statistics follow them."""
    real = ELEMENTS[dtype][1]
    shift = shift_function(dtype)
    total = total_of_columns if partial_columns else total_of_strip

    @inner
    def finish(a, u, partials):
        given = a[GIVEN]
        if given == SAVED_BEFORE:
            return
        channels, eps, momentum = a[CHANNELS], number(a[EPS]), number(a[MOMENTUM])
        count = f8(a[COUNT])
        saved = carray(pointer(a[SAVED]), (2 * channels,), np.float64)
        running_mean = carray(pointer(a[RUNNING_MEAN]), (channels,), real)
        running_var = carray(pointer(a[RUNNING_VAR]), (channels,), real)
        means, variances = (carray(pointer(a[MEAN]), (channels,), real), carray(pointer(a[VAR]), (channels,), real))
        first, last = channels_of(a, u)
        for c in range(first, last):
            if given == RUNNING:
                mean, var = f8(running_mean[c]), f8(running_var[c])
            else:
                s, q = total(a, c - first, partials)
                mean = s / count
                var = q / count - mean * mean
                # rounding; NaN stays
                var = 0.0 if var < 0.0 else var
                mean += shift(a, c)
                if a[RUNNING_MEAN] != 0:
                    unbiased = var * (count / (count - 1.0))
                    running_mean[c] = real((1.0 - momentum) * f8(running_mean[c]) + momentum * mean)
                    running_var[c] = real((1.0 - momentum) * f8(running_var[c]) + momentum * unbiased)
                if a[MEAN] != 0:
                    means[c], variances[c] = real(mean), real(var)
            saved[c] = mean
            saved[channels + c] = 1.0 / math.sqrt(var + eps)

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
def repeat(out, own, n):
    """What stands in the first columns stands in all tiles."""
    filled = own
    while filled < n:
        more = min(filled, n - filled)
        copy(out, out[filled:], more)
        filled += more
