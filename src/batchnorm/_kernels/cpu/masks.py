"""One bit per element: whether the gradient passes the activation. 32 elements a word, each piece of a row from a
word of its own."""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from batchnorm._kernels.cpu.activations import piecewise_functions
from batchnorm._kernels.cpu.arguments import MASK, SEGMENT, SEGMENTS, UNITS
from batchnorm._kernels.cpu.elements import ELEMENTS, carray, inner, pointer, primitive

BIT = np.uint32(1)
STORED = {np.float32: ir.FloatType(), np.float64: ir.DoubleType(), np.uint16: ir.IntType(16)}


@inner
def mask_words(a, u, k, row, first):
    """The words of the part of ``row`` that belongs to chunk k of strip u, from its column ``first`` on."""
    segments = a[SEGMENTS]
    count = (a[SEGMENT] + 31) // 32
    word = ((row * a[UNITS] + u) * segments + k % segments) * count + first // 32
    return carray(pointer(a[MASK] + 4 * word), (count,), np.uint32)


@cache
def packer(activation: str | None, dtype: str) -> Callable[..., Any]:
    """``pack(outputs, n, words)``: one bit per output."""
    element, real, read, _ = ELEMENTS[dtype]
    passes, _ = piecewise_functions(activation, real)
    vector = ir.VectorType(STORED[element], 32)
    word_type = ir.IntType(32)

    @primitive
    def passing(_context: Any, address: Any) -> Any:
        """The word of the 32 outputs at an address."""

        def generate(_c: Any, builder: Any, _s: Any, args: Any) -> Any:
            y = builder.load(builder.inttoptr(args[0], vector.as_pointer()), align=2)
            if element is np.uint16:
                # floats of one sign have the order of their bits; NaN, which passes, lies above inf
                bits = builder.icmp_signed(">", y, vector([0] * 32))
                if activation == "relu6":
                    below = builder.icmp_signed("<", y, vector([0x40C0] * 32))
                    is_nan = builder.icmp_signed(">", y, vector([0x7F80] * 32))
                    bits = builder.and_(bits, builder.or_(below, is_nan))
            else:
                # unordered: true for NaN
                compare = builder.fcmp_ordered if activation == "leaky_relu" else builder.fcmp_unordered
                bits = compare(">", y, vector([0.0] * 32))
                if activation == "relu6":
                    bits = builder.and_(bits, compare("<", y, vector([6.0] * 32)))
            return builder.bitcast(bits, word_type)

        return types.uint32(types.int64), generate

    size = np.dtype(element).itemsize

    @inner
    def pack(address, n, words):
        whole = n // 32
        for w in range(whole):
            words[w] = passing(address + 32 * size * w)
        if n > 32 * whole:
            y = carray(pointer(address), (n,), element)
            word = np.uint32(0)
            for k in range(n - 32 * whole):
                if passes(read(y[32 * whole + k])):
                    word |= BIT << np.uint32(k)
            words[whole] = word

    return pack


@cache
def masker(activation: str | None, dtype: str) -> Callable[..., Any]:
    """``mask(grad, n, words, out)``: the gradient where the bit is set, ``blocked(grad)`` elsewhere. By address."""
    element, real, read, write = ELEMENTS[dtype]
    _, blocked = piecewise_functions(activation, real)
    vector = ir.VectorType(STORED[element], 32)
    size = np.dtype(element).itemsize

    @primitive
    def select(_context: Any, source: Any, word: Any, target: Any) -> Any:
        """32 gradients, or 0 where the bit is not set."""

        def generate(context: Any, builder: Any, _s: Any, args: Any) -> Any:
            grad = builder.load(builder.inttoptr(args[0], vector.as_pointer()), align=2)
            bits = builder.bitcast(args[1], ir.VectorType(ir.IntType(1), 32))
            chosen = builder.select(bits, grad, ir.Constant(vector, None))
            builder.store(chosen, builder.inttoptr(args[2], vector.as_pointer()), align=2)
            return context.get_dummy_value()

        return types.void(types.int64, types.uint32, types.int64), generate

    stops = activation != "leaky_relu"

    @inner
    def mask(source, n, words, target):
        whole = n // 32 if stops else 0
        for w in range(whole):
            select(source + 32 * size * w, words[w], target + 32 * size * w)
        grad, out = carray(pointer(source), (n,), element), carray(pointer(target), (n,), element)
        for i in range(32 * whole, n):
            g = read(grad[i])
            out[i] = write(g if (words[i // 32] >> np.uint32(i % 32)) & BIT else blocked(g))

    return mask
