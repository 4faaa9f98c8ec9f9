"""Files of torch.save, against what torch.load makes of them."""

import warnings
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

from batchnorm.doctor.read.open import read
from batchnorm.doctor.read.torch_globals import ALLOWED
from batchnorm.errors import DataError
from hostile_files import state_dict, tensor, torch_file, write_zip

FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu]
INTEGERS = [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64]
OTHERS = [torch.float16, torch.float32, torch.float64, torch.bfloat16, torch.bool, torch.complex32]
COMPLEX = [torch.complex64, torch.complex128]
SAVES = {
    "archive": {},
    "legacy": {"_use_new_zipfile_serialization": False},
    "protocol 4": {"pickle_protocol": 4},
}


def network() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=1e-3, momentum=0.02), nn.ReLU(), nn.BatchNorm2d(4))
    model(torch.randn(5, 3, 6, 6))
    return model


def as_numpy(value: torch.Tensor) -> np.ndarray:
    if value.dtype == torch.complex32:
        return value.to(torch.complex64).numpy()
    if value.dtype in (torch.bfloat16, *FLOAT8):
        return value.float().numpy()
    return value.resolve_conj().resolve_neg().numpy()


def assert_same(checkpoint, expected: dict[str, torch.Tensor]) -> None:
    assert list(checkpoint.tensors) == list(expected)
    for name, value in expected.items():
        stored = checkpoint.tensors[name]
        assert stored.shape == tuple(value.shape)
        assert f"torch.{stored.dtype}" == str(value.dtype)
        loaded = stored.load()
        assert loaded.shape == stored.shape
        np.testing.assert_array_equal(loaded, as_numpy(value), err_msg=name)


def every_code(dtype: torch.dtype) -> torch.Tensor:
    """A tensor in which every byte occurs in every place of an element."""
    size = torch.empty((), dtype=dtype).element_size()
    codes = torch.arange(256, dtype=torch.uint8).repeat_interleave(size)
    mixed = torch.randint(256, (256 * size,), dtype=torch.uint8)
    if dtype == torch.bool:
        return torch.tensor([True, False, True])
    return torch.cat([codes, mixed]).view(dtype)


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("save", SAVES)
def test_values_of_every_type_are_those_of_torch_load(tmp_path, save):
    tensors = {str(dtype): every_code(dtype) for dtype in [*FLOAT8, *INTEGERS, *OTHERS, *COMPLEX]}
    if save == "legacy":
        # the old format has no storage classes for the newer types
        tensors = {name: value for name, value in tensors.items() if value.dtype not in (*FLOAT8, *INTEGERS[5:])}
        del tensors["torch.complex32"]
    torch.save(tensors, tmp_path / "file", **SAVES[save])
    # names with dots are names of state dicts
    assert_same(read(tmp_path / "file"), tensors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_signalling_nan_is_a_value_and_no_warning(tmp_path, dtype):
    size = torch.empty((), dtype=dtype).element_size()
    codes = {2: [0x7C01, 0x7F81], 4: [0x7F800001, 0x7FA00000]}[size]
    value = torch.tensor(codes, dtype={2: torch.int16, 4: torch.int32}[size]).view(dtype)
    torch.save({"a": value}, tmp_path / "file")
    assert read(tmp_path / "file").tensors["a"].values().shape == (2,)


@pytest.mark.parametrize("save", SAVES)
def test_views_and_tied_tensors_are_read_at_their_place(tmp_path, save):
    base = torch.arange(60.0).reshape(3, 4, 5)
    complex_base = torch.randn(3, 4, dtype=torch.complex64)
    tensors = {
        "base": base,
        "tied": base,
        "transposed": base.permute(2, 0, 1),
        "slice": base[1:, ::2, 3],
        "last": base[2, 3, 4],
        "expanded": base[:1, :1, :1].expand(7, 2, 5),
        "empty": torch.empty(0, 4),
        "empty view": base[:0],
        "scalar": torch.tensor(3),
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "conjugated": complex_base.conj(),
        "negated": torch.randn(3, 4, dtype=torch.complex64).conj().imag,
        "parameter": nn.Parameter(torch.ones(2)),
    }
    torch.save(tensors, tmp_path / "file", **SAVES[save])
    assert_same(read(tmp_path / "file"), {name: value.detach() for name, value in tensors.items()})


@pytest.mark.parametrize("save", SAVES)
def test_layers_of_a_state_dict_have_their_values(tmp_path, save):
    model = network()
    torch.save(model.state_dict(), tmp_path / "model.pth", **SAVES[save])
    checkpoint = read(tmp_path / "model.pth")
    assert [(layer.path, layer.num_features, layer.sure) for layer in checkpoint.layers] == [
        ("1", 4, True),
        ("3", 4, True),
    ]
    for layer in checkpoint.layers:
        for role, value in model[int(layer.path)].state_dict().items():
            np.testing.assert_array_equal(layer.values(role), value.double().numpy())
    assert checkpoint.facts["state_dicts"] == [""]
    assert list(checkpoint.faults) == (["BN004"] if save == "legacy" else [])


def test_state_dicts_are_found_wherever_they_lie(tmp_path):
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(5, 3, 6, 6)).sum().backward()
    optimizer.step()
    content = {
        "epoch": 3,
        "model": model.state_dict(),
        "ema": {"module": model.state_dict()},
        "optimizer": optimizer.state_dict(),
        "history": [{"loss": 1.5}, {"best": torch.tensor(2.0)}],
    }
    torch.save(content, tmp_path / "model.ckpt")
    checkpoint = read(tmp_path / "model.ckpt")
    assert [layer.path for layer in checkpoint.layers] == ["model.1", "model.3", "ema.module.1", "ema.module.3"]
    assert checkpoint.facts["state_dicts"] == ["model", "ema.module"]
    assert "optimizer.state.0.exp_avg" in checkpoint.tensors
    assert checkpoint.tensors["history.1.best"].values() == 2


