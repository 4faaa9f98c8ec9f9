"""Compile kernels at first use, and run them."""

import ctypes
import threading
from collections.abc import Callable
from functools import lru_cache
from struct import Struct
from typing import Any, NamedTuple

from numba.core import sigutils
from numba.core.ccallback import CFunc

from batchnorm._kernels.cpu.backward import backward, frozen
from batchnorm._kernels.cpu.cache import CompiledKernel
from batchnorm._kernels.cpu.forward import forward
from batchnorm._kernels.cpu.geometry import Geometry, cut
from batchnorm._kernels.cpu.team import POOL, SERIAL, Forked, scratch, team_size

# Below this many elements, waking threads costs more than they save.
SERIAL_ELEMENTS = 24576
# Elements of a strip of columns that the second-level cache holds.
CACHED_ELEMENTS = 1 << 18
# Strips are shared between threads where there are too few of them to give every thread the same work.
STRIPS_PER_THREAD = 4

FACTORIES: dict[str, Callable[..., Callable[[int], None]]] = {
    "forward": forward,
    "backward": backward,
    "frozen": frozen,
}


class Kernel(NamedTuple):
    """A compiled kernel: its address, and a function that calls it without the interpreter lock."""

    address: int
    call: Callable[[bytes], None]


class ForkedError(RuntimeError):
    """A kernel was not compiled before the fork; compilers and locks of the parent are not safe to use in the child."""

    only_here = True


KERNELS: dict[tuple[Any, ...], Kernel] = {}
COMPILING = threading.Lock()


def kernel(direction: str, form: str, dtype: str, activation: str | None, residual: bool, mask: bool) -> Kernel:
    """The kernel for one kind of call: compiled, or read from the cache, when it is first asked for."""
    key = (direction, form, dtype, activation, residual, mask)
    found = KERNELS.get(key)
    if found is not None:
        return found
    if Forked.value:
        raise ForkedError(f"in a forked process, and {'_'.join(map(str, key))} was not compiled before the fork")
    with COMPILING:
        if key not in KERNELS:
            KERNELS[key] = compiled(FACTORIES[direction](*key[1:]), "_".join(map(str, key)))
        return KERNELS[key]


def compiled(function: Callable[[int], None], name: str) -> Kernel:
    function.__name__ = function.__qualname__ = name
    signature = sigutils.normalize_signature("void(voidptr)")
    callback: Any = CFunc(function, signature, {}, {"nopython": True, "error_model": "numpy"})
    callback._cache = CompiledKernel(name)
    callback.compile()
    return Kernel(callback.address, ctypes.CFUNCTYPE(None, ctypes.c_char_p)(callback.address))


class Plan(NamedTuple):
    """What is known from the shape alone."""

    geometry: Geometry
    header: bytes
    values_per_channel: int
    parallel: bool
    side_by_side: bool  # strips of columns that are longer than a cache: rather all of them side by side
    serial_bytes: int  # private memory and sums of one thread


@lru_cache(maxsize=4096)
def plan(samples: int, channels: int, positions: int, channels_last: bool) -> Plan:
    """The plan for a tensor of ``samples`` x ``channels`` x ``positions``, none of them 0."""
    geometry = cut(samples, channels, positions, channels_last)
    count = samples * positions
    side_by_side = geometry.form == "columns" and geometry.rows * geometry.width > CACHED_ELEMENTS
    return Plan(
        geometry,
        Struct("15q").pack(*geometry[1:]),
        count,
        count * channels >= SERIAL_ELEMENTS,
        side_by_side,
        geometry.scratch_bytes + 16 * geometry.channels,
    )


RUN = Struct("4q").pack


def run(kernel: Kernel, plan: Plan, fields: bytes, sums: int = 0) -> None:
    """Run a kernel on a record whose last part is ``fields``, from REDUCE on.

    ``sums`` is the address of sum_dy and sum_dy_xmu for callers that give them or want to have them.
    """
    geometry, header, _, parallel, _, serial_bytes = plan
    if not parallel:
        memory = scratch.at_least(serial_bytes)
        private = memory + geometry.scratch_bytes
        kernel.call(header + SERIAL + RUN(0, memory, private, sums or private) + fields)
        return
    threads = team_size()
    shares = plan.side_by_side or (geometry.units < STRIPS_PER_THREAD * threads and geometry.units % threads != 0)
    private = threads * geometry.scratch_bytes
    shared = geometry.partial_bytes if shares else 0
    memory = scratch.at_least(private + shared + 16 * geometry.channels)
    numbers = RUN(shares, memory, memory + private, sums or memory + private + shared)
    if threads == 1 or POOL is None:
        kernel.call(header + SERIAL + numbers + fields)
    else:
        POOL.start(kernel.address, header + POOL.addresses + numbers + fields, threads, 0)
