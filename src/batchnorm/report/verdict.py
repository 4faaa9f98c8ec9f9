"""The verdicts as a table for the terminal, and as plain ASCII where there is no terminal."""

import textwrap
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderResult
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from batchnorm.report.records import VERDICTS, Claim
from batchnorm.report.text import ascii_only, clean, estimate, joined

SYMBOLS = {"reproduced": "\N{CHECK MARK}", "not reproduced": "\N{BALLOT X}", "not comparable": "\N{EN DASH}"}
ASCII_SYMBOLS = {"reproduced": "+", "not reproduced": "x", "not comparable": "-"}
STYLES = {"reproduced": "bold green", "not reproduced": "bold red", "not comparable": "bold"}
PLAIN_WIDTH = 79
STATEMENT_LIMIT, RULE_LIMIT, SHORT_LIMIT = 240, 480, 80


class VerdictTable:
    """Claims to print with rich, or with ``str``: plain ASCII, the form that pipes and files get as well."""

    def __init__(self, claims: Sequence[Claim]) -> None:
        self.claims = claims

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if options.is_terminal and not options.ascii_only:
            yield colored_table(self.claims)
        else:
            yield Segment(f"{self}\n")

    def __str__(self) -> str:
        return ascii_only("\n\n".join([summary(self.claims), *map(plain_claim, self.claims)]))


def verdict_table(claims: Sequence[Claim]) -> VerdictTable:
    """What was claimed, what was found, and by which rule it was judged.

    Args:
        claims: as in ``Run.claims`` or the list "claims" of claims.json.

    Returns:
        A renderable for rich: a table on a terminal, plain ASCII elsewhere. ``str`` of it is the plain form.

    Example:
        >>> claim = Claim(
        ...     name="accuracy", statement="BN ends at a higher accuracy", source="Section 4.1", rule="above 0",
        ...     paper=None, unit="points", values=[0.3, 0.4], mean=0.35, low=0.2, high=0.5,
        ...     verdict="reproduced", detail="plain 97.62 %, BN 97.97 %")
        >>> print(verdict_table([claim]))
        1 of 1 claims reproduced
        <BLANKLINE>
        [+] reproduced: BN ends at a higher accuracy
            here:  0.35 points (95 % interval 0.20 to 0.50)
            paper: no number
            rule:  above 0
    """
    return VerdictTable(claims)


def summary(claims: Sequence[Claim]) -> str:
    """How many claims got which verdict.

    Example:
        >>> summary([])
        'no claims'
    """
    counts = {verdict: sum(claim["verdict"] == verdict for claim in claims) for verdict in VERDICTS}
    if not claims:
        return "no claims"
    first = f"{counts['reproduced']} of {len(claims)} claims reproduced"
    others = [f"{counts[verdict]} {verdict}" for verdict in VERDICTS[1:] if counts[verdict]]
    return joined([first, *others])


def measured(claim: Claim) -> tuple[str, str]:
    """Our number with its unit, and its interval; without a number, a sentence instead.

    Example:
        >>> measured(Claim(unit="%", mean=97.62, low=97.5, high=97.7))
        ('97.62 %', '97.50 to 97.70')
    """
    if claim["mean"] is None:
        return "not measured", ""
    mean, interval = estimate(claim["mean"], claim["low"], claim["high"])
    return f"{mean} {clean(claim['unit'], SHORT_LIMIT)}".strip(), interval


def paper_number(claim: Claim) -> str:
    return "no number" if claim["paper"] is None else clean(claim["paper"], SHORT_LIMIT)


def colored_table(claims: Sequence[Claim]) -> Table:
    table = Table(
        box=SIMPLE_HEAD, title=summary(claims), title_justify="left", title_style="bold", padding=(0, 1, 0, 0)
    )
    table.add_column("Verdict", no_wrap=True)
    table.add_column("Claim and rule", ratio=6)
    table.add_column("Paper", ratio=2)
    table.add_column("Here, 95 % interval", ratio=3)
    table.expand = len(claims) > 0
    for i, claim in enumerate(claims):
        verdict = claim["verdict"]
        mean, interval = measured(claim)
        words = Text(clean(claim["statement"], STATEMENT_LIMIT))
        words.append(f"\n{clean(claim['rule'], RULE_LIMIT)}", style="dim")
        here = Text(mean)
        here.append(f"\n{interval}" if interval else "", style="dim")
        mark = Text(f"{SYMBOLS[verdict]} {verdict}", style=STYLES[verdict])
        table.add_row(mark, words, Text(paper_number(claim)), here, end_section=i == len(claims) - 1)
    return table


def plain_claim(claim: Claim) -> str:
    mean, interval = measured(claim)
    lines = [f"[{ASCII_SYMBOLS[claim['verdict']]}] {claim['verdict']}: {clean(claim['statement'], STATEMENT_LIMIT)}"]
    lines.append(f"    here:  {mean}" + (f" (95 % interval {interval})" if interval else ""))
    lines.append(f"    paper: {paper_number(claim)}")
    lines.append(f"    rule:  {clean(claim['rule'], RULE_LIMIT)}")
    return "\n".join(
        textwrap.fill(line, PLAIN_WIDTH, subsequent_indent="           " if i else "    ")
        for i, line in enumerate(lines)
    )
