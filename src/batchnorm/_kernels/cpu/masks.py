"""One bit per element: whether the gradient passes the activation. 32 elements a word, each piece of a row from a
word of its own."""

from collections.abc import Callable
from typing import Any

import numpy as np

from batchnorm._kernels.cpu.activations import piecewise_functions
from batchnorm._kernels.cpu.arguments import MASK, SEGMENT, SEGMENTS, UNITS
from batchnorm._kernels.cpu.elements import ELEMENTS, carray, inner, pointer

BIT = np.uint32(1)


@inner
def mask_words(a, u, k, row):
    """The words of the part of ``row`` that belongs to chunk k of strip u."""
    segments = a[SEGMENTS]
    count = (a[SEGMENT] + 31) // 32
    first = ((row * a[UNITS] + u) * segments + k % segments) * count
    return carray(pointer(a[MASK] + 4 * first), (count,), np.uint32)


def packer(activation: str | None, dtype: str) -> Callable[..., Any]:
    """``pack(outputs, n, words)``: one bit per output."""
    _, real, read, _ = ELEMENTS[dtype]
    passes, _ = piecewise_functions(activation, real)

    @inner
    def pack(y, n, words):
        whole = n // 32
        for w in range(whole):
            word = np.uint32(0)
            for k in range(32):
                bit = BIT << np.uint32(k) if passes(read(y[32 * w + k])) else np.uint32(0)
                word |= bit
            words[w] = word
        if n > 32 * whole:
            word = np.uint32(0)
            for k in range(n - 32 * whole):
                if passes(read(y[32 * whole + k])):
                    word |= BIT << np.uint32(k)
            words[whole] = word

    return pack


def masker(activation: str | None, dtype: str) -> Callable[..., Any]:
    """``mask(grad, n, words, out)``: the gradient where the bit is set, ``blocked(grad)`` elsewhere."""
    _, real, read, write = ELEMENTS[dtype]
    _, blocked = piecewise_functions(activation, real)

    @inner
    def mask(grad, n, words, out):
        whole = n // 32
        for w in range(whole):
            word = words[w]
            for k in range(32):
                g = read(grad[32 * w + k])
                out[32 * w + k] = write(g if (word >> np.uint32(k)) & BIT else blocked(g))
        for i in range(32 * whole, n):
            g = read(grad[i])
            out[i] = write(g if (words[whole] >> np.uint32(i - 32 * whole)) & BIT else blocked(g))

    return mask
