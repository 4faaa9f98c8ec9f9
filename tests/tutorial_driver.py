"""Runs a section of a tutorial in this process, whose folder is the working one: its files, then its commands.

    python tutorial_driver.py PAGE SECTION    prints JSON: [command, what the page shows, what it printed, status], ...

TensorFlow takes seconds to import, so everything shares one process, which is not that of the tests.
"""

import contextlib
import io
import json
import re
import runpy
import sys
from pathlib import Path

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"# (\w+\.py)\n")


def main(page: str, section: str) -> None:
    text = re.split(r"^## ", Path(page).read_text(), flags=re.MULTILINE)
    (part,) = [each for each in text if each.startswith(f"{section}\n")]
    blocks = BLOCK.findall(part)
    for kind, block in blocks:
        if kind == "python" and (file := FILE.match(block)):
            Path(file[1]).write_text(block)
    sys.path.insert(0, "")
    done = [
        [command, shown, *run(command.split())]
        for kind, block in blocks
        if kind == "console"
        for command, shown in (each.split("\n", 1) for each in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:])
    ]
    print(json.dumps(done))


def run(command: list[str]) -> tuple[str, int]:
    """What the command printed, and how it ended; of batchnorm also what went to standard error."""
    from batchnorm.cli import main

    printed = io.StringIO()
    program, *arguments = command
    if program == "batchnorm":
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            status = main.run(arguments)
        return printed.getvalue(), status
    assert program == "python", command
    sys.argv = arguments
    with contextlib.redirect_stdout(printed):
        runpy.run_path(arguments[0], run_name="__main__")
    return printed.getvalue(), 0


if __name__ == "__main__":
    main(*sys.argv[1:])
