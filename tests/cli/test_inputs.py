"""Inputs: arrays of every kind of file in even batches, loaders from the beginning each time, one line otherwise."""

from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from batchnorm.cli.inputs import Samples, is_file, open_inputs
from batchnorm.cli.user_code import UserCodeError
from batchnorm.errors import DataError

VALUES = np.arange(21, dtype=np.float32).reshape(7, 3)

LOADERS = """
import torch

batches = [torch.ones(2, 3), torch.zeros(1, 3)]
number = 3

def generator():
    yield from batches

def fails():
    yield batches[0]
    raise ValueError("no more")

def needs(path):
    return batches

class Loader:
    def __iter__(self):
        return iter(batches)

    def __len__(self):
        return len(batches)
"""


@pytest.fixture
def loaders(tmp_path: Path) -> str:
    """A file with loaders."""
    path = tmp_path / "user_loaders.py"
    path.write_text(LOADERS)
    return str(path)


def write(path: Path, *names: str) -> str:
    """A file with the values, under all of these names."""
    arrays = {name: VALUES + i for i, name in enumerate(names)}
    tensors = {name: torch.from_numpy(value) for name, value in arrays.items()}
    if path.suffix == ".npy":
        np.save(path, VALUES)
    elif path.suffix == ".npz":
        np.savez(path, **arrays)
    elif path.suffix == ".safetensors":
        safetensors.torch.save_file(tensors, path)
    else:
        torch.save(tensors or torch.from_numpy(VALUES), path)
    return str(path)


@pytest.mark.parametrize("name", ["x.npy", "x.npz", "x.pt", "x.pth", "x.safetensors"])
def test_the_only_array_of_a_file_comes_in_batches(name: str, tmp_path: Path):
    names = () if name == "x.npy" else ("images",)
    found = open_inputs(write(tmp_path / name, *names), 4)
    assert found.batches == 2
    assert [len(batch) for batch in found] == [3, 4]
    assert torch.equal(torch.cat(list(found)), torch.from_numpy(VALUES))


@pytest.mark.parametrize("name", ["x.npz", "x.pt", "x.safetensors"])
def test_one_of_several_arrays_is_named(name: str, tmp_path: Path):
    source = write(tmp_path / name, "images", "labels")
    assert torch.equal(torch.cat(list(open_inputs(f"{source}:labels", 7))), torch.from_numpy(VALUES) + 1)
    with pytest.raises(DataError, match=rf"holds 'images', 'labels': name one array, as in .*{name}:images$"):
        open_inputs(source, 7)
    with pytest.raises(DataError, match=r"has no array 'label': it has 'images', 'labels'$"):
        open_inputs(f"{source}:label", 7)


def test_a_bare_tensor_is_an_array(tmp_path: Path):
    assert torch.equal(next(iter(open_inputs(write(tmp_path / "x.pt"), 7))), torch.from_numpy(VALUES))


@pytest.mark.parametrize("batch_size", [1, 2, 5, 38, 39, 40])
def test_batches_are_even_so_that_no_single_sample_is_left(batch_size: int):
    for samples in range(1, 40):
        values = torch.arange(samples)
        batches = list(Samples(values, batch_size))
        sizes = [len(batch) for batch in batches]
        assert max(sizes) <= batch_size
        assert max(sizes) - min(sizes) <= 1
        assert len(sizes) == -(-samples // batch_size)
        assert 1 not in sizes or samples == 1 or batch_size <= 2
        assert torch.equal(torch.cat(batches), values)


def test_an_array_without_samples_has_no_batch(tmp_path: Path):
    np.save(tmp_path / "x.npy", np.zeros((0, 3), dtype=np.float32))
    assert list(open_inputs(str(tmp_path / "x.npy"), 4)) == []


def test_bytes_of_another_machine_are_turned_round(tmp_path: Path):
    np.save(tmp_path / "x.npy", VALUES.astype(">f4"))
    assert torch.equal(next(iter(open_inputs(str(tmp_path / "x.npy"), 7))), torch.from_numpy(VALUES))


def test_a_batch_can_be_written_to_without_changing_the_file(tmp_path: Path):
    source = write(tmp_path / "x.npy")
    next(iter(open_inputs(source, 7))).zero_()
    assert np.array_equal(np.load(source), VALUES)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.float32(3), r"expected an array whose first axis counts samples, found a single number$"),
        (np.array(["a", "b"]), r"expected numbers, found <U1$"),
        (np.array([{}], dtype=object), r"is no array of numbers, or damaged \(.*object.*\)$"),
    ],
)
def test_an_array_that_is_no_input_is_one_line(value: np.ndarray, message: str, tmp_path: Path):
    np.save(tmp_path / "x.npy", value)
    with pytest.raises(DataError, match=message):
        open_inputs(str(tmp_path / "x.npy"), 4)


@pytest.mark.parametrize("name", ["x.npy", "x.npz", "x.pt", "x.safetensors"])
def test_a_damaged_or_missing_file_is_one_line(name: str, tmp_path: Path):
    path = tmp_path / name
    with pytest.raises(FileNotFoundError, match=name):
        open_inputs(str(path), 4)
    path.write_bytes(b"nothing that can be read")
    with pytest.raises(DataError, match=rf"{name} is no .*or damaged") as caught:
        open_inputs(str(path), 4)
    assert "\n" not in str(caught.value)


def test_an_array_of_a_file_with_one_has_no_name(tmp_path: Path):
    with pytest.raises(DataError, match=r"has no array 'a': it holds one array without a name$"):
        open_inputs(write(tmp_path / "x.npy") + ":a", 4)


@pytest.mark.parametrize("name", ["generator", "batches", "Loader"])
def test_a_loader_yields_what_the_users_code_yields_in_every_pass(name: str, loaders: str):
    loader = open_inputs(f"{loaders}:{name}", 64)
    for _ in range(2):
        first, second = loader
        assert torch.equal(first, torch.ones(2, 3))
        assert torch.equal(second, torch.zeros(1, 3))
    assert loader.batches == (None if name == "generator" else 2)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("number", r"py:number is of type int: expected a loader, or a function that returns one$"),
        ("missing", r"user_loaders.py has no 'missing'$"),
        ("fails", r"py:fails: ValueError: no more \(.*user_loaders.py:12\)$"),
        ("needs", r"py:needs: TypeError: needs\(\) missing 1 required positional argument: 'path'$"),
    ],
)
def test_a_loader_that_fails_is_one_line(name: str, message: str, loaders: str):
    with pytest.raises(UserCodeError, match=message):
        list(open_inputs(f"{loaders}:{name}", 64))


@pytest.mark.parametrize(
    ("source", "file"),
    [
        ("a.npy", True),
        ("a.npz:x", True),
        ("b/a.pt", True),
        ("a.safetensors:x.y", True),
        ("a.py:x", False),
        ("a:b", False),
    ],
)
def test_a_file_is_known_by_its_ending(source: str, file: bool):
    assert is_file(source) == file
