"""The IDX reader takes one file and refuses every other, with what was expected, what was found, and how it begins."""

import errno
import gzip
import hashlib
import os
import shutil
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from batchnorm.errors import DataError
from batchnorm.experiments.data.idx import read_idx
from batchnorm.experiments.data.mnist import BUNDLED, TEST_IMAGES, TEST_LABELS, TRAIN_IMAGES, TRAIN_LABELS, load_mnist

FILES = (TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS)
SHAPE = (3, 2, 2)
HEADER = struct.pack(">BBBB3I", 0, 0, 8, 3, *SHAPE)
VALUES = bytes(range(12))
CONTENT = HEADER + VALUES
MD5 = hashlib.md5(CONTENT).hexdigest()


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("name", ["small.gz", "small"])
def test_the_expected_file_is_read(tmp_path: Path, name: str):
    array = read_idx(write(tmp_path / name, CONTENT), SHAPE, MD5)
    np.testing.assert_array_equal(array, np.arange(12, dtype=np.uint8).reshape(SHAPE))
    assert array.dtype == np.uint8


@pytest.mark.parametrize(("name", "shape", "md5"), FILES, ids=[file[0] for file in FILES])
def test_the_bundled_files_are_read(name: str, shape: tuple[int, ...], md5: str):
    assert read_idx(BUNDLED / f"{name}.gz", shape, md5).shape == shape


def test_plain_copies_of_the_bundled_files_are_read(tmp_path: Path, mnist):
    for name, _, _ in FILES:
        (tmp_path / name).write_bytes(gzip.decompress((BUNDLED / f"{name}.gz").read_bytes()))
    copies = load_mnist(tmp_path)
    assert all(a.equal(b) for a, b in zip(copies[:4], mnist[:4], strict=True))


BEGINS = f"it begins with {HEADER[:16].hex(' ')}"
REFUSED = {
    "another magic number": (b"\x01" + CONTENT[1:], rf"header {HEADER.hex(' ')} .*begins with 01 00 08"),
    "another type": (b"\0\0\x0d" + CONTENT[3:], r"expected an IDX header .*unsigned bytes.*begins with 00 00 0d 03"),
    "another number of dimensions": (b"\0\0\x08\x01" + CONTENT[4:], r"\(3, 2, 2\)\), but it begins with 00 00 08 01"),
    "other sizes": (CONTENT.replace(b"\0\0\0\x03", b"\0\0\0\x04"), r"but it begins with 00 00 08 03 00 00 00 04"),
    "truncated values": (CONTENT[:-1], rf"expected 28 bytes, found 27: .*{BEGINS}"),
    "values left out": (HEADER, rf"expected 28 bytes, found 16: .*{BEGINS}"),
    "a truncated header": (HEADER[:7], r"but it begins with 00 00 08 03 00 00 00$"),
    "trailing bytes": (CONTENT + b"\0", rf"expected 28 bytes, found more than 28: .*{BEGINS}"),
    "one flipped bit": (
        CONTENT[:-1] + bytes([CONTENT[-1] ^ 1]),
        rf"expected md5 {MD5}, found {hashlib.md5(CONTENT[:-1] + bytes([CONTENT[-1] ^ 1])).hexdigest()}: .*{BEGINS}",
    ),
    "an empty file": (b"", r"expected an IDX header .*but it is empty$"),
    "text": (b"<!DOCTYPE html><html>not found</html>", r"but it begins with 3c 21 44 4f 43"),
}  # fmt: skip


@pytest.mark.parametrize("name", ["small.gz", "small"])
@pytest.mark.parametrize("fault", REFUSED)
def test_other_contents_are_refused(tmp_path: Path, name: str, fault: str):
    content, message = REFUSED[fault]
    path = write(tmp_path / name, content)
    with pytest.raises(DataError, match=message) as error:
        read_idx(path, SHAPE, MD5)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


