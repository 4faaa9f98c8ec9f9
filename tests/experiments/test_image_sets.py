"""Both layouts are found and give the same images; what is not complete is refused before anything is trained."""

import errno
import json
import os
import re
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from pictures import CLASSES, COUNTS, encoded, pairs, picture, samples, write_folders, write_shards, write_tar

from batchnorm.errors import DataError, MissingExtraError
from batchnorm.experiments.data.folders import BLOCK, FolderImages
from batchnorm.experiments.data.image_set import Images
from batchnorm.experiments.data.images import mnist_images, open_images
from batchnorm.experiments.data.mnist import Mnist


def contents(images: Images) -> list[tuple[int, bytes]]:
    return sorted((int(images.labels[i]), images.load(i).tobytes()) for i in range(len(images)))


def test_folders_are_read_with_sorted_class_names(tmp_path: Path):
    data = open_images(write_folders(tmp_path / "animals"))
    assert (data.name, data.layout, data.classes, data.flip) == ("animals", "folders", list(CLASSES), True)
    assert (len(data.train), len(data.val)) == (12, 4)
    assert data.train.labels.dtype == np.int64
    expected = [(label, picture(i).tobytes()) for i, (label, _) in enumerate(samples("train"))]
    assert contents(data.train) == sorted(expected)


def test_shards_are_read_in_their_order(tmp_path: Path):
    data = open_images(write_shards(tmp_path / "animals"))
    assert (data.name, data.layout, data.classes) == ("animals", "shards", ["0", "1"])
    assert data.train.shard_sizes == [5, 5, 2]
    assert data.train.labels.tolist() == [0, 1] * 6
    # forwards, and back over the ends of shards
    for i in (0, 4, 5, 11, 3, 10):
        assert data.train.load(i).tobytes() == picture(i).tobytes()


def test_both_layouts_give_the_same_images(tmp_path: Path):
    folders, shards = open_images(write_folders(tmp_path / "a")), open_images(write_shards(tmp_path / "b"))
    for split in COUNTS:
        assert contents(getattr(folders, split)) == contents(getattr(shards, split))


def test_every_kind_of_file_and_case_is_read_and_others_are_not(tmp_path: Path):
    write_folders(tmp_path)
    folder = tmp_path / "train" / "cat"
    for i, (suffix, format) in enumerate([("JPEG", "JPEG"), ("Jpg", "JPEG"), ("webp", "WEBP"), ("BMP", "BMP")]):
        (folder / f"more-{i}.{suffix}").write_bytes(encoded(picture(i), format))
    (folder / "notes.txt").touch()
    (folder / "._000.png").touch()
    (folder / "folder.png").mkdir()
    (tmp_path / "train" / ".hidden").mkdir()
    train = open_images(tmp_path).train
    assert len(train) == 16
    assert all(train.load(i).size == (10, 8) for i in range(16))


