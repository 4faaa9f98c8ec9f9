"""Words and numbers as a reader sees them: names made harmless, digits chosen."""

import json
import math
import unicodedata

NAME_LIMIT = 300
MOST_DECIMALS = 6
NOTHING = "\N{EN DASH}"
# Control, format (bidirectional overrides among them), surrogate and private characters; line and paragraph separators.
UNPRINTABLE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
PLAIN = str.maketrans(
    {
        "\N{EN DASH}": "-",
        "\N{EM DASH}": "-",
        "\N{MINUS SIGN}": "-",
        "\N{MULTIPLICATION SIGN}": "x",
        "\N{PLUS-MINUS SIGN}": "+-",
        "\N{NO-BREAK SPACE}": " ",
        "\N{HORIZONTAL ELLIPSIS}": "...",
        "\N{RIGHT SINGLE QUOTATION MARK}": "'",
    }
)


def clean(value: object, limit: int = NAME_LIMIT) -> str:
    """Text from a file that can neither steer a terminal nor reorder or flood a page.

    Args:
        value: a string, or anything that JSON can hold, which is then written as JSON.
        limit: characters to keep.

    Returns:
        One line. White space is one space, an unprintable character its escape, and what is cut is counted.

    Example:
        >>> clean("red \\x1b[31m\\nname")
        'red \\\\x1b[31m name'
        >>> clean("x" * 1000, limit=5)
        'xxxxx… (1,000 characters)'
        >>> clean([100, 100, 100])
        '[100, 100, 100]'
    """
    text = value if isinstance(value, str) else as_json(value)
    kept = " ".join(text[: 4 * limit].split())[:limit]
    shown = "".join(
        escape(character) if unicodedata.category(character) in UNPRINTABLE else character for character in kept
    )
    return shown if len(text) <= limit else f"{shown}\N{HORIZONTAL ELLIPSIS} ({len(text):,} characters)"


def as_json(value: object) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, default=str)
    except (RecursionError, ValueError):
        return "(nested too deeply to show)"


def escape(character: str) -> str:
    """The character as a Python string literal spells it."""
    return character.encode("unicode_escape").decode()


def ascii_only(text: str) -> str:
    """The same text for an output that has nothing but ASCII.

    Example:
        >>> ascii_only("5 ± 1 – naïve")
        '5 +- 1 - na\\\\xefve'
    """
    return text.translate(PLAIN).encode("ascii", "backslashreplace").decode()


def percent(fraction: float | None) -> str:
    """A fraction in percent with two decimals.

    Example:
        >>> percent(0.98014), percent(None)
        ('98.01 %', '–')
    """
    return NOTHING if fraction is None or missing(fraction) else f"{100 * fraction:.2f} %"


def number(value: float | None, decimals: int | None = None) -> str:
    """A number with grouped thousands; without ``decimals``, three significant digits (all digits of an integer).

    Example:
        >>> number(50000), number(0.04123), number(1234.5), number(2.5, 2), number(1e-5)
        ('50,000', '0.0412', '1,234', '2.50', '1e-05')
    """
    if value is None or missing(value):
        return NOTHING
    if isinstance(value, int):
        return f"{value:,}"
    if decimals is not None:
        return f"{value:,.{decimals}f}"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.3g}"


def estimate(mean: float | None, low: float | None, high: float | None) -> tuple[str, str]:
    """A mean and its interval with as many decimals as the interval supports: two digits of its width.

    Example:
        >>> estimate(0.3512, 0.2031, 0.4993)
        ('0.35', '0.20 to 0.50')
        >>> estimate(14210.0, 13800.0, 14600.0)
        ('14,210', '13,800 to 14,600')
        >>> estimate(0.3512, None, None)
        ('0.351', '')
    """
    if mean is None or low is None or high is None or missing(mean + low + high):
        return number(mean), ""
    width = abs(high - low) or abs(mean) / 100 or 1.0
    decimals = max(1 - math.floor(math.log10(width)), 0)
    if decimals > MOST_DECIMALS:
        return number(mean), f"{number(low)} to {number(high)}"
    mean_text, low_text, high_text = (f"{value:,.{decimals}f}" for value in (mean, low, high))
    return mean_text, f"{low_text} to {high_text}"


def missing(value: float) -> bool:
    return not math.isfinite(value)


def sentence(text: str) -> str:
    """The text with a capital at its start and no other change.

    Example:
        >>> sentence("without BN")
        'Without BN'
    """
    return text[:1].upper() + text[1:]


def joined(names: list[str]) -> str:
    """Names in a sentence.

    Example:
        >>> joined(["a"]), joined(["a", "b", "c"])
        ('a', 'a, b and c')
    """
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
