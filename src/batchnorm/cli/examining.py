"""What ``batchnorm doctor`` examines: a file, a model that the user's code builds, or the one in the other."""

import contextlib
import dataclasses
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from batchnorm.doctor.examine import Examination, examine, in_order
from batchnorm.errors import BatchNormError, DataError
from batchnorm.report.text import clean

CODE = re.compile(r"[\w.]+:[\w.]+|.+\.py:[\w.]+")


def is_code(target: str) -> bool:
    """Whether a target that is no file names code.

    Example:
        >>> is_code("package.module:make"), is_code("models/net.py:make"), is_code("model.ckpt-100")
        (True, True, False)
    """
    return not Path(target).exists() and CODE.fullmatch(target) is not None


def examine_file(
    target: str, factory: str | None, data: str | None, batch_size: int, select: Iterable[str], ignore: Iterable[str]
) -> Examination:
    """A file; rules that need a model look at the one that the factory builds, with the state of the file."""
    found = examine(target, select=select, ignore=ignore)
    waiting = [rule.code for rule in found.not_run]
    if factory is None or not waiting:
        return found
    announce_code(factory, data)
    model = loaded_model(Path(target), factory)
    more = examine_live(model, factory, data, batch_size, waiting, ())
    findings = in_order([*found.findings, *more.findings], found.layers)
    return dataclasses.replace(found, findings=findings, not_run=more.not_run)


def examine_code(
    target: str, data: str | None, batch_size: int, select: Iterable[str], ignore: Iterable[str]
) -> Examination:
    """The model that a factory builds, as it is."""
    from batchnorm.cli.user_code import build_model

    announce_code(target, data)
    found = examine_live(build_model(target), target, data, batch_size, select, ignore)
    return dataclasses.replace(found, source=target)


def announce_code(factory: str, data: str | None) -> None:
    from batchnorm.cli.inputs import is_file
    from batchnorm.cli.user_code import announce

    announce(factory, *([] if data is None or is_file(data) else [data]))


def loaded_model(path: Path, factory: str) -> Any:
    """The model with the state of the file, where it says which running statistics the file does not have.

    Raises:
        DataError: anything else does not fit.
    """
    from batchnorm.cli.checkpoints import read_checkpoint
    from batchnorm.cli.repair import load_repairable, tell_faults
    from batchnorm.cli.user_code import build_model

    held = read_checkpoint(path)
    model = build_model(factory)
    faults = load_repairable(model, held)[0]
    tell_faults(faults)
    if faults:
        click.echo("for rules that need a model, mean 0 and variance 1 stand in their place", err=True)
    return model


def examine_live(
    model: Any, factory: str, data: str | None, batch_size: int, select: Iterable[str], ignore: Iterable[str]
) -> Examination:
    """A model; what it prints goes to standard error, and what it raises is one line."""
    from batchnorm.cli.inputs import open_inputs
    from batchnorm.cli.user_code import UserCodeError, place

    inputs = None if data is None else open_inputs(data, batch_size)
    if inputs is not None:
        check_model(model, inputs, factory)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            return examine(model, inputs, select=select, ignore=ignore)
    except BatchNormError:
        raise
    except ValueError as error:
        raise DataError(f"{factory}: {clean(str(error))}") from error
    except Exception as error:
        # raised in the user's code; anything else is a fault of ours
        if not place(error):
            raise
        raise UserCodeError(f"{factory}: {type(error).__name__}: {clean(str(error))}{place(error)}") from error


def check_model(model: Any, inputs: Iterable[Any], factory: str) -> None:
    """Call the model once, in evaluation, before rules do.

    Raises:
        DataError: there is no data.
        UserCodeError: the model does not take them.
    """
    import torch

    from batchnorm.cli.user_code import run_model
    from batchnorm.statistics.measuring import evaluating

    with torch.no_grad(), evaluating(model):
        for item in inputs:
            run_model(model, item, factory)
            return
    raise DataError(f"{factory}: the data has no batches")