def test_the_files_of_a_folder_are_in_one_fixed_permutation_cut_into_blocks(tmp_path: Path):
    files = [f"{i}.jpg" for i in range(2 * BLOCK + 1)]
    labels = np.arange(len(files)) // BLOCK
    images, again = (FolderImages(tmp_path, ["a", "b", "c"], files, labels) for _ in range(2))
    assert images.files == again.files != files
    assert images.shard_sizes == [1000, 1000, 1]
    assert images.labels.tolist() == [int(name[:-4]) // BLOCK for name in images.files]
    assert 400 < (images.labels[:BLOCK] == 0).sum() < 600


def test_names_come_from_the_file_of_classes(tmp_path: Path):
    write_shards(tmp_path)
    entries = [{"index": 1, "wnid": "n2", "words": "dog, hound"}, {"index": 0, "wnid": "n1"}]
    (tmp_path / "classes.json").write_text(json.dumps(entries))
    assert open_images(tmp_path).classes == ["n1", "dog, hound"]
    (tmp_path / "classes.json").write_text('["cat", "dog", "cow"]')
    assert open_images(tmp_path).classes == ["cat", "dog", "cow"]


def test_labels_may_come_first_and_other_members_do_not_count(tmp_path: Path):
    write_shards(tmp_path)
    image = encoded(picture(3), "JPEG")
    members = [
        ("README", b"?"),
        ("a/b.cls", b" 1\n"),
        ("a/b.json", b"{}"),
        ("a/b.JPG", image),
        ("__meta__/c.jpg", image),
    ]
    write_tar(tmp_path / "val-000000.tar", members)
    val = open_images(tmp_path).val
    assert val.labels.tolist() == [1]
    assert val.load(0).size == (10, 8)


def test_mnist_is_an_image_set_too(mnist: Mnist):
    data = mnist_images()
    assert (data.name, data.layout, data.flip, data.classes) == ("mnist", "mnist", False, list("0123456789"))
    assert (len(data.train), len(data.val), data.train.shard_sizes) == (60_000, 10_000, [1000] * 60)
    assert data.val.labels.tolist() == mnist.test_labels.tolist()
    pixels = np.asarray(data.val.load(0))
    assert pixels.shape == (28, 28, 3)
    assert (pixels == pixels[:, :, :1]).all()
    binary = mnist.test_images[0].view(28, 28).numpy()
    np.testing.assert_array_equal(pixels[:, :, 0] >= 128, binary)


def nothing(folder: Path) -> None:
    pass


def one_file(folder: Path) -> None:
    (folder / "train.zip").touch()


def no_val(folder: Path) -> None:
    write_folders(folder)
    (folder / "val").rename(folder / "test")


def no_train_shards(folder: Path) -> None:
    write_shards(folder)
    for path in folder.glob("train-*"):
        path.unlink()


def both(folder: Path) -> None:
    write_folders(folder)
    write_shards(folder)


def loose_validation(folder: Path) -> None:
    write_folders(folder)
    for path in list((folder / "val").glob("*/*")):
        path.rename(folder / "val" / f"{path.parent.name}-{path.name}")
    for name in CLASSES:
        (folder / "val" / name).rmdir()


def other_classes(folder: Path) -> None:
    write_folders(folder)
    (folder / "val" / "cow").mkdir()


def missing_class(folder: Path) -> None:
    write_folders(folder)
    for i in range(5):
        (folder / "train" / f"more{i}").mkdir()


def empty_class(folder: Path) -> None:
    write_folders(folder)
    for split in COUNTS:
        (folder / split / "cow").mkdir()


def change(name: str, content: bytes | None, split: str = "val"):
    """Shards, with the first member of a name changed or left out."""

    def write(folder: Path) -> None:
        write_shards(folder)
        members = [(key, data if key != name else content) for key, data in pairs(samples(split))]
        write_tar(folder / f"{split}-000000.tar", [(key, data) for key, data in members if data is not None])

    return write


def twice(folder: Path) -> None:
    write_shards(folder)
    image = encoded(picture(0))
    write_tar(folder / "val-000000.tar", [("a.png", image), ("a.PNG", image), ("a.cls", b"0")])


def no_images(folder: Path) -> None:
    write_shards(folder)
    write_tar(folder / "val-000000.tar", [("README.txt", b"nothing yet")])


def classes_file(text: str):
    def write(folder: Path) -> None:
        write_shards(folder)
        (folder / "classes.json").write_text(text)

    return write


REFUSED = {
    "empty": (nothing, r"it is empty; give the folder that holds both sets"),
    "neither layout": (one_file, r"expected train/CLASS/\*\.jpg .* or WebDataset shards .* but found train\.zip; "),
    "no val": (no_val, r"found only train; give the folder that holds both sets"),
    "no train": (no_train_shards, r"found only val; give"),
    "both layouts": (both, r"but it has both; move one"),
    "val without classes": (loose_validation, r"val: expected a folder .* per class, found 4 images without one; sort"),
    "another class in val": (other_classes, r"but 1 of val are not in train: cow; add or remove"),
    "five classes not in val": (missing_class, r"5 of train are not in val: more0, more1, more2, \.\.\.; add or"),
    "a class without images": (empty_class, r"train/cow: expected images \(\.jpg .*, found none; remove the class"),
    "no label": (
        change("000001.cls", None),
        r"val-000000\.tar: 000001: expected a label \.cls beside the image, found",
    ),
    "no image": (change("000002.png", None), r"000002: expected an image \.jpg \.jpeg \.png beside the label"),
    "a label that is no number": (
        change("000001.cls", b"dog"),
        r"000001\.cls: expected a whole number .*found b'dog'",
    ),
    "a negative label": (change("000001.cls", b"-1"), r"000001\.cls: expected a whole number from 0, found b'-1'"),
    "a label that never ends": (change("000001.cls", b"1" * 99), r"000001\.cls: .*found b'1111111111'"),
    "a label that training lacks": (change("000001.cls", b"2"), r"labels 0 to 1, after the training set's.*found 2;"),
    "a label that has no name": (classes_file('["cat"]'), r"train-000000\.tar: expected labels 0 to 0, after classes"),
    "two images of one key": (twice, r"a: expected one \.png, found two; give each image a key of its own"),
    "a shard without images": (no_images, r"val-000000\.tar: expected members KEY\.jpg and KEY\.cls, found no image"),
    "classes that are no JSON": (classes_file("[..."), r"classes\.json: expected a list of class names.*mend or"),
    "classes without end": (classes_file("[" * 100_000), r"found something else \(maximum recursion"),
    "classes without index": (classes_file('[{"words": "cat"}]'), r"found something else \('index'\)"),
    "classes that are numbers": (classes_file("7"), r"classes\.json: .*found something else"),
    "classes that leave numbers out": (classes_file('[{"index": 1, "wnid": "n1"}]'), r"found other indices; mend"),
}


@pytest.mark.parametrize(("write", "message"), REFUSED.values(), ids=REFUSED)
def test_incomplete_data_is_refused(tmp_path: Path, write, message: str):
    write(tmp_path)
    with pytest.raises(DataError, match=message) as raised:
        open_images(tmp_path)
    assert "\n" not in str(raised.value)
    assert str(raised.value).startswith(str(tmp_path))


def test_a_missing_folder_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match=r"imagenet: does not exist: expected train/CLASS/.*; check the path"):
        open_images(tmp_path / "imagenet")
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file: is not a folder: expected"):
        open_images(tmp_path / "file")


