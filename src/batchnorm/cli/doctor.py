"""``batchnorm doctor``."""

import dataclasses
import importlib
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from batchnorm.cli.fixing import check_fixing, fixing_options

if TYPE_CHECKING:
    from batchnorm.cli.baseline import Known
    from batchnorm.cli.doctor_settings import Settings
    from batchnorm.doctor.examine import Examination
    from batchnorm.doctor.finding import Finding
    from batchnorm.doctor.fixes.result import Repair

FORMATS = ("text", "concise", "json", "markdown", "github", "sarif", "html")
SEVERITIES = ("error", "warning", "info")
BATCH_SIZE = 64
# longer lines are hard to read
WIDEST = 100
# of a baseline; the rest is counted
MOST_GONE = 5


@click.command()
@click.argument("target", metavar="TARGET")
@click.option("--model", "factory", metavar="CODE", help="Function that builds the model of the file.")
@click.option("--data", metavar="CODE|FILE", help="Loader, or .npy, .npz, .pt, .safetensors; for rules that need it.")
@click.option("--batch-size", type=click.IntRange(1), default=BATCH_SIZE, show_default=True, help="Of a file of data.")
@click.option("--select", metavar="CODES", multiple=True, help="Only these rules: BN101, or BN1 for all that begin so.")
@click.option("--ignore", metavar="CODES", multiple=True, help="Not these rules.")
@click.option(
    "--fail-on", type=click.Choice(SEVERITIES), help="Lightest finding that ends in status 1. [default: error]"
)
@click.option(
    "--baseline", type=click.Path(path_type=Path), metavar="FILE", help="Findings that are known do not count."
)
@click.option(
    "--write-baseline", type=click.Path(path_type=Path), metavar="FILE", help="Write what is known from now on."
)
@click.option("--output-format", type=click.Choice(FORMATS), default="text", show_default=True)
@click.option("--output", type=click.Path(path_type=Path), metavar="FILE", help="[default: standard output]")
@fixing_options
@click.pass_context
def doctor(
    ctx: click.Context,
    target: str,
    factory: str | None,
    data: str | None,
    batch_size: int,
    baseline: Path | None,
    write_baseline: Path | None,
    output_format: str,
    output: Path | None,
    **chosen: Any,
) -> int:
    """Find what is wrong with the batch normalization layers of a checkpoint or a model.

    TARGET is a checkpoint of torch (.pt, .pth, ...), .safetensors, TensorFlow or Keras; nothing that it contains is
    run. Or it is CODE: PACKAGE.MODULE:NAME or path/to/FILE.py:NAME, a function that returns a model. That is run.

    Some rules need a model, and some need data: with --model, the state of the file is loaded into the model that
    CODE builds; with --data, the model is called. Rules that need more than was given are listed as not run.

    --fix writes a repaired copy to --out, never TARGET itself, and reports each tensor's digest before and after.
    Statistics that are missing or broken are measured with --unsafe-fixes, --model and --data, or given by
    --statistics, for TensorFlow too.

    CODES are separated by commas. Options replace what [tool.batchnorm.doctor] in the nearest pyproject.toml says.

    Exit status, of what is left after a --fix: 0 nothing as grave as --fail-on, 1 something is, 2 an error, 130
    interrupted.
    """
    from batchnorm.cli.baseline import read_baseline
    from batchnorm.cli.doctor_settings import codes_that_ran, find_settings, split_ignored
    from batchnorm.cli.examining import examine_code, examine_file, is_code
    from batchnorm.cli.fixing import fixed
    from batchnorm.cli.outputs import check_output

    code = is_code(target)
    check_options(ctx, code, data, chosen)
    if output is not None:
        check_output(output, Path(target), force=True)
    settings = replaced(find_settings(Path.cwd()), chosen)
    known = None if baseline is None else read_baseline(baseline)
    rules = settings.select, settings.ignore
    repaired = None
    if chosen["fix"] or chosen["diff"]:

        def wanted(finding: "Finding") -> bool:
            return bool(split_ignored([finding], settings)[0])

        repaired = fixed(target, factory, data, batch_size, rules, wanted, chosen)
        found = repaired.left
    elif code:
        found = examine_code(target, data, batch_size, *rules)
    else:
        found = examine_file(target, factory, data, batch_size, *rules)
    ran = codes_that_ran(found, *rules)
    found = without_ignored(found, settings, ran)
    if write_baseline is not None:
        write_known(write_baseline, found)
        known = read_baseline(write_baseline)
    if known is not None:
        found = without_known(found, known, ran)
    write(found, output_format, output, repaired)
    return int(any(finding.severity.rank <= settings.fail_on.rank for finding in found.findings))


