"""TensorFlow's files are read without TensorFlow: values, layers, and what the graph says is missing."""

import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

from batchnorm.doctor.checkpoint import Checkpoint, Layer
from batchnorm.doctor.read.bundle import read_bundle
from batchnorm.doctor.read.crc32c import crc32c, masked
from batchnorm.doctor.read.leveldb import FOOTER, MAGIC, read_table
from batchnorm.doctor.read.open import read
from batchnorm.doctor.read.saved_model import read_saved_model
from batchnorm.doctor.read.slices import slice_key
from batchnorm.doctor.read.tensorflow import read_tensorflow
from batchnorm.doctor.read.variables import is_clear
from batchnorm.doctor.read.wire import Budget, Message, write_varint
from batchnorm.doctor.write.leveldb import write_table
from batchnorm.doctor.write.tensorflow import delimited, field
from batchnorm.errors import DataError

FILES = Path(__file__).parent / "files"
ALL, TRAINABLE = FILES / "reference_all" / "model.ckpt", FILES / "reference_trainable" / "model.ckpt"
STATISTICS = {"running_mean", "running_var"}


@pytest.fixture(scope="module")
def truth() -> dict[str, np.ndarray]:
    with np.load(FILES / "truth.npz") as file:
        return dict(file)


def by_path(checkpoint: Checkpoint) -> dict[str, Layer]:
    return {layer.path: layer for layer in checkpoint.layers}


