"""Names and messages from a file as they may be shown, and many names of layers as few."""

import re
import unicodedata
from collections.abc import Iterable, Sequence

from batchnorm.report.text import UNPRINTABLE, escape

NAME_LIMIT = 100
MESSAGE_LIMIT = 1000
# so many names are listed one by one, and so many names or patterns in all
FEW, MOST = 3, 5
# GitHub's runner reads commands that begin with two colons, others two number signs; a colon of ours may follow
COMMAND = re.compile(r":(?=:|\Z)|#(?=#)")
NUMBER = re.compile(r"\d+")


def shown(text: str, limit: int = MESSAGE_LIMIT) -> str:
    """Text that can neither steer a terminal nor reorder a line, nor be a command to a build server that reads it.

    Args:
        text: from a file.
        limit: characters to keep.

    Returns:
        One line. Every character that does not print is its escape, and what is cut is counted.

    Example:
        >>> shown("layer\\x1b[31m\\n::error::")
        'layer\\\\x1b[31m\\\\n\\\\x3a:error\\\\x3a\\\\x3a'
        >>> shown("x" * 1000, limit=5)
        'xxxxx... (1,000 characters)'
    """
    kept = "".join(
        escape(character) if unicodedata.category(character) in UNPRINTABLE else character for character in text[:limit]
    )
    kept = COMMAND.sub(lambda match: f"\\x{ord(match[0]):02x}", kept)
    return kept if len(text) <= limit else f"{kept}... ({len(text):,} characters)"


def layer_name(path: str) -> str:
    return shown(path, NAME_LIMIT)


def compressed(paths: Iterable[str], every: Sequence[str] = (), most: int = MOST) -> str:
    """Many layers in few words: numbers that differ become ``*``, with how many layers that stands for.

    Args:
        paths: of the layers.
        every: paths of all layers there are. A pattern that more of them fit says so.
        most: names and patterns to write.

    Example:
        >>> blocks = [f"layer{i}.{j}.bn1" for i in (1, 2) for j in range(3)]
        >>> compressed(["bn1", *blocks], ["bn1", *blocks])
        'bn1, layer*.*.bn1 (6)'
        >>> compressed(blocks[:4], blocks), compressed(blocks[:2], blocks)
        ('layer*.*.bn1 (4 of 6)', 'layer1.0.bn1, layer1.1.bn1')
        >>> compressed(["stem", "a.norm", "b.norm"], most=1)
        'stem and 2 more'
    """
    alike: dict[tuple[str, ...], list[str]] = {}
    for path in dict.fromkeys(paths):
        alike.setdefault(tuple(NUMBER.split(path)), []).append(path)
    # one by one, or all of them as a pattern
    items: list[list[str]] = []
    for same in alike.values():
        items += [[path] for path in same] if len(same) <= FEW else [same]
    texts = [layer_name(item[0]) if len(item) == 1 else pattern(item, every) for item in items[:most]]
    more = sum(map(len, items[most:]))
    return ", ".join(texts) + (f" and {more:,} more" if more else "")


def pattern(same: Sequence[str], every: Sequence[str]) -> str:
    """Of names that differ in their numbers alone."""
    parts = NUMBER.split(same[0])
    columns = list(zip(*(NUMBER.findall(path) for path in same), strict=True))
    fixed = [column[0] if len(set(column)) == 1 else None for column in columns]
    text = parts[0] + "".join(f"{number or '*'}{part}" for number, part in zip(fixed, parts[1:], strict=True))
    fitting = sum(fits(path, parts, fixed) for path in every)
    count = f"{len(same):,} of {fitting:,}" if fitting > len(same) else f"{len(same):,}"
    return f"{layer_name(text)} ({count})"


def fits(path: str, parts: Sequence[str], fixed: Sequence[str | None]) -> bool:
    if NUMBER.split(path) != list(parts):
        return False
    return all(wanted in (None, number) for wanted, number in zip(fixed, NUMBER.findall(path), strict=True))
