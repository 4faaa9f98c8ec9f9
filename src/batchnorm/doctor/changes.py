"""Which tensors a repair changed: their digests before and after, and how far they moved."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from batchnorm.doctor.checkpoint import StoredTensor
from batchnorm.doctor.write.raw import digest


@dataclass(frozen=True)
class Change:
    """A tensor that is new, gone or another one.

    Attributes:
        name: in the source.
        dtype: before and after; None where there was or is none.
        shape: likewise.
        sha256: likewise, of the bytes.
        largest: the largest change of an element; None if one of the two is not there or not finite.
    """

    name: str
    dtype: tuple[str | None, str | None]
    shape: tuple[tuple[int, ...] | None, tuple[int, ...] | None]
    sha256: tuple[str | None, str | None]
    largest: float | None


@dataclass(frozen=True)
class Comparison:
    """All tensors before and after.

    Attributes:
        changed: in the order of the source, new ones behind.
        unchanged: SHA-256 of all others by name; None if the values cannot be read.
    """

    changed: list[Change]
    unchanged: dict[str, str | None]


def compare(before: Mapping[str, StoredTensor], after: Mapping[str, StoredTensor]) -> Comparison:
    """Tensors by name; one that is the same object is not read twice.

    Example:
        >>> one = StoredTensor("mean", (2,), "float32", lambda: np.zeros(2, "f4"))
        >>> other = StoredTensor("mean", (2,), "float32", lambda: np.float32([0, 3]))
        >>> [(change.name, change.largest) for change in compare({"mean": one}, {"mean": other}).changed]
        [('mean', 3.0)]
    """
    changed, unchanged = [], {}
    for name in dict.fromkeys([*before, *after]):
        old, new = before.get(name), after.get(name)
        digests = tuple(None if tensor is None else digest(tensor) for tensor in (old, new if new is not old else None))
        if new is old or (old is not None and new is not None and old.dtype == new.dtype and digests[0] == digests[1]):
            unchanged[name] = digests[0]
        else:
            kinds = [(None, None) if tensor is None else (tensor.dtype, tensor.shape) for tensor in (old, new)]
            dtype, shape = zip(*kinds, strict=True)
            changed.append(Change(name, dtype, shape, (digests[0], digests[1]), moved(old, new)))
    return Comparison(changed, unchanged)


def moved(old: StoredTensor | None, new: StoredTensor | None) -> float | None:
    if old is None or new is None or old.shape != new.shape:
        return None
    with np.errstate(invalid="ignore"):
        largest = np.abs(new.values() - old.values()).max(initial=0.0)
    return float(largest) if np.isfinite(largest) else None
