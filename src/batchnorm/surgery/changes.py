"""What a change of a model did, layer by layer."""

from dataclasses import dataclass

HEADINGS = ("layer", "what", "reason")


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
        if not self:
            return "no batch normalization layer"
        rows = [HEADINGS, *((change.name or "(the model)", change.what, change.reason) for change in self)]
        widths = [max(len(row[column]) for row in rows) for column in range(2)]
        return "\n".join(f"{row[0]:{widths[0]}}  {row[1]:{widths[1]}}  {row[2]}".rstrip() for row in rows)
