"""Keras' files: values and layers, what the configuration says, and a library that may die on what it is given."""

import importlib.util
import json
import shutil
import zipfile
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest

from batchnorm.doctor.checkpoint import Checkpoint, Layer
from batchnorm.doctor.read import hdf5, hdf5_child
from batchnorm.doctor.read.keras import read_keras
from batchnorm.doctor.read.keras_config import read_config
from batchnorm.doctor.read.open import read
from batchnorm.errors import DataError, MissingExtraError

FILES = Path(__file__).parent / "files"
STATISTICS = {"running_mean", "running_var"}
ALL = {"weight", "bias", *STATISTICS}
NAMES = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}


@pytest.fixture(scope="module", params=["keras2", "keras3"])
def version(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def truth(version: str) -> dict[str, np.ndarray]:
    with np.load(FILES / {"keras2": "keras2_truth.npz", "keras3": "truth.npz"}[version]) as file:
        return {key.partition("|")[2]: value for key, value in file.items() if key.startswith(f"{version}|")}


def three(checkpoint: Checkpoint) -> dict[str, Layer]:
    """The layers by their place in the model: the outer one; inside, one without scale, one with neither."""
    layers = sorted(checkpoint.layers, key=lambda layer: -len(layer.expected))
    order = dict(zip(("norm", "inner_bn", "bare"), layers, strict=True))
    if "weights" in checkpoint.format:
        order = {layer.path.rpartition("/")[2]: layer for layer in layers}
    return order


@pytest.mark.parametrize("kind", ["keras", "h5"])
def test_layers_have_the_values_of_keras_and_what_the_configuration_says(
    kind: str, version: str, truth: dict[str, np.ndarray]
):
    checkpoint = read(FILES / f"{version}.{kind}")
    layers = three(checkpoint)
    told = {name: (layer.eps, layer.momentum, set(layer.expected)) for name, layer in layers.items()}
    assert told == {
        "norm": (1e-4, 0.1, ALL),
        "inner_bn": (1e-3, 0.01, ALL - {"weight"}),
        "bare": (1e-3, 0.01, STATISTICS),
    }
    for name, layer in layers.items():
        assert (layer.sure, layer.num_features, layer.framework) == (True, 2, "keras")
        assert layer.tensors.keys() == layer.expected
        for role in layer.tensors:
            np.testing.assert_array_equal(layer.tensors[role].load(), truth[f"{name}/{NAMES[role]}"])
    assert checkpoint.facts["keras_version"]


def test_weights_without_configuration_have_roles_by_their_number(version: str, truth: dict[str, np.ndarray]):
    checkpoint = read(FILES / f"{version}.weights.h5")
    complete = next(layer for layer in checkpoint.layers if layer.tensors.keys() == ALL)
    for role, tensor in complete.tensors.items():
        np.testing.assert_array_equal(tensor.load(), truth[f"norm/{NAMES[role]}"])
    others = [layer for layer in checkpoint.layers if layer is not complete]
    # of three variables the first could be gamma or beta
    assert [layer.tensors.keys() for layer in others] == [STATISTICS, STATISTICS]
    means = sorted(layer.values("running_mean").tolist() for layer in others)
    assert means == sorted(truth[f"{name}/moving_mean"].tolist() for name in ("inner_bn", "bare"))


def test_paths_are_the_names_of_models_and_layers():
    assert [layer.path for layer in read(FILES / "keras3.keras").layers] == [
        "norm",
        "nested/inner_bn",
        "nested/batch_normalization",
    ]


def test_large_arrays_are_read_when_asked_for():
    checkpoint = read(FILES / "keras3.keras")
    kernel = checkpoint.tensors["layers/conv2d/vars/0"]
    with h5py.File(FILES / "keras3.weights.h5") as file:
        np.testing.assert_array_equal(kernel.load(), file["layers/conv2d/vars/0"])
    assert kernel.shape == (1, 1, 3, 2)


def write_h5(path: Path, **groups: list[np.ndarray]) -> Path:
    with h5py.File(path, "w") as file:
        for group, values in groups.items():
            for index, value in enumerate(values):
                file[f"layers/{group}/vars/{index}"] = value
    return path


def test_a_layer_that_lost_its_statistics_is_found_by_the_configuration(tmp_path: Path):
    path = tmp_path / "lost.keras"
    weights = write_h5(tmp_path / "w.h5", batch_normalization=[np.ones(3, "f4"), np.zeros(3, "f4")])
    item = {"class_name": "BatchNormalization", "config": {"name": "bn", "scale": True, "center": True}}
    absent = {**item, "build_config": {"input_shape": [None, 7]}, "config": {"name": "gone", "axis": -1}}
    config = {"class_name": "Sequential", "config": {"layers": [item, absent]}}
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", json.dumps(config))
        archive.write(weights, "model.weights.h5")
    found, gone = read(path).layers
    assert found.expected - found.tensors.keys() == STATISTICS
    assert (gone.tensors, gone.num_features, gone.expected) == ({}, 7, ALL)


def test_batch_renormalization_has_three_variables_more(tmp_path: Path):
    values = [np.full(2, index, "f4") for index in range(7)]
    (layer,) = read(write_h5(tmp_path / "w.h5", batch_normalization=values)).layers
    assert {role: layer.values(role)[0] for role in layer.tensors} == {
        "weight": 0,
        "bias": 1,
        "running_mean": 2,
        "running_var": 3,
    }


def test_nothing_outside_the_file_is_followed(tmp_path: Path):
    secret = np.arange(4, dtype="f4")
    (tmp_path / "secret.raw").write_bytes(secret.tobytes())
    write_h5(tmp_path / "other.h5", dense=[secret])
    path = tmp_path / "links.h5"
    with h5py.File(path, "w") as file:
        file["bn/bn/gamma:0"] = secret
        file["external"] = h5py.ExternalLink("other.h5", "/layers/dense")
        file["soft"] = h5py.SoftLink("/bn")
        file.create_dataset("raw", (4,), "f4", external=[(str(tmp_path / "secret.raw"), 0, 16)])
        layout = h5py.VirtualLayout((4,), "f4")
        layout[:] = h5py.VirtualSource("other.h5", "layers/dense/vars/0", (4,))
        file.create_virtual_dataset("virtual", layout)
        file["bn/itself"] = file["bn"]
    checkpoint = read(path)
    assert checkpoint.tensors.keys() == {"bn/bn/gamma:0"}
    assert {fault["where"]: fault["problem"] for fault in checkpoint.faults["BN003"]} == {
        "external": "is a link: not followed",
        "soft": "is a link: not followed",
        "raw": "is a dataset whose values lie in other files: not followed",
        "virtual": "is a dataset whose values lie in other files: not followed",
        "bn/itself": "is a group that contains itself, or stands in two places: not followed",
    }


def test_what_holds_no_numbers_is_listed_and_not_read(tmp_path: Path):
    with h5py.File(tmp_path / "texts.h5", "w") as file:
        file["words"] = ["a", "b"]
        file["nothing"] = h5py.Empty("f4")
    checkpoint = read(tmp_path / "texts.h5")
    assert checkpoint.facts["not_read"] == {"nothing": "holds no numbers", "words": "holds no numbers"}
    with pytest.raises(DataError, match=r"'words' holds no numbers"):
        checkpoint.tensors["words"].load()


def test_a_chunk_that_expands_to_gigabytes_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    packer = zlib.compressobj()
    # after a full flush the same bytes expand again and again
    first, again = (packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH) for _ in range(2))
    with h5py.File(tmp_path / "bomb.h5", "w") as file:
        bomb = file.create_dataset("bn/gamma", (100,), "f8", chunks=(100,), compression="gzip")
        bomb.id.write_direct_chunk((0,), first + again * 4000)
    assert (tmp_path / "bomb.h5").stat().st_size < 6 << 20
    monkeypatch.setattr(hdf5, "CHILD_MEMORY", 1 << 29)
    with pytest.raises(DataError, match=r"bomb.h5: HDF5 cannot be read: ") as error:
        read(tmp_path / "bomb.h5")
    assert "\n" not in str(error.value)


