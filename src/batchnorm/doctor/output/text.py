"""The ``text`` format: what a screen holds, one paragraph for each rule that found something."""

import io

from rich.console import Console
from rich.text import Text

from batchnorm.doctor.examine import Examination
from batchnorm.doctor.finding import Severity
from batchnorm.doctor.output.groups import Group, grouped, not_run, summary

WIDTH = 79
NARROWEST = 40
INDENT = "    "
STYLES = {Severity.ERROR: "bold red", Severity.WARNING: "bold yellow", Severity.INFO: "bold cyan"}


def render(examination: Examination, *, width: int = WIDTH, color: bool = False) -> str:
    """Findings grouped by rule, the layers in few words, what follows, what to do; then the rules that did not run.

    Args:
        examination: what to show.
        width: of a line in columns.
        color: whether to write the escape sequences of a terminal.
    """
    page = Page(max(width, NARROWEST), color)
    page.write(Text(summary(examination), style="bold"))
    groups = grouped(examination.findings)
    for group in groups:
        page.write(Text())
        write_group(page, group, group.layers(examination))
    hints = []
    if examination.not_run:
        hints.append(f"Not run: {not_run(examination.not_run)}.")
    if groups:
        hints.append(f"batchnorm rule {groups[0].code} explains a rule; --output-format concise lists every finding.")
    for hint in hints:
        page.write(Text())
        page.write(Text(hint, style="dim"))
    return page.text()


def write_group(page: "Page", group: Group, layers: str) -> None:
    head = Text.assemble((group.severity, STYLES[group.severity]), " ", (group.code, "bold"), f" {group.name}")
    if layers:
        head.append(f": {layers}")
    page.write(head, later=INDENT)
    page.write(Text(group.message), INDENT, INDENT)
    if group.remedy:
        page.write(Text.assemble(("To do: ", "bold"), group.remedy), INDENT, INDENT)


class Page:
    """Lines of a given width."""

    def __init__(self, width: int, color: bool) -> None:
        self.file, self.width = io.StringIO(), width
        self.console = Console(
            file=self.file,
            width=width,
            force_terminal=color,
            no_color=not color,
            color_system="standard" if color else None,
            highlight=False,
            legacy_windows=False,
        )

    def write(self, text: Text, first: str = "", later: str = "") -> None:
        """A paragraph whose first line and later lines are indented."""
        lines = text.wrap(self.console, self.width - len(later), overflow="fold")
        for i, line in enumerate(lines):
            line.rstrip()
            self.console.print(Text(later if i else first) + line, soft_wrap=True)

    def text(self) -> str:
        return self.file.getvalue()
