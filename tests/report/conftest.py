"""Finished runs with made-up numbers."""

from pathlib import Path

import pytest
from synthetic import write_run, write_sweep


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run")


@pytest.fixture
def sweep_folder(tmp_path: Path) -> Path:
    return write_sweep(tmp_path / "sweep")
