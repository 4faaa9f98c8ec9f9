"""Batch normalization for PyTorch: layers, statistics, diagnosis, and the paper's experiments.

Start with :mod:`batchnorm.reference`. Names are imported at first use, so that the command line starts without torch.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from batchnorm import errors, functional, insight, nn, reference, statistics, surgery
    from batchnorm.environment import describe_environment
    from batchnorm.insight import memory_report
    from batchnorm.nn import explain
    from batchnorm.statistics import deferred_stats, recalibrate
    from batchnorm.surgery import convert, revert

__version__ = "0.1.0"
__all__ = [
    "convert",
    "deferred_stats",
    "describe_environment",
    "errors",
    "explain",
    "functional",
    "insight",
    "memory_report",
    "nn",
    "recalibrate",
    "reference",
    "revert",
    "statistics",
    "surgery",
]

HOME = {
    "convert": "batchnorm.surgery",
    "deferred_stats": "batchnorm.statistics",
    "describe_environment": "batchnorm.environment",
    "explain": "batchnorm.nn",
    "memory_report": "batchnorm.insight",
    "recalibrate": "batchnorm.statistics",
    "revert": "batchnorm.surgery",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'batchnorm' has no attribute {name!r}")
    if name in HOME:
        return getattr(importlib.import_module(HOME[name]), name)
    return importlib.import_module(f"batchnorm.{name}")


def __dir__() -> list[str]:
    return __all__
