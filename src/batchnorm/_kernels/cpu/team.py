"""torch's own threads, and each thread's private memory.

A team of threads is started by the OpenMP library that torch itself is linked with, so that one pool serves both: a
second pool would compete with it for the cores between two layers. Where that library is not found, in a forked child
(whose pool did not survive) and for small inputs, a kernel runs in the calling thread.
"""

import ctypes
import os
import threading
from pathlib import Path
from struct import Struct
from typing import Any, NamedTuple

import numpy as np
import torch

ALIGNMENT = 64


class Pool(NamedTuple):
    """``start(function, record, threads, flags)``, and the addresses a kernel needs inside: number, size, barrier."""

    start: Any
    addresses: bytes


def torch_pool() -> Pool | None:
    """The OpenMP library of torch, by the interface of GNU OpenMP, which LLVM's and Intel's libraries offer too."""
    try:
        library = ctypes.CDLL(str(next((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"))))
        start = library.GOMP_parallel
        start.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint, ctypes.c_uint)
        start.restype = None
        functions = (library.omp_get_thread_num, library.omp_get_num_threads, library.GOMP_barrier)
    except (OSError, AttributeError, StopIteration):
        return None
    return Pool(start, Struct("3q").pack(*(ctypes.cast(f, ctypes.c_void_p).value or 0 for f in functions)))


POOL = torch_pool()
SERIAL = bytes(3 * 8)


class Forked:
    """Whether this process is the child of one that may have used the pool."""

    value = False


def note_fork() -> None:
    Forked.value = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=note_fork)


def team_size() -> int:
    """How many threads a large input gets here and now."""
    return 1 if POOL is None or Forked.value else torch.get_num_threads()


class Scratch(threading.local):
    """Memory that a Python thread reuses from call to call."""

    def __init__(self) -> None:
        self.grow(1 << 16)

    def grow(self, size: int) -> None:
        self.memory = np.empty(size + ALIGNMENT, np.uint8)
        self.size = size
        self.address = -(-self.memory.ctypes.data // ALIGNMENT) * ALIGNMENT

    def at_least(self, size: int) -> int:
        """The address of ``size`` bytes."""
        if size > self.size:
            self.grow(size)
        return self.address


scratch = Scratch()
