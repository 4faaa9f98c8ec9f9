"""The ``batchnorm`` command: which commands there are, and how each kind of failure ends."""

import contextlib
import importlib
import sys
import traceback

import click

from batchnorm import __version__
from batchnorm.errors import BatchNormError

# name: module and attribute, short help. The module is imported only when the command runs, so --help needs no torch.
COMMANDS = {
    "bench": ("batchnorm.cli.bench", "bench", "Measure the layers against torch, torch.compile and JAX."),
    "doctor": (
        "batchnorm.cli.doctor",
        "doctor",
        "Find what is wrong with the batch normalization layers of a checkpoint or a model.",
    ),
    "env": ("batchnorm.cli.env", "env", "Show the machine, the versions and the kernels that results depend on."),
    "fold": (
        "batchnorm.cli.fold",
        "fold",
        "Fold a checkpoint's BN layers into their neighbours, and write the result.",
    ),
    "recalibrate": (
        "batchnorm.cli.recalibrate",
        "recalibrate",
        "Measure a checkpoint's running statistics anew on data, and write a new checkpoint.",
    ),
    "report": ("batchnorm.cli.report", "report", "Rebuild the figures and the page of a run from its data."),
    "reproduce": (
        "batchnorm.cli.reproduce",
        "reproduce",
        "Run an experiment and give a verdict per claim.",
    ),
    "rule": ("batchnorm.cli.rule", "rule", "Explain a rule of the doctor, or list all of them."),
}

ERROR = 2
INTERRUPTED = 130


class LazyCommands(click.Group):
    """A group that knows its commands by name and imports one when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, attribute, _ = COMMANDS[cmd_name]
        return getattr(importlib.import_module(module), attribute)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, _, summary) in COMMANDS.items()])


@click.command(cls=LazyCommands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="batchnorm")
def batchnorm() -> None:
    """Batch normalization for PyTorch: checkpoints examined and repaired, and the paper's experiments.

    Exit status: 0 done, 1 done but not all is well, as each command says, 2 an error, 130 interrupted.
    """


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit. An error is one line on standard error."""
    sys.exit(run(arguments))


def run(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    try:
        return batchnorm.main(arguments, prog_name="batchnorm", standalone_mode=False) or 0
    except click.exceptions.Abort:
        return INTERRUPTED
    except click.ClickException as error:
        show(error)
        return ERROR
    except (BatchNormError, OSError) as error:
        say(f"batchnorm: {error}")
        return ERROR
    except SystemExit:
        # click and rich end with status 1 when the reader of standard output has gone
        return ERROR
    except Exception:
        traceback.print_exc()
        say("batchnorm: this is a fault of batchnorm; please report it with the lines above")
        return ERROR


def say(message: str) -> None:
    """A line on standard error; where nobody reads it, the exit status still tells."""
    with contextlib.suppress(OSError):
        click.echo(message, err=True)


def show(error: click.ClickException) -> None:
    """One line: the command, what was wrong, where to look. A group called without a command shows its help."""
    context = error.ctx if isinstance(error, click.UsageError) else None
    message = error.format_message()
    if "\n" in message or context is None:
        error.show()
    else:
        say(f"{context.command_path}: {message} See {context.command_path} --help.")
