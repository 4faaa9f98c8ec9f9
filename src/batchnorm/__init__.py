"""Batch normalization for PyTorch: layers, statistics, diagnosis, and the paper's experiments.

Start with :mod:`batchnorm.reference`. Names are imported at first use, so that the command line starts without torch.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from batchnorm import errors, functional, insight, nn, reference, statistics, surgery
    from batchnorm.doctor.examine import examine
    from batchnorm.doctor.measure_tensorflow import measure_tensorflow
    from batchnorm.doctor.repair import repair
    from batchnorm.environment import describe_environment
    from batchnorm.insight import explain_gap, memory_report
    from batchnorm.nn import explain
    from batchnorm.statistics import (
        assert_unchanged,
        copy_running_stats,
        deferred_stats,
        freeze,
        keep_float32,
        load_state_dict,
        merge_running_stats,
        normalize_by,
        recalibrate,
        reset_running_stats,
        synchronize_running_stats,
        unfreeze,
    )
    from batchnorm.surgery import convert, fold, revert

__version__ = "0.1.0"
__all__ = [
    "assert_unchanged",
    "convert",
    "copy_running_stats",
    "deferred_stats",
    "describe_environment",
    "errors",
    "examine",
    "explain",
    "explain_gap",
    "fold",
    "freeze",
    "functional",
    "insight",
    "keep_float32",
    "load_state_dict",
    "measure_tensorflow",
    "memory_report",
    "merge_running_stats",
    "nn",
    "normalize_by",
    "recalibrate",
    "reference",
    "repair",
    "reset_running_stats",
    "revert",
    "statistics",
    "surgery",
    "synchronize_running_stats",
    "unfreeze",
]

HOME = {
    "assert_unchanged": "batchnorm.statistics",
    "convert": "batchnorm.surgery",
    "copy_running_stats": "batchnorm.statistics",
    "deferred_stats": "batchnorm.statistics",
    "describe_environment": "batchnorm.environment",
    "examine": "batchnorm.doctor.examine",
    "explain": "batchnorm.nn",
    "explain_gap": "batchnorm.insight",
    "fold": "batchnorm.surgery",
    "freeze": "batchnorm.statistics",
    "keep_float32": "batchnorm.statistics",
    "load_state_dict": "batchnorm.statistics",
    "measure_tensorflow": "batchnorm.doctor.measure_tensorflow",
    "memory_report": "batchnorm.insight",
    "merge_running_stats": "batchnorm.statistics",
    "normalize_by": "batchnorm.statistics",
    "recalibrate": "batchnorm.statistics",
    "repair": "batchnorm.doctor.repair",
    "reset_running_stats": "batchnorm.statistics",
    "revert": "batchnorm.surgery",
    "synchronize_running_stats": "batchnorm.statistics",
    "unfreeze": "batchnorm.statistics",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'batchnorm' has no attribute {name!r}")
    if name in HOME:
        return getattr(importlib.import_module(HOME[name]), name)
    return importlib.import_module(f"batchnorm.{name}")


def __dir__() -> list[str]:
    return __all__