def check_options(ctx: click.Context, code: bool, data: str | None, chosen: dict[str, Any]) -> None:
    """Refuse options that would do nothing."""
    given = {name for name in ctx.params if ctx.get_parameter_source(name) is not ParameterSource.DEFAULT}
    check_fixing(given, chosen, code)
    if code and "factory" in given:
        raise click.UsageError("TARGET is the model already: --model is for a checkpoint.")
    if "data" in given and not code and "factory" not in given:
        raise click.UsageError("--data is for a model: name the function that builds it with --model.")
    if "batch_size" in given and (data is None or not is_array(data)):
        raise click.UsageError("--batch-size is for a file of --data: a loader makes its own batches.")
    if {"baseline", "write_baseline"} <= given:
        raise click.UsageError("--baseline and --write-baseline are two runs: one reads what the other wrote.")


def is_array(data: str) -> bool:
    from batchnorm.cli.inputs import is_file

    return is_file(data)


def replaced(settings: "Settings", chosen: dict[str, Any]) -> "Settings":
    """The settings with what the command line says instead."""
    from batchnorm.cli.doctor_settings import codes
    from batchnorm.doctor.finding import Severity

    said: dict[str, Any] = {
        name: codes([code for value in chosen[name] for code in value.split(",")], f"--{name}")
        for name in ("select", "ignore")
        if chosen[name]
    }
    if chosen["fail_on"] is not None:
        said["fail_on"] = Severity(chosen["fail_on"])
    return dataclasses.replace(settings, **said)


def without_ignored(found: "Examination", settings: "Settings", ran: Sequence[str]) -> "Examination":
    """Without what the settings ignore in single layers; ignores that are of no use are named."""
    from batchnorm.cli.doctor_settings import split_ignored, unused_ignores
    from batchnorm.doctor.output.groups import counted

    kept, used = split_ignored(found.findings, settings)
    if ignored := len(found.findings) - len(kept):
        click.echo(f"ignored as pyproject.toml says: {counted(ignored, 'finding')}", err=True)
    for unused in unused_ignores(settings, used, ran):
        click.echo(f"pyproject.toml ignores what is not there: {unused}", err=True)
    return dataclasses.replace(found, findings=kept)


def write_known(path: Path, found: "Examination") -> None:
    from batchnorm.cli.baseline import write_baseline
    from batchnorm.doctor.output.groups import counted

    write_baseline(path, found.findings)
    click.echo(f"wrote {path}: {counted(len(found.findings), 'finding')} known from now on", err=True)


def without_known(found: "Examination", known: "Known", ran: Sequence[str]) -> "Examination":
    """New findings; those that are gone are named."""
    from batchnorm.cli.baseline import compare
    from batchnorm.doctor.output.groups import counted
    from batchnorm.doctor.output.names import layer_name

    new, left = compare(found.findings, known)
    gone = [f"{code} {layer_name(layer)}".strip() for code, layer in left.elements() if code in ran]
    if old := len(found.findings) - len(new):
        click.echo(f"known and not counted: {counted(old, 'finding')}", err=True)
    if gone:
        more = f" and {len(gone) - MOST_GONE:,} more" if len(gone) > MOST_GONE else ""
        click.echo(f"known and gone, so write the baseline anew: {', '.join(gone[:MOST_GONE])}{more}", err=True)
    return dataclasses.replace(found, findings=new)


def write(found: "Examination", output_format: str, output: Path | None, repaired: "Repair | None" = None) -> None:
    """The output where it was asked for; a summary on standard error unless it is read anyway."""
    from batchnorm.cli.outputs import print_text
    from batchnorm.doctor.output import repair as form_of_repair
    from batchnorm.doctor.output.groups import not_run, summary
    from batchnorm.files import write_atomic

    on_terminal = output is None and output_format == "text" and sys.stdout.isatty()
    how = terminal() if on_terminal else {}
    if repaired is None:
        text = importlib.import_module(f"batchnorm.doctor.output.{output_format}").render(found, **how)
    else:
        text = form_of_repair.render(dataclasses.replace(repaired, left=found), output_format, **how)
    if output is None:
        print_text(text)
    else:
        write_atomic(output, text.encode("utf-8", "backslashreplace"))
        click.echo(f"wrote {output}", err=True)
    if output is not None or output_format != "text":
        if repaired is not None:
            click.echo(form_of_repair.summary(repaired), err=True)
        click.echo(summary(found), err=True)
    if output_format == "concise" and found.not_run:
        click.echo(f"not run: {not_run(found.not_run)}", err=True)


def terminal() -> dict[str, Any]:
    """What the terminal can show."""
    color = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return {"width": min(shutil.get_terminal_size().columns, WIDEST), "color": color}