def test_version_of_the_module_says_whether_a_counter_is_expected(tmp_path):
    state = network().state_dict()
    del state["1.num_batches_tracked"]
    torch.save(state, tmp_path / "with.pth")
    torch.save(dict(state), tmp_path / "without.pth")
    assert "num_batches_tracked" in read(tmp_path / "with.pth").layers[0].expected
    assert "num_batches_tracked" not in read(tmp_path / "without.pth").layers[0].expected


def test_model_saved_whole_is_read_without_its_classes(tmp_path):
    model = network().eval()
    model.register_buffer("temporary", torch.ones(2), persistent=False)
    torch.save({"net": model}, tmp_path / "model.pt")
    checkpoint = read(tmp_path / "model.pt")
    assert_same(checkpoint, {f"net.{name}": value for name, value in model.state_dict().items()})
    first, second = checkpoint.layers
    assert (first.path, first.eps, first.momentum) == ("net.1", 1e-3, 0.02)
    assert (second.eps, second.momentum) == (1e-5, 0.1)
    assert checkpoint.facts["training"] == [False]
    assert "torch.nn.modules.batchnorm.BatchNorm2d" in [fault["where"] for fault in checkpoint.faults["BN001"]]


def test_model_saved_whole_tells_instance_normalization_and_untracked_layers_apart(tmp_path):
    model = nn.Sequential(
        nn.InstanceNorm2d(4, affine=True, track_running_stats=True), nn.BatchNorm2d(4, track_running_stats=False)
    )
    torch.save(model, tmp_path / "model.pt")
    checkpoint = read(tmp_path / "model.pt")
    (layer,) = checkpoint.layers
    assert (layer.path, layer.sure, layer.expected) == ("1", True, {"weight", "bias"})
    assert checkpoint.facts["relatives"] == {"0": "instance normalization"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_read(tmp_path):
    model = network()
    torch.jit.script(model).save(tmp_path / "model.pt")
    checkpoint = read(tmp_path / "model.pt")
    assert_same(checkpoint, dict(model.state_dict()))
    assert checkpoint.facts["torchscript"]
    assert checkpoint.faults == {}


def test_big_endian_files_are_read_as_torch_load_reads_them(tmp_path):
    tensors = {"f": torch.arange(5.0), "h": torch.arange(5).to(torch.bfloat16), "i": torch.arange(3)}
    torch.save(tensors, tmp_path / "little.pt")
    with zipfile.ZipFile(tmp_path / "little.pt") as little, zipfile.ZipFile(tmp_path / "big.pt", "w") as big:
        for name in little.namelist():
            data = little.read(name)
            if name.endswith("byteorder"):
                data = b"big"
            elif "/data/" in name and ".data" not in name:
                width = {"0": 4, "1": 2, "2": 8}[name[-1]]
                data = np.frombuffer(data, f"u{width}").byteswap().tobytes()
            big.writestr(name, data)
    assert_same(read(tmp_path / "big.pt"), torch.load(tmp_path / "big.pt"))
    assert_same(read(tmp_path / "big.pt"), tensors)


def test_tensors_without_plain_values_are_listed_and_not_read(tmp_path):
    with warnings.catch_warnings():
        # torch warns of its own sparse and quantized tensors
        warnings.simplefilter("ignore")
        tensors = {
            "coo": torch.eye(3).to_sparse(),
            "csr": torch.eye(3, dtype=torch.float64).to_sparse_csr(),
            "quantized": torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8),
            "meta": torch.empty(5, 2, device="meta"),
        }
        torch.save(tensors, tmp_path / "file.pt")
    checkpoint = read(tmp_path / "file.pt")
    shapes = {name: (value.shape, value.dtype) for name, value in checkpoint.tensors.items()}
    assert shapes == {
        "coo": ((3, 3), "float32"),
        "csr": ((3, 3), "float64"),
        "quantized": ((4,), "qint8"),
        "meta": ((5, 2), "float32"),
    }
    for name, problem in (("coo", "sparse"), ("csr", "sparse"), ("quantized", "quantized"), ("meta", "no values")):
        with pytest.raises(DataError, match=f"'{name}' .*{problem}"):
            checkpoint.tensors[name].load()
    assert checkpoint.faults == {}


