"""Safetensors files, against what the library makes of them; and checkpoints in several files."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from batchnorm.doctor.read.open import read
from batchnorm.errors import DataError
from hostile_files import entry, write_safetensors

FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu]
DTYPES = [
    *(torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool, torch.complex64),
]


def as_numpy(value: torch.Tensor) -> np.ndarray:
    return (value.float() if value.dtype in (torch.bfloat16, *FLOAT8) else value).numpy()


def network() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4))
    model(torch.randn(5, 3, 6, 6))
    return model


def test_values_of_every_type_are_those_of_the_library(tmp_path):
    tensors = {str(dtype): (torch.randn(3, 4) * 9).to(dtype) for dtype in DTYPES}
    tensors |= {str(dtype): torch.arange(256, dtype=torch.uint8).view(dtype) for dtype in FLOAT8}
    tensors |= {"scalar": torch.tensor(3), "empty": torch.empty(0, 4)}
    save_file(tensors, tmp_path / "file", metadata={"format": "pt"})
    checkpoint = read(tmp_path / "file")
    assert checkpoint.format == "safetensors"
    assert checkpoint.facts == {"metadata": {"format": "pt"}}
    assert checkpoint.faults == {}
    expected = load_file(tmp_path / "file")
    assert set(checkpoint.tensors) == set(expected)
    for name, value in expected.items():
        stored = checkpoint.tensors[name]
        assert (stored.shape, f"torch.{stored.dtype}") == (tuple(value.shape), str(value.dtype))
        np.testing.assert_array_equal(stored.load(), as_numpy(value), err_msg=name)


def test_layers_have_their_values(tmp_path):
    model = network()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    checkpoint = read(tmp_path / "model.safetensors")
    assert [layer.path for layer in checkpoint.layers] == ["1", "3"]
    for layer in checkpoint.layers:
        for role, value in model[int(layer.path)].state_dict().items():
            np.testing.assert_array_equal(layer.values(role), value.double().numpy())


PAIR = {"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 8, 16)}


@pytest.mark.parametrize(
    ("header", "where", "problem", "unread"),
    [
        ({**PAIR, "b": entry("F32", [2], 4, 12)}, "b", "shares bytes", []),
        ({**PAIR, "b": entry("F32", [2], 12, 20)}, "b", "lies outside the file", ["b"]),
        ({**PAIR, "b": entry("F32", [3], 8, 16)}, "b", "another size than shape and type", ["b"]),
        ({**PAIR, "b": entry("F32", [2**62, 2**62], 8, 16)}, "b", "another size than shape and type", ["b"]),
        ({**PAIR, "b": entry("F31", [2], 8, 16)}, "b", "unknown type 'F31'", ["b"]),
        ({**PAIR, "b": entry("F32", [1], 12, 16)}, "b", "bytes before it belong to no tensor", []),
        ({**PAIR, "b": entry("F32", [1], 8, 12)}, "", "bytes behind the last tensor", []),
        ({**PAIR, "b": entry("F32", [-1], 8, 16)}, "b", "no valid type, shape and offsets", []),
        ({**PAIR, "b": entry("F32", [2.0], 8, 16)}, "b", "no valid type, shape and offsets", []),
        ({**PAIR, "b": entry("F32", [True], 8, 16)}, "b", "no valid type, shape and offsets", []),
        ({**PAIR, "b": 3}, "b", "no valid type, shape and offsets", []),
        ({**PAIR, "b": {"dtype": "F32"}}, "b", "no valid type, shape and offsets", []),
        (b'{"a":{"dtype":"U8","shape":[16],"data_offsets":[0,16]},"a":{}}', "a", "twice", []),
    ],
)
def test_contradictions_of_the_header_are_noted(tmp_path, header, where, problem, unread):
    checkpoint = read(write_safetensors(tmp_path / "file", header, bytes(16)))
    assert any(fault["where"] == where and problem in fault["problem"] for fault in checkpoint.faults["BN003"])
    assert list(checkpoint.facts.get("not_read", {})) == unread
    for name, stored in checkpoint.tensors.items():
        if name in unread:
            with pytest.raises(DataError, match=f"'{name}' "):
                stored.load()
        else:
            assert stored.load().shape == stored.shape


@pytest.mark.parametrize(
    ("header", "length", "message"),
    [
        (b'{"a":', None, "no valid JSON"),
        (b"{}", 10**9, "claims 1000000000 bytes"),
        (b"{" + b'"a":[' * 100_000, None, "no valid JSON"),
        (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", None, "no valid JSON"),
        (b'{"a":' + b"9" * 5000 + b"}", None, "no valid JSON"),
        (b'{"a":NaN}', None, "no valid JSON"),
        (b'{"a":"\xff"}', None, "no valid JSON"),
        (b"{" + b"[]," * 600_000 + b"}", None, "more parts"),
    ],
)
def test_broken_headers_are_refused_in_one_line(tmp_path, header, length, message):
    path = write_safetensors(tmp_path / "file", header, length=length)
    with pytest.raises(DataError, match=message) as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_packed_types_are_listed_and_not_read(tmp_path):
    checkpoint = read(write_safetensors(tmp_path / "file", {"a": entry("F4", [4], 0, 2)}, bytes(2)))
    assert checkpoint.faults == {}
    with pytest.raises(DataError, match="type F4"):
        checkpoint.tensors["a"].load()


def write_index(folder, weight_map) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_checkpoint_in_several_files_is_read_as_one(tmp_path):
    state = network().state_dict()
    first = {name: value for name, value in state.items() if name < "1.running_mean"}
    second = {name: value for name, value in state.items() if name not in first}
    save_file(first, tmp_path / "1.safetensors")
    torch.save(second, tmp_path / "2.bin")
    write_index(tmp_path, dict.fromkeys(first, "1.safetensors") | dict.fromkeys(second, "2.bin"))
    checkpoint = read(tmp_path)
    assert set(checkpoint.tensors) == set(state)
    assert [(layer.path, len(layer.tensors)) for layer in checkpoint.layers] == [("1", 5), ("3", 5)]
    assert checkpoint.faults == {}
    assert checkpoint.facts["shards"] == 2


def test_missing_file_of_an_index_is_noted(tmp_path):
    save_file(network().state_dict(), tmp_path / "1.safetensors")
    names = dict.fromkeys(network().state_dict(), "1.safetensors")
    write_index(tmp_path, {**names, "head.weight": "2.safetensors", "absent": "1.safetensors"})
    checkpoint = read(tmp_path / "model.safetensors.index.json")
    assert len(checkpoint.layers) == 2
    assert [fault["where"] for fault in checkpoint.faults["BN004"]] == ["2.safetensors", "head.weight", "absent"]


@pytest.mark.parametrize("file", ["../x", "/etc/passwd", "a/../../x", "C:\\x", "..\\x", "\\\\host\\x", "", "a\0b"])
def test_index_cannot_name_files_elsewhere(tmp_path, file):
    write_index(tmp_path, {"a": file})
    with pytest.raises(DataError, match="does not lie in its folder"):
        read(tmp_path)


EXAMINE = r"""
import re, sys, time
from pathlib import Path
from batchnorm.doctor.read.open import read
def peak():
    # of this process: ru_maxrss begins with that of its parent
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024
before, start = peak(), time.perf_counter()
layers = read(sys.argv[1]).layers
assert len(layers) == 2 and all(layer.values(role).size for layer in layers for role in layer.tensors)
print(time.perf_counter() - start, peak() - before)
assert "torch" not in sys.modules
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", ["safetensors", "torch"])
def test_a_large_file_takes_no_memory_and_no_torch(tmp_path, kind):
    # 1 GB as a hole of a sparse file for the one, 128 MB for the other, whose checksums are read
    path = tmp_path / "file"
    state = network().state_dict()
    if kind == "torch":
        torch.save({**state, "large": torch.zeros(1 << 25)}, path)
    else:
        at, header = 0, {}
        for name, value in state.items():
            kind_of_value = "I64" if value.dtype == torch.int64 else "F32"
            header[name] = entry(kind_of_value, value.shape, at, at + value.nbytes)
            at += value.nbytes
        header["large"] = entry("U8", [1 << 30], at, at + (1 << 30))
        write_safetensors(path, header)
        with open(path, "r+b") as file:
            file.truncate(path.stat().st_size + at + (1 << 30))
    result = subprocess.run([sys.executable, "-c", EXAMINE, str(path)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    seconds, megabytes = map(float, result.stdout.split())
    assert seconds < 3
    assert megabytes < 50
