"""The tutorial about the checkpoint that lost its statistics: every file and command, in TensorFlow and PyTorch."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "docs" / "tutorials" / "lost-statistics.md"
DIGEST, NUMBER = re.compile(r"\b[0-9a-f]{12}\b"), re.compile(r"\d[\d.,e+-]*")


def words(text: str) -> list[str]:
    """Without digits, which differ between machines."""
    return NUMBER.sub("#", DIGEST.sub("#", text)).split()


@pytest.mark.parametrize("section", ["In TensorFlow", "In PyTorch"])
def test_accuracy_is_lost_with_the_statistics_and_comes_back_with_the_repair(section: str, tmp_path: Path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "NO_COLOR": "1", "OMP_NUM_THREADS": "1"}
    program = [sys.executable, str(TESTS / "tutorial_driver.py"), str(PAGE), section]
    run = subprocess.run(program, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    done = json.loads(run.stdout.splitlines()[-1])
    for command, shown, printed, _ in done:
        assert words(printed) == words(shown), command
    status = [status for command, *_, status in done if command.startswith("batchnorm")]
    assert status == ([1, 0, 0] if section == "In TensorFlow" else [0])
    printed = "".join(printed for *_, printed, _ in done)
    trained, broken, repaired = (float(number) for number in re.findall(r"([\d.]+)%", printed))
    assert trained > 80
    assert broken < trained - 20
    assert repaired > trained - 3
