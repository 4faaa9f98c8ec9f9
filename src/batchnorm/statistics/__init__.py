"""Everything that happens to running statistics outside the layers, and whitening of a whole data set."""

from batchnorm.statistics.freeze import freeze, unfreeze
from batchnorm.statistics.normalize_by import normalize_by
from batchnorm.statistics.recalibrate import Recalibration, recalibrate
from batchnorm.statistics.unchanged import assert_unchanged
from batchnorm.statistics.whitening import DatasetWhitening, whiten_dataset

__all__ = [
    "DatasetWhitening",
    "Recalibration",
    "assert_unchanged",
    "freeze",
    "normalize_by",
    "recalibrate",
    "unfreeze",
    "whiten_dataset",
]
