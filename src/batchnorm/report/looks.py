"""How the lines of any number of arms are told apart: by color, by line style, and by labels at their ends."""

from collections.abc import Iterable
from typing import Any, NamedTuple

# The first two are vermilion and blue of Okabe and Ito. Every color stands out from white by at least 3 to 1, and any
# two whose lines have the same dashes are told apart with every common color blindness: tests/report/test_looks.py.
COLORS = ("#d55e00", "#0072b2", "#00594c", "#cc79a7", "#1f2328", "#009e73", "#8c1c46", "#5a3a00", "#332288")
# Lengths of line and gap in widths of the line; none for a solid one.
DASHES: tuple[tuple[float, ...], ...] = ((4, 1.6), (), (1, 1.3), (6, 1.5, 1, 1.5), (9, 2))


class Look(NamedTuple):
    """Color and dashes of a line."""

    color: str
    dashes: tuple[float, ...]

    @property
    def line(self) -> dict[str, Any]:
        """As matplotlib wants it."""
        return {"color": self.color, "linestyle": (0, self.dashes) if self.dashes else "solid"}


def looks(arms: Iterable[str]) -> dict[str, Look]:
    """A look for every arm; it repeats after 45 arms.

    Example:
        >>> looks(["plain", "bn"])["bn"]
        Look(color='#0072b2', dashes=())
    """
    return {arm: Look(COLORS[i % len(COLORS)], DASHES[i % len(DASHES)]) for i, arm in enumerate(arms)}
