"""Functions that change a model and return what they changed."""

from batchnorm.surgery.changes import Change, Changes, Fold, Folds
from batchnorm.surgery.convert import convert, revert
from batchnorm.surgery.fold import fold

__all__ = ["Change", "Changes", "Fold", "Folds", "convert", "fold", "revert"]
