"""Everything that happens to running statistics outside the layers."""

from batchnorm.statistics.recalibrate import Recalibration, recalibrate

__all__ = ["Recalibration", "recalibrate"]