# a block is 512 bytes; tarfile pads the file itself to 20 blocks
@pytest.mark.parametrize("blocks", [0, 0.5, 1, 1.1, 2, 4.5, -1], ids=lambda blocks: f"{blocks} blocks")
def test_a_truncated_shard_is_refused(tmp_path: Path, blocks: float):
    write_shards(tmp_path)
    path = tmp_path / "train-000001.tar"
    content = path.read_bytes().rstrip(b"\0")
    ends = len(content) // 512 * 512 if blocks < 0 else int(blocks * 512)
    path.write_bytes(content[:ends])
    with pytest.raises(DataError, match=r"train-000001\.tar: expected a complete tar file, but .*; copy or make it"):
        open_images(tmp_path)


def test_a_shard_that_stops_after_a_whole_image_is_refused(tmp_path: Path):
    write_shards(tmp_path)
    path = tmp_path / "train-000000.tar"
    with tarfile.open(path) as tar:
        third = tar.getmember("000002.png").offset
    path.write_bytes(path.read_bytes()[:third])
    with pytest.raises(DataError, match=r"complete tar file, but no end-of-archive block; copy"):
        open_images(tmp_path)


@pytest.mark.parametrize("content", [b"not a tar file" * 100, b"\x1f\x8b\x08" + bytes(600)], ids=["text", "gzip"])
def test_a_shard_that_is_no_tar_is_refused(tmp_path: Path, content: bytes):
    write_shards(tmp_path)
    (tmp_path / "val-000000.tar").write_bytes(content)
    with pytest.raises(DataError, match=r"val-000000\.tar: expected a complete tar file, but"):
        open_images(tmp_path)


def test_a_damaged_header_in_the_middle_is_refused(tmp_path: Path):
    write_shards(tmp_path)
    path = tmp_path / "val-000000.tar"
    with tarfile.open(path) as tar:
        second = tar.getmember("000001.png").offset
    content = bytearray(path.read_bytes())
    content[second + 150] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"val-000000\.tar: expected a complete tar file, but no end-of-archive block"):
        open_images(tmp_path)


def test_a_shard_that_changes_during_the_run_is_refused(tmp_path: Path):
    train = open_images(write_shards(tmp_path)).train
    train.load(0)
    path = tmp_path / "train-000001.tar"
    write_tar(path, pairs(samples("train")[:3]))
    with pytest.raises(DataError, match=r"train-000001\.tar: expected 5 images as at the start .*found 3: it changed"):
        train.load(5)
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(
        DataError, match=r"train-000001\.tar: expected a complete tar file, but unexpected end of data;"
    ):
        train.load(5)
    path.unlink()
    with pytest.raises(DataError, match=r"train-000001\.tar: .*"):
        train.load(5)
    # the others can still be read
    assert train.load(11).tobytes() == picture(11).tobytes()


@pytest.mark.parametrize("locked", ["train", "val/dog"])
def test_a_folder_without_rights_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locked: str):
    # simulated: root may read everything
    def scandir(folder: Path):
        if folder == tmp_path / locked:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
        return real(folder)

    write_folders(tmp_path)
    real = os.scandir
    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match=f"{locked}: expected a folder that can be read: Permission denied; check"):
        open_images(tmp_path)


@pytest.mark.parametrize(("package", "write"), [("PIL", write_folders), ("webdataset", write_shards)])
def test_a_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, write):
    write(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    name = {"PIL": "pillow"}.get(package, package)
    with pytest.raises(MissingExtraError, match=re.escape(f"{name} is not installed: pip install 'batchnorm[vision]'")):
        open_images(tmp_path)
