"""How the command starts, and how each kind of failure ends: one line and its exit status."""

import importlib
import os
import subprocess
import sys
import types

import click
import pytest
from click.testing import CliRunner

import batchnorm as package
from batchnorm.cli import main
from batchnorm.errors import RunError
from commands import BATCHNORM, run_command


def line(capsys: pytest.CaptureFixture[str]) -> str:
    """Standard error, which must be one line; and nothing on standard output."""
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.endswith("\n")
    assert captured.err.count("\n") == 1, captured.err
    return captured.err[:-1]


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["--version"], ["--no-such-option"], ["no-such-command"]])
def test_help_and_mistakes_need_no_torch(arguments: list[str]):
    script = (
        "import sys; from batchnorm.cli.main import run; status = run(sys.argv[1:]);"
        "assert not {'torch', 'numpy', 'matplotlib', 'rich'} & set(sys.modules); sys.exit(status)"
    )
    done = run_command([sys.executable, "-c", script, *arguments])
    assert "AssertionError" not in done.stderr
    assert done.returncode == (2 if "no-such" in arguments[0] else 0)


def test_help_names_every_command():
    result = CliRunner().invoke(main.batchnorm, ["--help"])
    assert result.exit_code == 0
    for name, (_, _, summary) in main.COMMANDS.items():
        assert name in result.output
        assert summary.split()[0] in result.output
    assert "130 interrupted" in " ".join(result.output.split())


@pytest.mark.parametrize("name", main.COMMANDS)
def test_every_command_has_help_that_begins_as_its_summary(name: str):
    module, attribute, summary = main.COMMANDS[name]
    result = CliRunner().invoke(main.batchnorm, [name, "--help"])
    assert result.exit_code == 0
    assert getattr(importlib.import_module(module), attribute).help.split()[:4] == summary.split()[:4]


def test_the_version_is_the_packages():
    result = CliRunner().invoke(main.batchnorm, ["--version"])
    assert result.output == f"batchnorm, version {package.__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["reproduce"]])
def test_without_a_command_there_is_help(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    assert main.run(arguments) == 2
    assert "Commands:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["reprodce"], "batchnorm: No such command 'reprodce'."),
        (["reproduce", "cifar"], "batchnorm reproduce: No such command 'cifar'."),
        (["--verbose"], "batchnorm: No such option '--verbose'."),
        (["reproduce", "mnist", "--stepz", "3"], "batchnorm reproduce mnist: No such option '--stepz'."),
        (["reproduce", "mnist", "extra"], "batchnorm reproduce mnist: Got unexpected extra argument (extra)"),
        (["report"], "batchnorm report: Missing argument 'FOLDER'."),
    ],
)
def test_a_wrong_command_line_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert main.run(arguments) == 2
    text = line(capsys)
    assert text.replace("option: --", "option '--").startswith(message.rstrip(".'"))
    assert text.endswith("--help.")


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch):
    """A command ``failing`` that raises what it is given."""

    def install(error: BaseException) -> None:
        @click.command()
        def failing() -> None:
            raise error

        module = types.ModuleType("failing_command")
        module.failing = failing  # pyright: ignore[reportAttributeAccessIssue]
        monkeypatch.setitem(sys.modules, "failing_command", module)
        monkeypatch.setitem(main.COMMANDS, "failing", ("failing_command", "failing", "Fail."))

    return install


def test_an_error_on_purpose_is_one_line(command, capsys: pytest.CaptureFixture[str]):
    command(RunError("runs/a: exists already"))
    assert main.run(["failing"]) == 2
    assert line(capsys) == "batchnorm: runs/a: exists already"


def test_an_error_of_the_system_is_one_line(command, capsys: pytest.CaptureFixture[str]):
    command(OSError(28, "No space left on device", "runs/a/report.html"))
    assert main.run(["failing"]) == 2
    assert line(capsys) == "batchnorm: [Errno 28] No space left on device: 'runs/a/report.html'"


@pytest.mark.parametrize("error", [ZeroDivisionError("inside"), MemoryError("inside"), AssertionError("inside")])
def test_a_fault_of_ours_is_never_a_verdict(error: Exception, command, capsys: pytest.CaptureFixture[str]):
    command(error)
    assert main.run(["failing"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback")
    assert lines[-2].endswith("Error: inside")
    assert lines[-1] == "batchnorm: this is a fault of batchnorm; please report it with the lines above"


def test_ctrl_c_is_130(command):
    command(KeyboardInterrupt())
    assert main.run(["failing"]) == 130


def test_main_exits_with_the_status(command):
    command(RunError("x"))
    with pytest.raises(SystemExit, match="2"):
        main.main(["failing"])


@pytest.mark.parametrize("arguments", [["env"], ["env", "--json"]])
def test_a_reader_of_the_output_that_has_gone_is_no_verdict(arguments: list[str]):
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run([*BATCHNORM, *arguments], stdout=writer, stderr=subprocess.PIPE, timeout=60)
    finally:
        os.close(writer)
    assert done.returncode == 2
    assert done.stderr == b""
