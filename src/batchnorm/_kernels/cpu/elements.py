"""How elements are read and written: addresses, bits, and the storage type of bfloat16."""

from functools import cache
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.compiler import Compiler
from numba.extending import intrinsic

carray: Any = numba.carray  # pyright: ignore[reportPrivateImportUsage]


class WithoutAliases(Compiler):
    """Compile a function for arrays that share no memory: without checks at run time there is no limit of arrays."""

    def __init__(self, typing: Any, target: Any, library: Any, args: Any, result: Any, flags: Any, locals: Any) -> None:
        flags = flags.copy()
        flags.noalias = True
        super().__init__(typing, target, library, args, result, flags, locals)


# What may be reordered: sums, for SIMD. NaN and inf keep their meaning, so the flags "nnan" and "ninf" are not here.
REORDER = {"reassoc", "contract", "nsz", "arcp"}


# A kernel is one piece of code: what it calls is part of it. Otherwise two kernels that were compiled in different
# processes, and define helpers under one name, would meet in the linker.
INSIDE = {"forceinline": True, "no_cpython_wrapper": True, "no_cfunc_wrapper": True, "error_model": "numpy"}


def inner(function: Any) -> Any:
    """Compile a part of a kernel, as it is written."""
    return njit(**INSIDE)(function)


def fused(function: Any) -> Any:
    """Compile a formula: multiplication and addition may be one operation."""
    return njit(fastmath={"contract"}, **INSIDE)(function)


def simd(function: Any) -> Any:
    """Compile an inner loop over arrays that share no memory, element by element."""
    return njit(fastmath={"contract"}, pipeline_class=WithoutAliases, **INSIDE)(function)


def summing(function: Any) -> Any:
    """Compile an inner loop that ends in a number: the order of its sums is free. Only sums belong into it."""
    return njit(fastmath=REORDER, pipeline_class=WithoutAliases, **INSIDE)(function)


def primitive(generate: Any) -> Any:
    """A function that is a few LLVM instructions."""
    return intrinsic(generate)


@primitive
def pointer(_context: Any, address: Any) -> Any:
    """A memory address as ``numba.carray`` takes it."""
    return types.voidptr(types.int64), lambda _c, builder, _s, args: builder.inttoptr(args[0], cgutils.voidptr_t)


@primitive
def bits_of(_context: Any, value: Any) -> Any:
    """The bits of a float32 as uint32."""

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(types.uint32))

    return types.uint32(types.float32), generate


@primitive
def float_of(_context: Any, bits: Any) -> Any:
    """The float32 with the given bits."""

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(types.float32))

    return types.float32(types.uint32), generate


@primitive
def number(_context: Any, slot: Any) -> Any:
    """A slot of the record as the float64 that was packed into it."""

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(types.float64))

    return types.float64(types.int64), generate


@primitive
def prefetch(_context: Any, address: Any) -> Any:
    """Ask for the cache line at an address; harmless where nothing is."""

    def generate(_c: Any, builder: Any, _s: Any, args: Any) -> Any:
        i32, bytes_pointer = ir.IntType(32), ir.IntType(8).as_pointer()
        signature = ir.FunctionType(ir.VoidType(), [bytes_pointer, i32, i32, i32])
        function = cgutils.get_or_insert_function(builder.module, signature, "llvm.prefetch.p0i8")
        # read, into the second-level cache, data
        builder.call(function, [builder.inttoptr(args[0], bytes_pointer), i32(0), i32(2), i32(1)])
        return _c.get_dummy_value()

    return types.void(types.int64), generate


LINE = 64


@inner
def look_ahead(address, size):
    """Fetch what the next row holds while this one is worked on: the processor foresees nothing across their gap."""
    for line in range(address, address + size, LINE):
        prefetch(line)


@primitive
def store_line(_context: Any, target: Any, source: Any) -> Any:
    """Copy 64 bytes to a line of memory, past the caches."""

    def generate(context: Any, builder: Any, _s: Any, args: Any) -> Any:
        line = ir.VectorType(ir.IntType(32), 16).as_pointer()
        value = builder.load(builder.inttoptr(args[1], line), align=4)
        store = builder.store(value, builder.inttoptr(args[0], line), align=64)
        store.set_metadata("nontemporal", builder.module.add_metadata([ir.IntType(32)(1)]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@inner
def stream(target, source, size):
    """Copy whole cache lines past the caches: memory need not be read before it is overwritten."""
    for line in range(0, size, LINE):
        store_line(target + line, source + line)


@cache
def picker(per_column: bool) -> Any:
    """``at(value, i)``: the number for column i, or the one number for all columns."""
    if per_column:

        @inner
        def at(value, i):
            return value[i]

    else:

        @inner
        def at(value, i):
            return value

    return at


@fused
def minus(a, b):
    """A difference that no sum around it may take apart."""
    return a - b


@fused
def times(a, b):
    """As :func:`minus`."""
    return a * b


@inner
def same(value):
    return value


@inner
def from_bfloat16(stored):
    return float_of(np.uint32(stored) << np.uint32(16))


@inner
def to_bfloat16(value):
    """Round to nearest, ties to even."""
    bits = bits_of(value)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.uint16(0x7FC0) if value != value else np.uint16(rounded)


# dtype name: (how an element lies in memory, what it is computed in, read, write)
ELEMENTS = {
    "float32": (np.float32, np.float32, same, same),
    "float64": (np.float64, np.float64, same, same),
    "bfloat16": (np.uint16, np.float32, from_bfloat16, to_bfloat16),
    "bfloat16_throughout": (np.uint16, np.float32, from_bfloat16, to_bfloat16),
}
# the same of weight, bias, their gradients and the running statistics: (how it lies in memory, read, write)
PER_CHANNEL = {
    "float32": (np.float32, same, same),
    "float64": (np.float64, same, same),
    "bfloat16": (np.float32, same, same),
    "bfloat16_throughout": (np.uint16, from_bfloat16, to_bfloat16),
}
