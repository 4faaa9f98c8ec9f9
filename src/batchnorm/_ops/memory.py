"""Memory for large outputs, used again and again.

The C library returns every large tensor to the system when it is freed, and the next one begins as pages that must be
found and cleared at their first touch: for 77 MB that takes 20 to 50 ms, where writing them takes 2. So large outputs
of the kernels lie in memory of our own, in huge pages, which later outputs of the same size use again. Of what waits
for them, the newest ``KEPT_BYTES`` stay as they are; older regions are marked as free, so that a system that runs short
of memory takes them without asking (``MADV_FREE``), and the oldest go back to it.
"""

import ctypes
import mmap
import weakref

import torch
from torch import Tensor

LARGE_BYTES = 8 << 20
# Marking a region of 10 MB as free costs its next user 0.2 ms.
KEPT_BYTES = 512 << 20
# What would wait beyond this goes back to the system at once.
MOST_BYTES = 8 << 30
HUGE_PAGE = 2 << 20

# linux only; elsewhere torch.empty serves
AVAILABLE = hasattr(mmap, "MADV_FREE") and hasattr(mmap, "MADV_HUGEPAGE") and hasattr(mmap, "MAP_ANONYMOUS")


class Region:
    """A piece of memory, and whether the system may take what is in it."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.memory.madvise(mmap.MADV_HUGEPAGE)
        self.is_free = False


# newest last
waiting: list[Region] = []


def empty_like(x: Tensor) -> Tensor:
    """``torch.empty_like(x)`` for a dense CPU tensor."""
    size = x.nbytes
    if size < LARGE_BYTES or not AVAILABLE:
        return torch.empty_like(x)
    try:
        region = take(-(-size // HUGE_PAGE) * HUGE_PAGE)
    except OSError:
        return torch.empty_like(x)
    start = ctypes.addressof(ctypes.c_char.from_buffer(region.memory))
    lease = (ctypes.c_char * size).from_buffer(region.memory, -start % HUGE_PAGE)
    weakref.finalize(lease, give_back, region).atexit = False
    storage = torch.frombuffer(lease, dtype=x.dtype, count=x.numel()).untyped_storage()
    output = x.new_empty(0).set_(storage, 0, x.shape, x.stride())
    if torch.are_deterministic_algorithms_enabled() and torch.utils.deterministic.fill_uninitialized_memory:  # pyright: ignore[reportAttributeAccessIssue]
        output.fill_(torch.nan)
    return output


def take(size: int) -> Region:
    """A region that holds ``size`` bytes from its first huge page on."""
    size += HUGE_PAGE
    for region in reversed(list(waiting)):
        if region.size == size and withdrawn(region):
            region.is_free = False
            return region
    return Region(size)


def withdrawn(region: Region) -> bool:
    """Take a waiting region out of the list, unless another thread was faster."""
    try:
        waiting.remove(region)
    except ValueError:
        return False
    return True


def give_back(region: Region) -> None:
    """Called when the last tensor on the region is gone, at any time and in any thread."""
    waiting.append(region)
    total = 0
    for older in reversed(list(waiting)):
        total += older.size
        if total > MOST_BYTES:
            withdrawn(older)
        elif total > KEPT_BYTES and not older.is_free and withdrawn(older):
            # nobody else can use it now
            older.memory.madvise(mmap.MADV_FREE)
            older.is_free = True
            waiting.insert(0, older)
