"""What a result was measured on: the stamp in every record."""

import importlib.metadata
import os
import platform
from typing import Any

PACKAGES = ("batchnorm", "torch", "numpy", "numba", "safetensors", "matplotlib")


def describe_environment() -> dict[str, Any]:
    """Machine, versions, threads and kernels, as plain data that goes into JSON. No names of users or hosts.

    Example:
        >>> sorted(describe_environment())
        ['cpu', 'cpu_capability', 'cpus', 'cuda', 'kernels', 'memory_gib', 'packages', 'platform', 'python', 'threads']
    """
    import torch

    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "cpus": usable_cpus(),
        "memory_gib": memory_gib(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "kernels": ["kernel", "aten"] if installed_version("numba") else ["aten"],
        "packages": {name: installed_version(name) for name in PACKAGES},
    }


def installed_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def usable_cpus() -> int:
    """The cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None