CHILDREN = {
    "import os; os.kill(os.getpid(), 11)": r"died of signal 11",
    "import os; os._exit(3)": r"ended with 3",
    "while True: pass": r"could not be read in 1 s: damaged, or made to take long",
}


@pytest.mark.parametrize("program", CHILDREN)
def test_whatever_happens_to_the_child_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str):
    script = tmp_path / "child.py"
    script.write_text(program)
    monkeypatch.setattr(hdf5_child, "__file__", str(script))
    monkeypatch.setattr(hdf5, "PATIENCE", 1)
    with pytest.raises(DataError, match=CHILDREN[program]):
        read(FILES / "keras3.h5")


def test_the_child_cannot_take_more_memory_than_its_limit(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hdf5, "CHILD_MEMORY", 1 << 25)
    with pytest.raises(DataError, match=r"keras3.h5: HDF5 cannot be read: "):
        read(FILES / "keras3.h5")


def test_without_h5py_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match=r"needs h5py. Try: pip install 'batchnorm\[keras\]'"):
        read(FILES / "keras3.h5")


def archive(path: Path, config: str | bytes, **options: int) -> Path:
    with zipfile.ZipFile(path, "w") as target:
        target.writestr("config.json", config, **options)
        target.write(FILES / "keras3.weights.h5", "model.weights.h5")
    return path


