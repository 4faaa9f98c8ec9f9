"""Functions that change a model and return what they changed."""

from batchnorm.surgery.changes import Change, Changes
from batchnorm.surgery.convert import convert, revert

__all__ = ["Change", "Changes", "convert", "revert"]
