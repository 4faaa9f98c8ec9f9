"""The readers and the writer against TensorFlow and Keras themselves, in one process of theirs."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from batchnorm.doctor.checkpoint import Layer
from batchnorm.doctor.read.open import read

HERE = Path(__file__).parent
STATISTICS = {"running_mean", "running_var"}
ALL = {"weight", "bias", *STATISTICS}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of files that TensorFlow and Keras made."""
    folder = tmp_path_factory.mktemp("tensorflow")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    program = [sys.executable, str(HERE / "make_tensorflow_files.py"), str(folder)]
    run = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def truth(made: Path) -> dict[str, dict[str, np.ndarray]]:
    """File -> tensor -> values, as TensorFlow reads them."""
    found: dict[str, dict[str, np.ndarray]] = {}
    with np.load(made / "truth.npz") as file:
        for key, value in file.items():
            name, _, tensor = key.partition("|")
            found.setdefault(name, {})[tensor] = value
    return found


def layers_of(path: Path) -> dict[str, Layer]:
    return {layer.path: layer for layer in read(path).layers}


@pytest.mark.parametrize("kind", ["reference", "resource"])
@pytest.mark.parametrize("variables", ["all", "trainable"])
def test_every_value_of_a_saver_is_read(made: Path, truth: dict, kind: str, variables: str):
    name = f"{kind}_{variables}"
    tensors = read(made / name).tensors
    # in two parts
    assert "embedding/table" in truth[name]
    assert truth[name].keys() | {"words"} == tensors.keys()
    for key in truth[name]:
        np.testing.assert_array_equal(tensors[key].load(), truth[name][key], err_msg=key)
    assert tensors["half"].dtype == "bfloat16"
    assert tensors["half"].load().tolist() == [1.5, -2.25]


@pytest.mark.parametrize("kind", ["reference", "resource"])
def test_the_graph_tells_what_a_saver_left_out(made: Path, kind: str):
    complete, trainable = layers_of(made / f"{kind}_all"), layers_of(made / f"{kind}_trainable")
    told = {path: (layer.eps, layer.momentum) for path, layer in complete.items()}
    assert told == {
        "encoder/batch_normalization": (0.002, 0.02),
        "encoder/BatchNorm": (1e-5, 0.1),
        "plain/batch_normalization": (0.003, 0.3),
        # evaluation alone, and a condition: nothing in them updates an average
        "tower/bn_eval": (0.004, None),
        "tower/bn_cond": (0.005, None),
    }
    assert trainable.keys() == complete.keys()
    for path, layer in complete.items():
        assert layer.tensors.keys() == layer.expected
        assert trainable[path].expected == layer.expected
        assert trainable[path].expected - trainable[path].tensors.keys() == STATISTICS
        assert (trainable[path].eps, trainable[path].sure) == (layer.eps, True)


@pytest.mark.parametrize("name", ["trained/ckpt", "trained_saved", "trained_export"])
def test_layers_of_keras_3_are_found_in_every_tensorflow_format(made: Path, truth: dict, name: str):
    layers = list(read(made / name).layers)
    assert [layer.path.rpartition("/")[2].rstrip("_0123456789") for layer in layers] == [
        "norm",
        "inner_bn",
        "batch_normalization",
    ]
    assert [set(layer.expected) for layer in layers] == [ALL, ALL - {"weight"}, STATISTICS]
    assert [layer.eps for layer in layers] == ([None] * 3 if "ckpt" in name else [1e-4, 1e-3, 1e-3])
    known = truth[name.partition("/")[0]]
    for layer in layers:
        assert layer.tensors.keys() == layer.expected
        for tensor in layer.tensors.values():
            np.testing.assert_array_equal(tensor.load(), known[tensor.name])


@pytest.mark.parametrize("name", ["trained.keras", "trained.h5"])
def test_layers_of_keras_3_are_the_same_in_its_own_formats(made: Path, name: str):
    own, other = read(made / name).layers, read(made / "trained" / "ckpt").layers
    by_roles = [{len(layer.expected): layer for layer in layers} for layers in (own, other)]
    assert by_roles[0].keys() == by_roles[1].keys() == {4, 3, 2}
    for count, layer in by_roles[0].items():
        for role in layer.expected:
            np.testing.assert_array_equal(layer.values(role), by_roles[1][count].values(role))


def test_bfloat16_of_keras_is_read_as_float32(made: Path):
    (layer,) = read(made / "half.keras").layers
    assert layer.tensors["running_mean"].dtype == "bfloat16"
    assert layer.values("running_mean").tolist() == [1.5, -300.0]


def test_tensorflow_restores_every_variable_of_what_we_wrote(made: Path, truth: dict):
    source, written, restored = truth["reference_trainable"], truth["written"], truth["restored"]
    added = {name for name in written if name.rpartition("/")[2] in ("moving_mean", "moving_variance")}
    assert len(added) == 10
    assert written.keys() == source.keys() | added
    changed = {"encoder/BatchNorm/beta": [7, 8, 9], "norm/gamma": [1, 1, 1]}
    for name in source:
        np.testing.assert_array_equal(written[name], changed.get(name, source[name]))
    assert added < restored.keys()
    for name, value in restored.items():
        np.testing.assert_array_equal(value, written[name])
    for layer in read(made / "written").layers:
        assert layer.tensors.keys() == layer.expected
