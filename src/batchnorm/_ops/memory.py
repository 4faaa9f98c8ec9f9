"""Memory for large outputs, used again and again.

The C library returns every large tensor to the system when it is freed, and the next one begins as pages that must be
found and cleared at their first touch: for 77 MB that takes 20 to 50 ms, where writing them takes 2. So large outputs
of the kernels lie in memory of our own, in huge pages, which later outputs of the same size use again. Of what waits
for them, all beyond ``KEPT_BYTES`` is marked as free: a system that runs short of memory takes it without asking
(``MADV_FREE``).
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

waiting: dict[int, list[mmap.mmap]] = {}


def empty_like(x: Tensor) -> Tensor:
    """``torch.empty_like(x)`` for a dense CPU tensor."""
    size = x.numel() * x.element_size()
    if size < LARGE_BYTES or not AVAILABLE:
        return torch.empty_like(x)
    try:
        region = take(-(-size // HUGE_PAGE) * HUGE_PAGE)
    except OSError:
        return torch.empty_like(x)
    start = ctypes.addressof(ctypes.c_char.from_buffer(region))
    lease = (ctypes.c_char * size).from_buffer(region, -start % HUGE_PAGE)
    weakref.finalize(lease, give_back, region).atexit = False
    storage = torch.frombuffer(lease, dtype=x.dtype, count=x.numel()).untyped_storage()
    output = torch.empty(0, dtype=x.dtype).set_(storage, 0, x.shape, x.stride())
    if torch.are_deterministic_algorithms_enabled() and torch.utils.deterministic.fill_uninitialized_memory:  # pyright: ignore[reportAttributeAccessIssue]
        output.fill_(torch.nan)
    return output


def take(size: int) -> mmap.mmap:
    """A region that holds ``size`` bytes from its first huge page on."""
    size += HUGE_PAGE
    try:
        return waiting[size].pop()
    except (KeyError, IndexError):
        region = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        region.madvise(mmap.MADV_HUGEPAGE)
        return region


def give_back(region: mmap.mmap) -> None:
    """Called when the last tensor on the region is gone, at any time and in any thread."""
    total = sum(size * len(regions) for size, regions in list(waiting.items()))
    if total > MOST_BYTES:
        return
    if total > KEPT_BYTES:
        region.madvise(mmap.MADV_FREE)
    waiting.setdefault(len(region), []).append(region)