def test_layers_of_meta_tensors_are_left_out_with_the_reason(tmp_path):
    with torch.device("meta"):
        state = nn.BatchNorm2d(3).state_dict()
    torch.save(state, tmp_path / "file.pt")
    checkpoint = read(tmp_path / "file.pt")
    assert checkpoint.layers == []
    assert checkpoint.facts["left_out"] == {"": "5 of its tensors cannot be read"}


def test_archive_without_its_end_gives_what_is_whole(tmp_path):
    state = {**network().state_dict(), "large": torch.randn(5000)}
    torch.save(state, tmp_path / "whole.pt")
    data = (tmp_path / "whole.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(data[:-6000])
    with pytest.raises((RuntimeError, OSError), match=r"central directory|Invalid argument"):
        torch.load(tmp_path / "cut.pt")
    checkpoint = read(tmp_path / "cut.pt")
    assert checkpoint.faults["BN004"][0]["lost_storages"] == 1
    with pytest.raises(DataError, match="'large' has a storage that is not in the file"):
        checkpoint.tensors.pop("large").load()
    del state["large"]
    assert_same(checkpoint, state)


def test_legacy_file_without_its_end_gives_what_is_whole(tmp_path):
    state = {**network().state_dict(), "large": torch.randn(5000)}
    torch.save(state, tmp_path / "whole.pt", _use_new_zipfile_serialization=False)
    data = (tmp_path / "whole.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(data[:-10_000])
    checkpoint = read(tmp_path / "cut.pt")
    assert [fault["problem"] for fault in checkpoint.faults["BN004"]][1:] == ["is cut off"]
    assert "large" in checkpoint.facts["not_read"]


def test_file_without_checksums_is_no_fault(tmp_path):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(network().state_dict(), tmp_path / "file.pt")
    finally:
        torch.serialization.set_crc32_options(before)
    checkpoint = read(tmp_path / "file.pt")
    assert checkpoint.faults == {}
    assert checkpoint.facts["checksums"] == {"checked": 0, "left": 0}


def test_names_that_weights_only_accepts_are_those_of_torch():
    from torch._weights_only_unpickler import _get_allowed_globals

    assert set(_get_allowed_globals()) == ALLOWED


def test_tensor_beyond_its_storage_is_not_read(tmp_path):
    pickle = state_dict(a=tensor("0", 4, [8], [1]), b=tensor("0", 4, [2], [1], offset=3), c=tensor("0", 4, [4], [1]))
    checkpoint = read(torch_file(tmp_path / "file.pt", pickle, ("archive/data/0", bytes(16))))
    assert [fault["where"] for fault in checkpoint.faults["BN003"]] == ["a", "b"]
    assert list(checkpoint.facts["not_read"]) == ["a", "b"]
    assert checkpoint.tensors["c"].values().tolist() == [0, 0, 0, 0]


def test_expanded_tensor_is_not_read_into_memory(tmp_path):
    pickle = state_dict(huge=tensor("0", 1, [10**15], [0]))
    checkpoint = read(torch_file(tmp_path / "file.pt", pickle, ("archive/data/0", bytes(4))))
    assert checkpoint.tensors["huge"].shape == (10**15,)
    with pytest.raises(DataError, match="'huge' is expanded"):
        checkpoint.tensors["huge"].load()


def test_storage_of_another_size_is_noted(tmp_path):
    pickle = state_dict(short=tensor("0", 8, [8], [1]), absent=tensor("1", 8, [8], [1]))
    checkpoint = read(torch_file(tmp_path / "file.pt", pickle, ("archive/data/0", bytes(16))))
    first, second = checkpoint.faults["BN003"]
    assert (first["where"], first["bytes"], first["expected"]) == ("archive/data/0", 16, 32)
    assert second["where"] == "archive/data/1"
    assert set(checkpoint.facts["not_read"]) == {"short", "absent"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 46830571\n", "git-lfs pointer .* 46830571"),
        (b"\n<!DOCTYPE html><html>", "web page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "web page"),
        (b"\x1f\x8b\x08\x00rest", "gzip"),
        (b"hello, this is text", "text that begins 'hello"),
        (b"\x00" * 5000, "4096 zero bytes"),
        (b"\x01\x02\x03\x04\x05\x06\x07\x08\x09", "begins with the bytes 01 02 03"),
        (b'{"a": 1}', "weight_map"),
        (b'{"a": ', "no valid JSON"),
        (b"GGUF\x03\x00\x00\x00", "GGUF"),
        (b"\x93NUMPY\x01\x00", "NumPy array"),
        (b"PK\x03\x04 and no more", "cut off after"),
        (b"\x80\x02}q\x00(X", "damaged before byte"),
    ],
)
def test_what_is_no_checkpoint_is_named_in_one_line(tmp_path, content, message):
    (tmp_path / "model.pth").write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path / "model.pth")
    assert "\n" not in str(caught.value)
    assert "model.pth" in str(caught.value)


def test_missing_files_and_folders_are_named(tmp_path):
    with pytest.raises(DataError, match=r"absent\.pt: cannot be opened"):
        read(tmp_path / "absent.pt")
    with pytest.raises(DataError, match="folder without a checkpoint"):
        read(tmp_path)
    (tmp_path / ".metadata").write_bytes(b"")
    with pytest.raises(DataError, match="dcp_to_torch"):
        read(tmp_path)


def test_other_archives_are_named(tmp_path):
    np.savez(tmp_path / "arrays.npz", a=np.ones(2))
    with pytest.raises(DataError, match="NumPy archive"):
        read(tmp_path / "arrays.npz")
    with pytest.raises(DataError, match=r"zip archive of 1 members \('model.pth'\).*unpack it first"):
        read(write_zip(tmp_path / "model.zip", [("model.pth", b"abc")]))


def test_folder_with_a_known_name_is_opened(tmp_path):
    torch.save(network().state_dict(), tmp_path / "pytorch_model.bin")
    assert [layer.path for layer in read(tmp_path).layers] == ["1", "3"]
