"""Everything that happens to running statistics outside the layers, and whitening of a whole data set."""

from batchnorm.statistics.recalibrate import Recalibration, recalibrate
from batchnorm.statistics.transaction import Transaction, deferred_stats
from batchnorm.statistics.whitening import DatasetWhitening, whiten_dataset

__all__ = ["DatasetWhitening", "Recalibration", "Transaction", "deferred_stats", "recalibrate", "whiten_dataset"]