GZIP = gzip.compress(CONTENT, mtime=0)
BROKEN_ARCHIVES = {
    "truncated in the values": (GZIP[:-12], r"ended before the end-of-stream marker"),
    "truncated in the checksum": (GZIP[:-3], r"ended before the end-of-stream marker"),
    "truncated in its header": (GZIP[:6], r"ended before the end-of-stream marker"),
    "trailing garbage": (GZIP + b"garbage", r"Not a gzipped file \(b'ga'\)"),
    "a second member": (GZIP + gzip.compress(b"more"), r"expected 28 bytes, found more than 28"),
    "a wrong checksum": (GZIP[:-8] + b"\0\0\0\0" + GZIP[-4:], r"CRC check failed"),
    "a broken stream": (GZIP[:10] + b"\xff" * 8, r"Error -3 while decompressing"),
    "no gzip at all": (CONTENT, r"Not a gzipped file \(b'\\x00\\x00'\).*begins with 00 00 08 03"),
    "an empty file": (b"", r"but it is empty"),
}


@pytest.mark.parametrize("fault", BROKEN_ARCHIVES)
def test_broken_archives_are_refused(tmp_path: Path, fault: str):
    content, message = BROKEN_ARCHIVES[fault]
    path = tmp_path / "small.gz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        read_idx(path, SHAPE, MD5)
    assert "\n" not in str(error.value)


def test_an_archive_that_unpacks_to_gigabytes_needs_no_memory(tmp_path: Path):
    path = tmp_path / "small.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(CONTENT)
        for _ in range(64):
            file.write(bytes(1 << 20))
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="expected 28 bytes, found more than 28"):
            read_idx(path, SHAPE, MD5)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_missing_file_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match=r"small\.gz: cannot be read: No such file"):
        read_idx(tmp_path / "small.gz", SHAPE, MD5)


def test_a_folder_in_place_of_a_file_is_refused(tmp_path: Path):
    (tmp_path / "small.gz").mkdir()
    with pytest.raises(DataError, match=r"small\.gz: cannot be read: Is a directory"):
        read_idx(tmp_path / "small.gz", SHAPE, MD5)


def test_an_unreadable_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write(tmp_path / "small", CONTENT)

    # root may read a file of mode 0, so the system's refusal is played
    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(DataError, match="small: cannot be read: Permission denied"):
        read_idx(path, SHAPE, MD5)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The user's own copy of the files."""
    return Path(shutil.copytree(BUNDLED, tmp_path / "copy"))


def test_a_missing_folder_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match=r"nowhere: no train-images-idx3-ubyte\.gz .*four IDX files.*leave --data out"):
        load_mnist(tmp_path / "nowhere")


@pytest.mark.parametrize(("name", "shape", "md5"), FILES, ids=[file[0] for file in FILES])
def test_each_missing_file_is_named(copy: Path, name: str, shape: tuple[int, ...], md5: str):
    (copy / f"{name}.gz").unlink()
    with pytest.raises(DataError, match=rf"copy: no {name}\.gz or {name}: expected the four IDX files"):
        load_mnist(copy)


def test_a_folder_in_place_of_an_mnist_file_is_refused(copy: Path):
    (copy / "t10k-labels-idx1-ubyte.gz").unlink()
    (copy / "t10k-labels-idx1-ubyte.gz").mkdir()
    with pytest.raises(DataError, match=r"no t10k-labels-idx1-ubyte\.gz or"):
        load_mnist(copy)


def test_other_data_of_the_right_shape_is_refused(copy: Path):
    """Fashion-MNIST has the same names, the same header and the same number of bytes."""
    name, shape, md5 = TEST_IMAGES
    other = struct.pack(">BBBB3I", 0, 0, 8, 3, *shape) + bytes(10_000 * 784)
    write(copy / f"{name}.gz", other)
    found = hashlib.md5(other).hexdigest()
    with pytest.raises(DataError, match=rf"{name}\.gz: expected md5 {md5}, found {found}: other data than the MNIST"):
        load_mnist(copy)


def test_test_files_in_place_of_training_files_are_refused(copy: Path):
    shutil.copy(copy / "t10k-labels-idx1-ubyte.gz", copy / "train-labels-idx1-ubyte.gz")
    with pytest.raises(DataError, match=r"shape \(60000,\)\), but it begins with 00 00 08 01 00 00 27 10"):
        load_mnist(copy)
