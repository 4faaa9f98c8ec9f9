"""``batchnorm fold``."""

import contextlib
import importlib.util
import sys
from pathlib import Path

import click
from torch import Tensor, nn

from batchnorm.cli.checkpoints import SAFETENSORS, listing, read_checkpoint, torch_bytes, unwrapped
from batchnorm.cli.exports import ONNX, PROGRAM, onnx_bytes, program_bytes, safetensors_bytes
from batchnorm.cli.inputs import first_input, is_file
from batchnorm.cli.outputs import check_output
from batchnorm.cli.user_code import announce, build_model, failures
from batchnorm.errors import DataError, MissingExtraError, StatisticsError
from batchnorm.files import write_atomic
from batchnorm.report.text import clean
from batchnorm.statistics import load_state_dict
from batchnorm.surgery import fold as fold_layers


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--model", "factory", metavar="CODE", required=True, help="Function that builds the model.")
@click.option("--example", metavar="SHAPE|FILE|CODE", help="An input: its size as 2,3,224,224, a file, or a loader.")
@click.option("--out", type=click.Path(path_type=Path), help="[default: NAME.folded.EXT beside CHECKPOINT]")
@click.option("--force", is_flag=True, help="Overwrite an earlier file.")
def fold(checkpoint: Path, factory: str, example: str | None, out: Path | None, force: bool) -> None:
    """Fold a checkpoint's BN layers into their neighbours, and write the result.

    CHECKPOINT is a state_dict, alone or inside what a trainer saves (.pt, .pth, ...), or .safetensors, and must fit
    the model, running statistics too. What is written depends on how --out ends. .pt2: a program of torch.export,
    which runs without the code of the model. .onnx: one for other runtimes. Both need --example. Anything else: a
    state_dict, whose names are the model's, for the model with torch.nn.Identity in place of each folded layer.

    CODE is PACKAGE.MODULE:NAME or path/to/FILE.py:NAME. It is run, while reading CHECKPOINT runs nothing. FILE counts
    samples along the first axis; FILE:NAME is one of several arrays.

    Exit status: 0 written, 2 an error, 130 interrupted. The table says which layers were folded, or why not.
    """
    out = out or checkpoint.with_name(f"{checkpoint.stem}.folded{checkpoint.suffix}")
    if out.suffix in (PROGRAM, ONNX) and example is None:
        raise click.UsageError(f"{out.suffix} needs --example: the model is followed as it runs on an input.")
    if out.suffix == ONNX and importlib.util.find_spec("onnxscript") is None:
        raise MissingExtraError("to write .onnx takes other packages: pip install 'batchnorm[onnx]'")
    check_output(out, checkpoint, force)
    announce(factory, *([example] if example is not None and not is_file(example) else []))
    input = None if example is None else first_input(example)
    model = load_whole(checkpoint, factory)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            folded, changes = fold_layers(model, input)
    except ValueError as error:
        raise DataError(f"{factory}: {clean(str(error))}") from error
    with failures(f"exporting {factory}"):
        content = contents(out.suffix, folded, input)
    write_atomic(out, content)
    click.echo(f"wrote {out}: {how_to_load(out, model, folded)}", err=True)
    click.echo(str(changes))


def load_whole(path: Path, factory: str) -> nn.Module:
    """The model in evaluation mode, with a checkpoint that fits in every part."""
    held = read_checkpoint(path)
    model = build_model(factory)
    try:
        load_state_dict(model, unwrapped(held.state, model)[0])
    except StatisticsError as error:
        raise DataError(f"{path}: {error}; on the command line: batchnorm recalibrate {path}") from error
    except Exception as error:
        raise DataError(f"{path} does not fit the model: {clean(str(error))}") from error
    return model.eval()


def contents(suffix: str, folded: nn.Module, input: Tensor | None) -> bytes:
    """The file, by how its name ends."""
    if input is not None and suffix == PROGRAM:
        return program_bytes(folded, input)
    if input is not None and suffix == ONNX:
        return onnx_bytes(folded, input)
    state = folded.state_dict()
    return safetensors_bytes(state) if suffix == SAFETENSORS else torch_bytes(state)


def how_to_load(out: Path, model: nn.Module, folded: nn.Module) -> str:
    if out.suffix == PROGRAM:
        return f"run it with torch.export.load({out.name!r}).module()"
    if out.suffix == ONNX:
        return f"run it with onnxruntime.InferenceSession({out.name!r})"
    added = [name for name in folded.state_dict() if name not in model.state_dict()]
    biases = f" and with {listing(added)}" if added else ""
    return f"a state_dict of the model with torch.nn.Identity() in place of each folded layer{biases}"
