"""What a change of a model did, layer by layer."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

HEADINGS = ("layer", "what", "reason")
FOLD_HEADINGS = ("layer", "what", "error", "growth", "spread", "reason")


@dataclass(frozen=True, slots=True)
class Change:
    """What happened to one batch normalization layer.

    Attributes:
        name: of the layer, as in ``model.named_modules()``; "" for the model itself.
        what: "converted", "absorbed relu", "absorbed add + relu" (or another activation), or "left alone".
        reason: why the layer was left alone, or why it absorbed nothing, or not in every call; may be "".
    """

    name: str
    what: str
    reason: str = ""


class Changes(tuple[Change, ...]):
    """One :class:`Change` per batch normalization layer, in the order of the model; ``str()`` is a table."""

    __slots__ = ()

    def __str__(self) -> str:
        return table(HEADINGS, [(change.name or "(the model)", change.what, change.reason) for change in self])


@dataclass(frozen=True, slots=True)
class Fold:
    """What happened to one batch normalization layer, and what it costs.

    A linear or convolution layer that takes up two layers, one before and one after it, has one certificate for both.

    Attributes:
        name: of the layer, as in ``model.named_modules()``; "" for the model itself.
        what: "folded into conv1" (the name of the module), or "left alone".
        reason: why it was left alone; of a folded layer, what was taken for granted about calls; may be "".
        error: largest difference of the block's output, folded in the model's dtype, from unfolded in float64, divided
            by the largest absolute output. None if left alone.
        growth: largest absolute weight after by before; with one scale for a whole weight, int8 quantization gets
            coarser by it. None if left alone, or if a weight is 0.
        spread: largest by smallest range of an output channel, after by before; channels of zeros do not count. With
            one scale for a whole weight, the channels of small range keep fewer steps by it. None as ``growth``.
    """

    name: str
    what: str
    reason: str = ""
    error: float | None = None
    growth: float | None = None
    spread: float | None = None


class Folds(tuple[Fold, ...]):
    """One :class:`Fold` per batch normalization layer, in the order of the model; ``str()`` is a table."""

    __slots__ = ()

    def __str__(self) -> str:
        def cells(fold: Fold) -> tuple[str, ...]:
            numbers = (fold.error, fold.growth, fold.spread)
            written = ("" if number is None else f"{number:.3g}" for number in numbers)
            return (fold.name or "(the model)", fold.what, *written, fold.reason)

        return table(FOLD_HEADINGS, [cells(fold) for fold in self])


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns aligned, but for the last."""
    lines = [headings, *rows]
    if len(lines) == 1:
        return "no batch normalization layer"
    widths = [max(len(line[column]) for line in lines) for column in range(len(headings) - 1)]
    return "\n".join("  ".join([*map(str.ljust, line, widths), line[-1]]).rstrip() for line in lines)
