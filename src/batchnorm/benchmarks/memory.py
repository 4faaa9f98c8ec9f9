"""How much memory a call takes at most, and how much of it stays: resident memory, as the system counts it."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"
KIB = 1024
# JAX frees its arrays a moment after they are dropped
SETTLE_SECONDS = 0.02


class Memory(NamedTuple):
    """Bytes above what was resident before a call: at its highest, and while its results are held."""

    peak: int
    kept: int


def memory_of(call: Callable[[], Any]) -> Memory | None:
    """Measure one call, after another one; None where the system cannot tell (only Linux can).

    Resident memory counts whatever a library allocates and by whatever allocator. It is exact to a few hundred KiB, as
    long as the tensors are large enough (32 MiB) to be mapped when they are made and unmapped when they are freed;
    smaller ones may reuse pages that were resident before, so they are not measured.
    """
    if not os.access(CLEAR_REFS, os.W_OK):
        return None
    call()
    time.sleep(SETTLE_SECONDS)
    CLEAR_REFS.write_text(RESET_PEAK)
    before = resident()["VmRSS"]
    results = call()
    after = resident()
    del results
    return Memory(max(after["VmHWM"] - before, 0), max(after["VmRSS"] - before, 0))


def resident() -> dict[str, int]:
    """The lines of the process's status that are sizes, in bytes."""
    lines = (line.split() for line in STATUS.read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) * KIB for words in lines if len(words) == 3 and words[2] == "kB"}
