"""Everything that happens to running statistics outside the layers, and whitening of a whole data set."""

from batchnorm.statistics.buffers import copy_running_stats, reset_running_stats
from batchnorm.statistics.loading import load_state_dict
from batchnorm.statistics.merge import merge_running_stats, synchronize_running_stats
from batchnorm.statistics.precision import keep_float32
from batchnorm.statistics.recalibrate import Recalibration, recalibrate
from batchnorm.statistics.transaction import Transaction, deferred_stats
from batchnorm.statistics.whitening import DatasetWhitening, whiten_dataset

__all__ = [
    "DatasetWhitening",
    "Recalibration",
    "Transaction",
    "copy_running_stats",
    "deferred_stats",
    "keep_float32",
    "load_state_dict",
    "merge_running_stats",
    "recalibrate",
    "reset_running_stats",
    "synchronize_running_stats",
    "whiten_dataset",
]
