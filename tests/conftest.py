"""What holds for every test: one seed, one thread per process, and NaN in memory that nobody has written yet."""

import os

import pytest
import torch

# pytest -n 2 runs one process per core, and threads that wait for each other spin: beside other work a training step on
# two threads takes up to 30 times as long. The variable is for the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def nan_in_uninitialized_memory():
    """``torch.empty`` returns NaN, so a kernel that forgets an element cannot pass."""
    filled = torch.utils.deterministic.fill_uninitialized_memory
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    yield
    torch.utils.deterministic.fill_uninitialized_memory = filled
    torch.use_deterministic_algorithms(deterministic)
