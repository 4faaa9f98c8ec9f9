"""Several processes train what one would, stop together, continue with the same bits, and notice each other's end."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from batchnorm.errors import RunError
from batchnorm.experiments.distributed import join_team, usable_device
from batchnorm.experiments.training import read_rows

SCRIPT = Path(__file__).with_name("team_script.py")


def arguments(folder: Path, accumulate: int = 1, dropout: float = 0.0, stop_at: int = 0) -> list[str]:
    return [str(SCRIPT), str(folder), str(accumulate), str(dropout), str(stop_at)]


def by_torchrun(folder: Path, **settings: float) -> int:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command + arguments(folder, **settings), env=environment, capture_output=True, timeout=100
    ).returncode


def alone(folder: Path, **settings: float) -> int:
    return subprocess.run([sys.executable, *arguments(folder, **settings)], capture_output=True, timeout=60).returncode


def rows(folder: Path) -> list[dict]:
    return list(read_rows(folder / "shared.jsonl"))


def folders(tmp_path: Path, *names: str) -> list[Path]:
    made = [tmp_path / name for name in names]
    for folder in made:
        folder.mkdir()
    return made


def test_two_processes_take_the_steps_of_one_that_accumulates_their_batches(tmp_path: Path):
    two, one = folders(tmp_path, "two", "one")
    assert by_torchrun(two) == 0
    assert alone(one, accumulate=2) == 0
    for ours, expected in zip(rows(two), rows(one), strict=True):
        assert ours["step"] == expected["step"]
        assert ours["seen"] == expected["seen"] == 12 * ours["step"]
        for weights, others in zip(ours["weights"], expected["weights"], strict=True):
            torch.testing.assert_close(torch.tensor(weights), torch.tensor(others), rtol=1e-12, atol=1e-12)


def test_a_stop_that_one_process_is_asked_for_stops_all_and_resumes_bit_for_bit(tmp_path: Path):
    whole, stopped = folders(tmp_path, "whole", "stopped")
    assert by_torchrun(whole, dropout=0.5) == 0
    assert by_torchrun(stopped, dropout=0.5, stop_at=7) != 0
    state = torch.load(stopped / "shared.checkpoint", weights_only=True)
    assert state["step"] == 7
    assert len(state["generators"]) == 2
    assert by_torchrun(stopped, dropout=0.5) == 0
    assert rows(stopped) == rows(whole)


def test_when_a_process_dies_the_other_says_so_and_ends(tmp_path: Path):
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
    shared = os.environ | {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "DIES": "1:5"}
    processes = [
        subprocess.Popen(
            [sys.executable, *arguments(tmp_path)],
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [2, 3]
    (line,) = [line for line in outputs[0][1].splitlines() if line.startswith("RunError: ")]
    assert "process 0 lost another process of the run" in line
    assert "--resume" in line


def test_one_process_is_a_team_too():
    with join_team() as team:
        assert (team.rank, team.world_size, team.is_first) == (0, 1, True)
        assert team.any(True)
        assert not team.any(False)
        assert team.sum(torch.tensor([1.5, 2])).tolist() == [1.5, 2.0]
        assert team.gather("x") == ["x"]
        model = torch.nn.Linear(1, 1)
        assert team.replicate(model) is model


def test_device_that_is_not_there_is_named():
    with pytest.raises(RunError, match="device 'nonsense' cannot be used here"):
        usable_device("nonsense")
