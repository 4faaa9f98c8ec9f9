"""The exceptions that are ours; wrong arguments of a layer raise what ``torch.nn`` raises for them.

The tree, root first:

    BatchNormError
    |-- DataError              a data file is not what it should be (also a ValueError)
    |-- RunError               a run folder cannot be used as asked (also a RuntimeError)
    |-- StatisticsError        a checkpoint has no usable running statistics (also a RuntimeError)
    |-- FoldError              a folded model would not compute what the model does (also a RuntimeError)
    |-- ImplementationError    the requested implementation cannot serve this call (also a RuntimeError)
    `-- MissingExtraError      an optional dependency is not installed (also an ImportError)
"""


class BatchNormError(Exception):
    """Base class: ``except BatchNormError`` catches everything this package raises on purpose."""


class DataError(BatchNormError, ValueError):
    """A data file is missing, truncated, or has other bytes than expected."""


class RunError(BatchNormError, RuntimeError):
    """A run folder exists already, belongs to another configuration, or cannot be written."""


class StatisticsError(BatchNormError, RuntimeError):
    """Running statistics of a checkpoint are missing, impossible, or were never updated."""


class FoldError(BatchNormError, RuntimeError):
    """A folded model would differ from the model by more than rounding, or nothing could be compared."""


class ImplementationError(BatchNormError, RuntimeError):
    """The implementation that was asked for by name cannot serve this call."""


class MissingExtraError(BatchNormError, ImportError):
    """A feature needs an optional dependency; the message names the extra that installs it."""
