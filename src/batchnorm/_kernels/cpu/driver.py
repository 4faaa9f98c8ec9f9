"""The order of the work, the same for forward and backward and for every form: reduce, finish, apply."""

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from batchnorm._kernels.cpu.arguments import (
    APPLY,
    BARRIER,
    BLOCKED,
    CHUNK_ROWS,
    CHUNKS,
    COLUMNS,
    NUM_THREADS,
    PARTIALS,
    REDUCE,
    ROW_STRIDE,
    ROWS,
    SCRATCH,
    SCRATCH_BYTES,
    SEGMENT,
    SEGMENTS,
    SLOTS,
    STREAM,
    THREAD_NUM,
    TOTAL,
    UNITS,
    WIDTH,
)
from batchnorm._kernels.cpu.elements import LINE, carray, inner, primitive


@primitive
def call_int(_context: Any, address: Any) -> Any:
    """Call ``int f(void)`` at an address."""

    def generate(_c: Any, builder: Any, _s: Any, args: Any) -> Any:
        function = builder.inttoptr(args[0], ir.FunctionType(ir.IntType(32), []).as_pointer())
        return builder.sext(builder.call(function, []), ir.IntType(64))

    return types.int64(types.int64), generate


@primitive
def call_void(_context: Any, address: Any) -> Any:
    """Call ``void f(void)`` at an address."""

    def generate(context: Any, builder: Any, _s: Any, args: Any) -> Any:
        builder.call(builder.inttoptr(args[0], ir.FunctionType(ir.VoidType(), []).as_pointer()), [])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@inner
def piece(a, u, k):
    """Rows and columns of chunk k of strip u: (first row, last row, first column in a row, number of columns)."""
    segments = a[SEGMENTS]
    group, part = k // segments, k % segments
    first_row = group * a[CHUNK_ROWS]
    last_row = min(first_row + a[CHUNK_ROWS], a[ROWS])
    left = u * a[WIDTH]
    right = min(left + a[WIDTH], a[COLUMNS])
    left += part * a[SEGMENT]
    return first_row, last_row, left, min(a[SEGMENT], right - left)


@inner
def row_columns(a, row, left, n):
    """How many of n columns from ``left`` on a row has: the last of joined rows may be shorter."""
    return min(n, a[TOTAL] - row * a[ROW_STRIDE] - left)


@inner
def streamed(a, target, size):
    """Whether a piece is written past the caches: only whole cache lines can be."""
    return a[STREAM] != 0 and (target | size) % LINE == 0


def kernel(
    reduce: Callable[..., Any], finish: Callable[..., Any], apply: Callable[..., Any], partial_columns: bool
) -> Callable[[int], None]:
    """The function that a thread team runs: every thread takes an equal share of the strips or of their chunks.

    Args:
        reduce: ``(a, u, k, partials, scratch, new)`` sums chunk k of strip u; ``new``: the thread comes to this strip.
        finish: ``(a, u, partials)`` turns the sums of strip u into per-channel numbers.
        apply: ``(a, u, k, scratch, new)`` writes chunk k of strip u.
        partial_columns: one partial sum per column instead of one per strip.
    """

    @inner
    def strip_and_chunk(task, units, chunks):
        # strips of columns lie side by side in memory, chunk by chunk; strips that are channels one after the other
        if partial_columns:
            return task % units, task // units
        return task // chunks, task % chunks

    def run(record):
        a = carray(record, (SLOTS,), np.int64)
        thread, threads = np.int64(0), np.int64(1)
        if a[NUM_THREADS] != 0:
            thread, threads = call_int(a[THREAD_NUM]), call_int(a[NUM_THREADS])
        units, chunks = a[UNITS], a[CHUNKS]
        scratch = a[SCRATCH] + thread * a[SCRATCH_BYTES]
        sums_bytes = 16 * chunks * (a[WIDTH] if partial_columns else 1)
        first_unit, last_unit = units * thread // threads, units * (thread + 1) // threads
        if a[BLOCKED] == 0:
            # the sums of a strip lie at the end of the private memory
            partials = scratch + a[SCRATCH_BYTES] - sums_bytes
            for u in range(first_unit, last_unit):
                if a[REDUCE] != 0:
                    for k in range(chunks):
                        reduce(a, u, k, partials, scratch, k == 0)
                finish(a, u, partials)
                if a[APPLY] != 0:
                    for k in range(chunks - 1, -1, -1):
                        apply(a, u, k, scratch, k == chunks - 1)
            return
        tasks = units * chunks
        first_task, last_task = tasks * thread // threads, tasks * (thread + 1) // threads
        if a[REDUCE] != 0:
            before = np.int64(-1)
            for task in range(first_task, last_task):
                u, k = strip_and_chunk(task, units, chunks)
                reduce(a, u, k, a[PARTIALS] + u * sums_bytes, scratch, u != before)
                before = u
            if a[BARRIER] != 0:
                call_void(a[BARRIER])
        for u in range(first_unit, last_unit):
            finish(a, u, a[PARTIALS] + u * sums_bytes)
        if a[BARRIER] != 0:
            call_void(a[BARRIER])
        if a[APPLY] != 0:
            before = np.int64(-1)
            # backwards: what was read last is still in the cache
            for task in range(last_task - 1, first_task - 1, -1):
                u, k = strip_and_chunk(task, units, chunks)
                apply(a, u, k, scratch, u != before)
                before = u

    return run
