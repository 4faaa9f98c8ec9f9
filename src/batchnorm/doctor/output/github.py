"""The ``github`` format: workflow commands, which GitHub shows as annotations of a run."""

from batchnorm.doctor.examine import Examination
from batchnorm.doctor.finding import Severity
from batchnorm.doctor.output.groups import Group, grouped, not_run, summary
from batchnorm.doctor.output.names import shown

# commands of each severity
COMMANDS = {Severity.ERROR: "error", Severity.WARNING: "warning", Severity.INFO: "notice"}


def render(examination: Examination) -> str:
    """One command for each rule and severity, since GitHub shows ten of a kind; then lines for the log."""
    lines = [command(examination, group) for group in grouped(examination.findings)]
    lines.append(summary(examination))
    if examination.not_run:
        lines.append(f"not run: {not_run(examination.not_run)}")
    return "".join(f"{line}\n" for line in lines)


def command(examination: Examination, group: Group) -> str:
    layers = group.layers(examination)
    text = "\n".join(part for part in (layers, group.message, group.remedy) if part)
    file, title = shown(examination.source), f"{group.code} {group.name}"
    return (
        f"::{COMMANDS[group.severity]} file={escaped_property(file)},title={escaped_property(title)}::{escaped(text)}"
    )


def escaped(text: str) -> str:
    """As the runner decodes what a command says."""
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def escaped_property(text: str) -> str:
    """Properties end at a comma, their list at a colon."""
    return escaped(text).replace(":", "%3A").replace(",", "%2C")
