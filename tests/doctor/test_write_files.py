"""Writers against the libraries of the formats: every dtype, bit for bit."""

from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch

from batchnorm.doctor.checkpoint import StoredTensor
from batchnorm.doctor.live_layers import stored
from batchnorm.doctor.read.open import read
from batchnorm.doctor.write.raw import digest, new_tensor, raw_bytes
from batchnorm.doctor.write.safetensors import CODES, write_safetensors
from batchnorm.doctor.write.torch import as_torch, write_torch
from batchnorm.errors import DataError

FLOAT8 = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")


def some(dtype: str) -> torch.Tensor:
    values = torch.tensor([[0.0, -0.0, 1.5], [-2.0, 0.25, 96.0]])
    return values.abs().to(getattr(torch, dtype)) if dtype.startswith("uint") else values.to(getattr(torch, dtype))


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", sorted(set(CODES) - {"float8_e8m0fnu"}))
def test_every_dtype_comes_back_from_safetensors_bit_for_bit(dtype: str, tmp_path: Path):
    tensors = {"x": some(dtype), "empty": torch.zeros(0, 3, dtype=getattr(torch, dtype))}
    safetensors.torch.save_file(tensors, source := tmp_path / "source.safetensors")
    write_safetensors(path := tmp_path / "new.safetensors", read(source).tensors, {"by": "a test"})
    back = safetensors.torch.load_file(path)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (back[name].dtype, back[name].shape, bits(back[name])) == (tensor.dtype, tensor.shape, bits(tensor))
    with safetensors.safe_open(path, "np") as file:
        assert file.metadata() == {"by": "a test"}


@pytest.mark.filterwarnings("ignore:ComplexHalf support:UserWarning")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "complex32", "bool", *FLOAT8])
def test_the_bytes_of_a_tensor_in_memory_are_its_own(dtype: str):
    tensor = some(dtype)
    assert raw_bytes(stored("x", tensor)) == bits(tensor)
    back = as_torch(stored("x", tensor))
    assert (back.dtype, back.shape, bits(back)) == (tensor.dtype, tensor.shape, bits(tensor))


def test_identical_tensors_give_identical_files(tmp_path: Path):
    tensors = {name: new_tensor(name, np.arange(3, dtype="f4")) for name in ("b", "a")}
    for name, order in (("one", ["a", "b"]), ("two", ["b", "a"])):
        write_safetensors(tmp_path / name, {key: tensors[key] for key in order}, {})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_values_that_cannot_be_read_have_no_digest_and_write_nothing(tmp_path: Path):
    def refuse() -> np.ndarray:
        raise DataError("is cut off")

    tensors = {"x": StoredTensor("x", (2,), "float32", refuse)}
    assert digest(tensors["x"]) is None
    with pytest.raises(DataError, match="is cut off"):
        write_safetensors(tmp_path / "new.safetensors", tensors, {})
    assert list(tmp_path.iterdir()) == []


def test_tensors_are_put_where_they_are_in_the_document(tmp_path: Path):
    document = {
        "models": [{"bn.weight": torch.ones(2), "bn.bias": torch.zeros(2)}],
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}},
        "epoch": 4,
    }
    new = {
        "models.0.bn.bias": new_tensor("", np.full(2, 7, "f4")),
        "models.0.bn.running_mean": new_tensor("", np.full(2, 8, "f4")),
        "optimizer.state.0.step": new_tensor("", np.float32(5)),
    }
    write_torch(path := tmp_path / "new.pt", document, new)
    back = torch.load(path)
    assert back["epoch"] == 4
    assert {name: value.tolist() for name, value in back["models"][0].items()} == {
        "bn.weight": [1, 1],
        "bn.bias": [7, 7],
        "bn.running_mean": [8, 8],
    }
    with pytest.raises(DataError, match=r"there is no place for 'nowhere\.x'"):
        write_torch(tmp_path / "other.pt", document, {"nowhere.x": new_tensor("", np.zeros(1))})
    assert not (tmp_path / "other.pt").exists()