def nested(depth: int) -> str:
    config: dict = {"class_name": "Sequential", "config": {"layers": []}}
    for _ in range(depth):
        config = {"class_name": "Sequential", "config": {"layers": [config]}}
    return json.dumps(config)


CONFIGS = {
    "no JSON": ("{", r"its Keras configuration cannot be read"),
    "JSON without end": ("[" * 100_000, r"its Keras configuration cannot be read"),
    "models in models": (nested(70), r"cannot be read: models nested deeper than 64"),
    "an endless number": ('{"config": ' + "9" * 5000 + "}", r"cannot be read: Exceeds the limit"),
}


@pytest.mark.parametrize("fault", CONFIGS)
def test_a_configuration_that_cannot_be_is_refused(tmp_path: Path, fault: str):
    config, message = CONFIGS[fault]
    with pytest.raises(DataError, match=message):
        read_keras(archive(tmp_path / "model.keras", config))


@pytest.mark.parametrize("config", ["[]", "1", '{"config": []}', '{"config": {"layers": [1, null, {"config": 3}]}}'])
def test_a_configuration_of_another_form_has_no_layers(config: str):
    assert read_config(config, "a file") == []


@pytest.mark.parametrize(
    "values",
    [
        '{"epsilon": NaN}',
        '{"epsilon": 1e999}',
        '{"epsilon": true}',
        '{"epsilon": "x"}',
        '{"epsilon": 1' + "0" * 99 + "}",
    ],
)
def test_numbers_of_a_configuration_that_are_none_are_not_known(values: str):
    (item,) = read_config('{"class_name": "BatchNormalization", "config": ' + values + "}", "a file")
    assert (item.declared.eps, item.declared.momentum) == (None, None)


def test_an_archive_that_expands_is_refused(tmp_path: Path):
    bomb = archive(tmp_path / "bomb.keras", bytes(1 << 26), compress_type=zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < 200_000
    with pytest.raises(DataError, match=r"'config.json' has 67,108,864 bytes, more than any model's"):
        read_keras(bomb)


def test_compressed_weights_are_refused(tmp_path: Path):
    path = tmp_path / "packed.keras"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        target.writestr("config.json", "{}")
        target.write(FILES / "keras3.weights.h5", "model.weights.h5")
    with pytest.raises(DataError, match=r"model.weights.h5 is compressed or encrypted, which Keras never does"):
        read_keras(path)


def test_a_changed_configuration_is_refused(tmp_path: Path):
    path = tmp_path / "changed.keras"
    shutil.copy(FILES / "keras3.keras", path)
    path.write_bytes(path.read_bytes().replace(b'"momentum": 0.9,', b'"momentum": 0.1,'))
    with pytest.raises(DataError, match=r"damaged: 'config.json' does not have the checksum of the archive"):
        read_keras(path)


def test_an_archive_without_weights_is_refused(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "empty.keras", "w") as target:
        target.writestr("config.json", "{}")
    with pytest.raises(DataError, match=r"expected a Keras archive with config.json and model.weights.h5"):
        read_keras(tmp_path / "empty.keras")
