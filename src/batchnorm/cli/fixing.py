"""``batchnorm doctor --fix``: a repaired copy of a checkpoint, and a report of what was done."""

import contextlib
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from batchnorm.doctor.checkpoint import Checkpoint
    from batchnorm.doctor.finding import Finding
    from batchnorm.doctor.fixes.result import Repair

Command = TypeVar("Command", bound=Callable[..., Any])

SAFETENSORS = ".safetensors"
# what is left out of the name of the new file; TensorFlow's names go on behind a dot
ENDINGS = (".pt", ".pth", ".ckpt", ".bin", ".tar", SAFETENSORS, ".keras", ".h5", ".index", ".meta")
OPTIONS = (
    click.option("--fix", is_flag=True, help="Write a copy in which is repaired what keeps the evaluation output."),
    click.option("--unsafe-fixes", is_flag=True, help="Repair also what changes it, such as statistics."),
    click.option("--diff", is_flag=True, help="Show what --fix would change, and write nothing."),
    click.option(
        "--out",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="[default: NAME.fixed.safetensors] Without that ending, in the format of TARGET.",
    ),
    click.option("--force", is_flag=True, help="Overwrite an earlier --out."),
    click.option("--statistics", metavar="CODE", help="Function that returns {layer: (mean, variance)}, for --fix."),
    click.option("--eps-to", type=click.FloatRange(0), help="Convert variances to the eps the layers will have."),
    click.option("--eps-from", type=click.FloatRange(0), help="Their eps, where TARGET does not tell."),
    click.option("--batches", type=click.IntRange(1), help="Training steps, for layers that do not know."),
)
NAMES = ("unsafe_fixes", "out", "force", "statistics", "eps_to", "eps_from", "batches")


def fixing_options(command: Command) -> Command:
    """The options of a command that repairs, in the order of the help."""
    for option in reversed(OPTIONS):
        command = option(command)
    return command


def check_fixing(given: set[str], chosen: Mapping[str, Any], code: bool) -> None:
    """Refuse options that would do nothing."""
    fixing = chosen["fix"] or chosen["diff"]
    if fixing and code:
        raise click.UsageError("--fix writes a checkpoint, so TARGET must be one: name the code with --model.")
    useless = [name for name in NAMES if name in given]
    if useless and not fixing:
        raise click.UsageError(f"--{useless[0].replace('_', '-')} is for --fix or --diff.")
    if chosen["diff"] and {"out", "force"} & given:
        raise click.UsageError("--diff writes nothing: leave out --out and --force.")


def fixed(
    target: str,
    factory: str | None,
    data: str | None,
    batch_size: int,
    rules: tuple[Iterable[str], Iterable[str]],
    wanted: "Callable[[Finding], bool]",
    chosen: Mapping[str, Any],
) -> "Repair":
    """Repair, and write the file unless only the difference is wanted."""
    from batchnorm.cli.user_code import announce
    from batchnorm.doctor.fixes.save import check_path
    from batchnorm.doctor.read.open import read

    checkpoint = read(Path(target))
    out = chosen["out"] or default_out(Path(target))
    if not chosen["diff"]:
        check_path(checkpoint, out, chosen["force"])
    announce(*codes(factory, data, chosen["statistics"]))
    repaired = run(checkpoint, factory, data, batch_size, rules, wanted, chosen)
    if not repaired.comparison.changed:
        click.echo("nothing is repaired, so nothing is written", err=True)
    elif not chosen["diff"]:
        for path in repaired.save(out, force=chosen["force"]):
            click.echo(f"wrote {path}", err=True)
        if out.suffix == SAFETENSORS:
            tell_left_out(repaired)
    return repaired


def default_out(target: Path) -> Path:
    """Beside the target.

    Example:
        >>> [default_out(Path(name)).name for name in ("net.pt", "model.ckpt-100")]
        ['net.fixed.safetensors', 'model.ckpt-100.fixed.safetensors']
    """
    name = target.stem if target.suffix in ENDINGS else target.name
    return target.with_name(f"{name}.fixed{SAFETENSORS}")


def codes(factory: str | None, data: str | None, statistics: str | None) -> list[str]:
    """Whose code will run."""
    from batchnorm.cli.inputs import is_file

    return [code for code in (factory, None if data and is_file(data) else data, statistics) if code]


def run(
    checkpoint: "Checkpoint",
    factory: str | None,
    data: str | None,
    batch_size: int,
    rules: tuple[Iterable[str], Iterable[str]],
    wanted: "Callable[[Finding], bool]",
    chosen: Mapping[str, Any],
) -> "Repair":
    """Repair; what the user's code prints goes to standard error, and what it raises is one line."""
    from batchnorm.cli.examining import check_model
    from batchnorm.cli.inputs import open_inputs
    from batchnorm.cli.user_code import UserCodeError, build_model, place
    from batchnorm.doctor.repair import repair
    from batchnorm.errors import BatchNormError, DataError
    from batchnorm.report.text import clean

    statistics = None if chosen["statistics"] is None else given_statistics(chosen["statistics"])
    model = None if factory is None else build_model(factory)
    loader = None if data is None else open_inputs(data, batch_size)
    if model is not None and loader is not None and factory is not None:
        check_model(model, loader, factory)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            return repair(
                checkpoint,
                model=model,
                loader=loader,
                statistics=statistics,
                unsafe=chosen["unsafe_fixes"],
                select=rules[0],
                ignore=rules[1],
                wanted=wanted,
                eps_from=chosen["eps_from"],
                eps_to=chosen["eps_to"],
                batches=chosen["batches"],
            )
    except BatchNormError:
        raise
    except ValueError as error:
        raise DataError(f"{checkpoint.source}: {clean(str(error))}") from error
    except Exception as error:
        # raised in the user's code; anything else is a fault of ours
        if not place(error):
            raise
        raise UserCodeError(f"{factory}: {type(error).__name__}: {clean(str(error))}{place(error)}") from error


def given_statistics(target: str) -> Mapping[str, Any]:
    """What the function returns."""
    from batchnorm.cli.user_code import UserCodeError, failures, find

    function = find(target)
    if not callable(function):
        raise UserCodeError(f"{target} is of type {type(function).__name__}: expected a function")
    with failures(f"{target}()"):
        found = function()
    if not isinstance(found, Mapping):
        raise UserCodeError(f"{target}() returned a {type(found).__name__}, expected {{layer: (mean, variance)}}")
    return found


def tell_left_out(repaired: "Repair") -> None:
    """Which tensors of the source the file does not have."""
    from batchnorm.doctor.fixes.save import left_out
    from batchnorm.doctor.output.groups import counted

    reasons: dict[str, list[str]] = {}
    for name, why in left_out(repaired).items():
        reasons.setdefault(why, []).append(name)
    for why, names in reasons.items():
        click.echo(f"without {counted(len(names), 'tensor')}: {names[0]}, ... ({why})", err=True)
