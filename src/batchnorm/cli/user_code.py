"""Code that a command is pointed to: ``package.module:name`` or ``path/to/file.py:name``, and what it raises."""

import contextlib
import difflib
import functools
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import torch
from torch import Tensor, nn

from batchnorm.errors import BatchNormError
from batchnorm.report.text import clean

OURS = str(Path(__file__).parents[1])


class UserCodeError(BatchNormError):
    """Code that a command was pointed to cannot be imported, raised something, or is not what was expected."""


def announce(*targets: str) -> None:
    """Say whose code is about to run, before the first of it does."""
    for source in dict.fromkeys(target.rpartition(":")[0] for target in targets):
        if source:
            click.echo(f"running the code of {source}", err=True)


def build_model(target: str) -> nn.Module:
    """The model that a factory returns; a model itself will do."""
    found = find(target)
    if not isinstance(found, nn.Module):
        if not callable(found):
            raise UserCodeError(
                f"{target} is of type {type(found).__name__}: expected a function that returns the model"
            )
        with failures(f"{target}()"):
            found = found()
    if not isinstance(found, nn.Module):
        raise UserCodeError(f"{target}() returned something of type {type(found).__name__}, expected a torch.nn.Module")
    return found


def run_model(model: nn.Module, item: Any, target: str, device: torch.device | None = None) -> Any:
    """Call the model that a factory built on an item of a loader, an input or a tuple that begins with one."""
    input = item[0] if isinstance(item, (tuple, list)) else item
    input = input.to(device) if isinstance(input, Tensor) else input
    with failures(f"{target} on {described(input)}"):
        return model(input)


def described(input: Any) -> str:
    if not isinstance(input, Tensor):
        return f"a {type(input).__name__}"
    return f"an input of size {tuple(input.shape)} and type {str(input.dtype).removeprefix('torch.')}"


def find(target: str) -> Any:
    """What ``package.module:name`` or ``path/to/file.py:name`` stands for. This runs the module."""
    source, _, name = target.rpartition(":")
    if not source or not name:
        raise UserCodeError(f"{target!r} names no code: expected package.module:name or path/to/file.py:name")
    module = import_file(Path(source)) if source.endswith(".py") else import_module(source)
    try:
        return functools.reduce(getattr, name.split("."), module)
    except AttributeError:
        close = difflib.get_close_matches(name, dir(module), n=1)
        meant = f"; did you mean {close[0]!r}?" if close else ""
        raise UserCodeError(f"{source} has no {name!r}{meant}") from None


def import_module(name: str) -> ModuleType:
    """As ``python -m`` would: the current folder comes first."""
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    # a module that was written a moment ago is not in the caches of the import system
    importlib.invalidate_caches()
    try:
        with failures(f"importing {name}"):
            return importlib.import_module(name)
    except UserCodeError as error:
        missing = error.__cause__.name if isinstance(error.__cause__, ModuleNotFoundError) else None
        if missing is not None and f"{name}.".startswith(f"{missing}."):
            raise UserCodeError(f"there is no module {name!r}, installed or in {folder}") from error
        raise


def import_file(path: Path) -> ModuleType:
    """As ``python path/to/file.py`` would, under a name of its own: the modules beside the file can be imported."""
    if not path.is_file():
        raise UserCodeError(f"there is no file {path}")
    folder = str(path.parent.resolve())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    name = f"batchnorm_user_{path.stem}"
    earlier = sys.modules.get(name)
    if earlier is not None and earlier.__file__ == str(path.resolve()):
        return earlier
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up
    sys.modules[name] = module
    try:
        with failures(f"importing {path}"):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


@contextlib.contextmanager
def failures(what: str) -> Iterator[None]:
    """Whatever the code raises becomes one line that says what, and where; what it prints goes to standard error."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except BatchNormError:
        raise
    except SystemExit as error:
        raise UserCodeError(
            f"{what} ended the process ({error.code}){place(error)}: guard the script part by if __name__ == '__main__'"
        ) from error
    except Exception as error:
        text = clean(str(error))
        raise UserCodeError(f"{what}: {type(error).__name__}{': ' * bool(text)}{text}{place(error)}") from error


def place(error: BaseException) -> str:
    """Where it was raised: the innermost line that is neither installed nor ours."""
    lines = [frame for frame in traceback.extract_tb(error.__traceback__) if not is_foreign(frame.filename)]
    return f" ({lines[-1].filename}:{lines[-1].lineno})" if lines else ""


def is_foreign(path: str) -> bool:
    """Code of Python, of an installed package, or of this one."""
    installed = os.path.dirname(os.__file__)
    return path.startswith(("<", OURS, installed)) or "site-packages" in path