def missing(layer: Layer) -> set[str]:
    return set(layer.expected - layer.tensors.keys())


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The prefix of a copy of the checkpoint of trainable variables."""
    shutil.copytree(TRAINABLE.parent, tmp_path / "copy")
    return tmp_path / "copy" / "model.ckpt"


def rewrite(prefix: Path, change: dict[bytes, bytes | None]) -> None:
    """Replace records of an index; its checksums are right afterwards. None removes."""
    path = Path(f"{prefix}.index")
    records = {**dict(read_table(path.read_bytes(), path)), **change}
    path.write_bytes(write_table([(key, value) for key, value in sorted(records.items()) if value is not None]))


@pytest.mark.parametrize("name", ["reference_all", "reference_trainable", "module", "keras3"])
def test_values_are_those_that_tensorflow_reads(name: str, truth: dict[str, np.ndarray]):
    tensors = read(FILES / name).tensors
    expected = {key.partition("|")[2]: value for key, value in truth.items() if key.startswith(f"{name}|")}
    if name == "keras3":
        expected = {key: value for key, value in expected.items() if key in tensors}
    assert len(expected) > 3
    for key, value in expected.items():
        assert tensors[key].shape == value.shape
        np.testing.assert_array_equal(tensors[key].load(), value)


def test_a_saver_of_trainable_variables_leaves_out_the_statistics_that_the_graph_has():
    layers = by_path(read_tensorflow(TRAINABLE))
    assert layers.keys() == {"encoder/batch_normalization", "encoder/BatchNorm"}
    for layer in layers.values():
        assert (missing(layer), layer.sure, layer.num_features) == (STATISTICS, True, 3)
    assert layers["encoder/BatchNorm"].tensors.keys() == {"bias"}
    assert all(not missing(layer) for layer in read_tensorflow(ALL).layers)


def test_epsilon_and_momentum_come_from_the_graph():
    layers = by_path(read_tensorflow(TRAINABLE))
    found = {path: (layer.eps, layer.momentum) for path, layer in layers.items()}
    assert found == {"encoder/batch_normalization": (0.002, 0.02), "encoder/BatchNorm": (1e-5, 0.1)}


def test_without_a_graph_names_tell_and_a_vague_name_is_not_sure(copy: Path):
    Path(f"{copy}.meta").unlink()
    layers = by_path(read_tensorflow(copy))
    assert {path: layer.sure for path, layer in layers.items()} == {
        "encoder/batch_normalization": True,
        "encoder/BatchNorm": True,
        "norm": False,
    }
    assert all(missing(layer) == STATISTICS and layer.eps is None for layer in layers.values())


@pytest.mark.parametrize(
    ("scope", "clear"),
    [
        *((name, True) for name in ("bn", "BN_1", "bn2a_branch1", "conv1_bn", "bnorm", "batch_norm", "batchnorm2d")),
        *((name, False) for name in ("layer_norm", "LayerNorm_2", "group_norm", "ln_1", "norm", "bnd", "conv", "")),
        ("bn/conv", False),
    ],
)
def test_which_names_say_batch_normalization(scope: str, clear: bool):
    assert is_clear(scope) is clear


@pytest.mark.parametrize("scope", ["Adam/m/bn", "optimizer/bn", "RMSprop_1/bn"])
def test_slots_of_optimizers_are_no_layers(copy: Path, scope: str):
    Path(f"{copy}.meta").unlink()
    record = dict(read_table(Path(f"{copy}.index").read_bytes(), copy))[b"norm/gamma"]
    empty = delimited(2, delimited(2, field(1, 0)))
    rewrite(copy, {f"{scope}/{name}".encode(): field(1, 1) + empty for name in ("gamma", "beta")})
    assert record
    assert not any(scope in layer.path for layer in read_tensorflow(copy).layers)


def test_a_saved_model_tells_epsilon_through_its_functions_even_where_it_is_the_default():
    layers = by_path(read_saved_model(FILES / "module"))
    assert {path: layer.eps for path, layer in layers.items()} == {
        "first": 1e-4,
        "second": 7e-3,
        # two layers of one name: which epsilon belongs to which is not known by name
        "twin": None,
        "fourth": None,
    }
    assert layers["twin"].tensors["weight"].name.startswith("third/")
    assert layers["fourth"].tensors["weight"].name.startswith("fourth/")


def test_objects_tell_the_layers_and_full_names_their_paths(truth: dict[str, np.ndarray]):
    layers = by_path(read_tensorflow(FILES / "keras3" / "ckpt"))
    assert layers.keys() == {"sequential/norm", "sequential/nested/inner_bn", "sequential/nested/batch_normalization"}
    assert layers["sequential/nested/inner_bn"].expected == {"bias", *STATISTICS}
    mean = layers["sequential/norm"].values("running_mean")
    np.testing.assert_array_equal(mean, truth["keras3|norm/moving_mean"])


@pytest.mark.parametrize("name", ["", "checkpoint", "model.ckpt", "model.ckpt.index", "model.ckpt.meta"])
def test_a_checkpoint_is_found_by_any_of_its_files(name: str):
    assert len(read(FILES / "reference_all" / name).layers) == 2


def test_a_folder_without_a_state_file_is_read_if_it_holds_one_checkpoint(copy: Path):
    assert len(read(copy.parent).layers) == 2
    shutil.copy(f"{copy}.index", copy.parent / "other.index")
    with pytest.raises(DataError, match=r"no file checkpoint.index"):
        read(copy.parent)


def test_the_state_file_names_only_checkpoints_beside_it(copy: Path):
    state = copy.parent / "checkpoint"
    state.write_text('model_checkpoint_path: "/somewhere/else/model.ckpt"\n')
    assert len(read_tensorflow(state).layers) == 2
    state.write_text('model_checkpoint_path: "../../gone"\n')
    with pytest.raises(DataError, match=r"it names 'gone', but there is no such .index file beside it"):
        read_tensorflow(state)
    state.write_text("nothing\n")
    with pytest.raises(DataError, match=r"expected a line 'model_checkpoint_path"):
        read_tensorflow(state)


def test_a_changed_byte_of_the_values_is_a_fault_of_the_container(copy: Path):
    data = Path(f"{copy}.data-00000-of-00001")
    content = bytearray(data.read_bytes())
    content[5] ^= 1
    data.write_bytes(content)
    faults = read_tensorflow(copy).faults["BN002"]
    assert [fault["where"] for fault in faults] == ["encoder/BatchNorm/beta"]


def test_nothing_of_tensorflow_is_imported():
    from test_imports import modules_after

    loaded = modules_after(
        f"from batchnorm.doctor.read.tensorflow import read_tensorflow; read_tensorflow({str(ALL)!r})"
    )
    assert not loaded & {"tensorflow", "keras", "google", "h5py", "torch"}


def entry(dtype: int = 1, shape: tuple[int, ...] = (3,), **numbers: int) -> bytes:
    """A record of the index as TensorFlow writes it, or not."""
    dimensions = b"".join(delimited(2, field(1, size & (1 << 64) - 1)) for size in shape)
    given = {"shard": 0, "offset": 0, "size": 12, **numbers}
    places = zip((3, 4, 5), given.values(), strict=True)
    parts = [field(1, dtype), delimited(2, dimensions), *(field(number, v & (1 << 64) - 1) for number, v in places)]
    return b"".join(parts)


BAD_RECORDS = {
    "a size that is not the shape's": (entry(shape=(4,)), r"has 12 bytes, which is not what shape \(4,\) of float32"),
    "a huge shape": (entry(shape=(1 << 62, 1 << 62)), r"which is not what shape"),
    "a negative size": (entry(shape=(-1,)), r"has shape \(-1,\)"),
    "a negative offset": (entry(offset=-12), r"has no place in the data files"),
    "a shard that is not there": (entry(shard=7), r"has no place in the data files"),
    "an end behind the file": (entry(offset=1 << 40), r"truncated: .* ends at byte 1,099,511,627,788, the file at 60"),
    "bytes of another tensor": (entry(offset=4), r"shares bytes with another tensor"),
    "too many dimensions": (entry(shape=(1,) * 40), r"has shape \(1, 1"),
    "a number that does not end": (b"\x08" + b"\xff" * 20, r"a variable-length number at byte 1 does not end"),
    "a field longer than the record": (b"\x12\x7f\x00", r"a field of 127 bytes where 1 are left"),
    "a field of an unknown kind": (b"\x0b", r"protobuf has no field of kind 3"),
    "a number where a message should be": (field(2, 5), r"protobuf field 2 is a number, expected bytes"),
}


@pytest.mark.parametrize("fault", BAD_RECORDS)
def test_an_index_that_lies_is_refused(copy: Path, fault: str):
    record, message = BAD_RECORDS[fault]
    rewrite(copy, {b"x": record})
    with pytest.raises(DataError, match=message) as error:
        read_tensorflow(copy)
    assert "\n" not in str(error.value)


def partitioned(*slices: tuple[int, int], shape: tuple[int, ...] = (4,)) -> bytes:
    """A record that lists slices by start and length of the first dimension."""
    parts = (delimited(7, delimited(1, field(1, start) + field(2, length))) for start, length in slices)
    return entry(shape=shape, size=0) + b"".join(parts)


HALVES = {slice_key(b"x", [(start, 2)]): entry(shape=(2,), offset=60 + 4 * start, size=8) for start in (0, 2)}


def with_values(prefix: Path) -> None:
    with open(f"{prefix}.data-00000-of-00001", "ab") as file:
        file.write(np.arange(4, dtype="f4").tobytes())


def test_a_partitioned_tensor_is_put_together(copy: Path):
    with_values(copy)
    rewrite(copy, {b"x": partitioned((0, 2), (2, 2)), **HALVES})
    tensors = read_tensorflow(copy).tensors
    assert tensors["x"].load().tolist() == [0, 1, 2, 3]
    assert len([name for name in tensors if name.endswith("x")]) == 1


@pytest.mark.parametrize(
    "record",
    [
        partitioned((0, 2)),
        partitioned((0, 2), (0, 2)),
        partitioned((0, 2), (1, 2)),
        partitioned((0, 2), (2, 2), shape=(1 << 61,)),
        partitioned((0, 2), (2, 2), shape=(2, 2)),
    ],
)
def test_slices_that_do_not_make_up_the_whole_are_not_read(copy: Path, record: bytes):
    with_values(copy)
    rewrite(copy, {b"x": record, **HALVES})
    checkpoint = read_tensorflow(copy)
    assert checkpoint.facts["not_read"] == {"x": "is partitioned, and its slices do not make up the whole"}
    with pytest.raises(DataError, match=r"'x' is partitioned, and its slices do not make up the whole"):
        checkpoint.tensors["x"].load()


HEADERS = {
    "no header": (None, r"expected the header of a TensorFlow checkpoint under the empty key"),
    "another byte order": (field(1, 1) + field(2, 1), r"written on a big-endian machine"),
    "no data files": (field(2, 0), r"0 data files, expected 1"),
    "a data file that is not there": (field(1, 2), r"model.ckpt.data-00000-of-00002: cannot be opened"),
    "countless data files": (field(1, 1 << 50), r"1,125,899,906,842,624 data files"),
}


@pytest.mark.parametrize("fault", HEADERS)
def test_a_header_that_cannot_be_is_refused(copy: Path, fault: str):
    header, message = HEADERS[fault]
    rewrite(copy, {b"": header})
    with pytest.raises(DataError, match=message):
        read_bundle(copy)


def one_block(kind: int = 0, crc: int | None = None, entries: bytes = b"") -> bytes:
    """A table whose index block is given."""
    block = entries + struct.pack("<II", 0, 1) + bytes([kind])
    body = block + struct.pack("<I", masked(crc32c(block)) if crc is None else crc)
    handle = write_varint(0) + write_varint(len(block) - 1)
    return body + (handle * 2).ljust(FOOTER - 8, b"\0") + struct.pack("<Q", MAGIC)


TABLES = {
    "nothing": (b"", r"expected a table that ends in db4775248b80fb57"),
    "text": (b"<!DOCTYPE html>" * 10, r"these 150 bytes do not"),
    "a compressed block": (one_block(kind=1), r"compressed \(Snappy\).*Try: restore and save it with TensorFlow 2"),
    "a wrong checksum": (one_block(crc=1), r"does not have the CRC-32C that is stored"),
    "an entry behind its block": (one_block(entries=b"\0\x50\0"), r"an entry of a block does not fit into it"),
    "a key that shares with none": (one_block(entries=b"\5\0\0"), r"an entry of a block does not fit into it"),
    "a block behind the file": (
        write_varint(1 << 60) * 4 + bytes(4) + struct.pack("<Q", MAGIC),
        r"not inside the file",
    ),
}


@pytest.mark.parametrize("fault", TABLES)
def test_a_table_that_cannot_be_is_refused(fault: str):
    content, message = TABLES[fault]
    with pytest.raises(DataError, match=message):
        read_table(content, "a table")


def test_a_table_of_many_blocks_is_read_as_it_was_written():
    items = [(f"scope/{index:06d}/gamma".encode(), bytes(index % 50)) for index in range(5000)]
    assert read_table(write_table(items), "a table") == items
    with pytest.raises(DataError, match=r"expected rising keys"):
        read_table(write_table(items[::-1]), "a table")


def test_a_graph_nested_deeply_costs_nothing(copy: Path):
    bomb = b""
    for _ in range(3000):
        bomb = delimited(2, bomb)
    Path(f"{copy}.meta").write_bytes(bomb)
    assert len(read_tensorflow(copy).layers) == 3


def test_a_graph_of_countless_fields_is_refused():
    with pytest.raises(DataError, match=r"a file: more than 2,000,000 protobuf fields"):
        Message(b"\x08\x01" * 100, Budget("a file", left=99))
