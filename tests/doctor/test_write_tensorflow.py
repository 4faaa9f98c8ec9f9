"""A checkpoint is copied with tensors replaced or added; the source is not touched, nothing half written stays."""

from pathlib import Path

import numpy as np
import pytest
import torch

from batchnorm.doctor.read.crc32c import BYTES, crc32c
from batchnorm.doctor.read.tensorflow import read_tensorflow
from batchnorm.doctor.write import tensorflow
from batchnorm.doctor.write.tensorflow import to_bfloat16, write_tensorflow
from batchnorm.errors import DataError

FILES = Path(__file__).parent / "files"
TRAINABLE = FILES / "reference_trainable" / "model.ckpt"
MEAN, VAR = (f"encoder/BatchNorm/{name}" for name in ("moving_mean", "moving_variance"))
STATISTICS = {MEAN: np.array([1, 2, 3], "f4"), VAR: np.array([4, 5, 6], "f4")}


def test_the_copy_has_what_was_added_and_all_that_was_there(tmp_path: Path):
    before = {path: path.read_bytes() for path in TRAINABLE.parent.iterdir()}
    replaced = np.array([0.1, 0.2, 0.3])
    paths = write_tensorflow(TRAINABLE, tmp_path / "fixed", {**STATISTICS, "encoder/BatchNorm/beta": replaced})
    assert sorted(paths) == sorted(tmp_path.iterdir())
    copy, source = read_tensorflow(tmp_path / "fixed"), read_tensorflow(TRAINABLE)
    assert copy.tensors.keys() == source.tensors.keys() | STATISTICS.keys()
    for name, tensor in copy.tensors.items():
        expected = {**STATISTICS, "encoder/BatchNorm/beta": replaced.astype("f4")}.get(name)
        np.testing.assert_array_equal(tensor.load(), source.tensors[name].load() if expected is None else expected)
        assert tensor.dtype == "float32"
    layer = next(layer for layer in copy.layers if layer.path == "encoder/BatchNorm")
    assert layer.expected == layer.tensors.keys()
    assert copy.faults == {}
    assert {path: path.read_bytes() for path in TRAINABLE.parent.iterdir()} == before


def test_an_existing_file_is_never_overwritten(tmp_path: Path):
    (tmp_path / "fixed.meta").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match=r"fixed.meta exists; a checkpoint is never overwritten"):
        write_tensorflow(TRAINABLE, tmp_path / "fixed", STATISTICS)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"mine"]


@pytest.mark.parametrize("step", ["copyfile", "write_table", "sync_folder", "fsync"])
def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str):
    def fail(*_):
        raise OSError(28, "No space left on device")

    owner = {"copyfile": tensorflow.shutil, "fsync": tensorflow.os}.get(step, tensorflow)
    monkeypatch.setattr(owner, step, fail)
    with pytest.raises(OSError, match=r"No space left on device"):
        write_tensorflow(TRAINABLE, tmp_path / "fixed", STATISTICS)
    assert list(tmp_path.iterdir()) == []


REFUSED = {
    "another shape": ("norm/gamma", np.ones(4), r"'norm/gamma' has shape \(3,\), the replacement \(4,\)"),
    "another kind": ("norm/gamma", np.ones(3, "c16"), r"holds float32, the replacement complex128"),
    "no numbers": ("new", np.array(["a"]), r"TensorFlow checkpoints hold no <U1"),
    "no name": ("", np.ones(3), r"'' cannot be the name of a tensor"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_does_not_fit_is_refused(tmp_path: Path, fault: str):
    name, array, message = REFUSED[fault]
    with pytest.raises(DataError, match=message):
        write_tensorflow(TRAINABLE, tmp_path / "fixed", {name: array})
    assert list(tmp_path.iterdir()) == []


def test_nothing_can_be_added_to_a_checkpoint_of_objects(tmp_path: Path):
    with pytest.raises(DataError, match=r"'moving_mean' is not in this object-based checkpoint"):
        write_tensorflow(FILES / "keras3" / "ckpt", tmp_path / "fixed", {"moving_mean": np.ones(2, "f4")})


def test_bfloat16_is_rounded_as_torch_rounds():
    noise = np.random.default_rng(0).normal(0, 1, 1000) * 10.0 ** np.random.default_rng(1).integers(-44, 39, 1000)
    values = np.array([0, -0.0, np.inf, -np.inf, 3.4e38, 1e-45, 1.00390625, 1.01171875, *noise], "f4")
    expected = torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view("u2")
    np.testing.assert_array_equal(to_bfloat16(values), expected)
    assert np.isnan((to_bfloat16(np.array([np.nan], "f4")).astype("u4") << 16).view("f4")).all()


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        # RFC 3720, appendix B.4
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (b"", 0),
    ],
)
def test_crc32c_of_published_examples(data: bytes, expected: int):
    assert crc32c(data) == expected


@pytest.mark.parametrize("size", [8191, 8192, 8193, 100_003])
def test_crc32c_in_lanes_is_that_of_single_bytes(size: int):
    data = np.random.default_rng(size).integers(0, 256, size, np.uint8).tobytes()
    state = 0xFFFFFFFF
    for byte in data:
        state = BYTES[(state ^ byte) & 255] ^ state >> 8
    assert crc32c(data) == state ^ 0xFFFFFFFF
