"""Every kind of image becomes RGB, and what cannot be used is said by name and counted."""

import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import encoded, picture, write_folders
from PIL import Image

from batchnorm.errors import DataError
from batchnorm.experiments.data.batches import Batch, EvalBatches, TrainBatches
from batchnorm.experiments.data.image_set import MAX_PIXELS, UnreadableImageError, decode
from batchnorm.experiments.data.images import open_images
from batchnorm.experiments.data.skipping import SkippedImages


def palette_with_alpha() -> bytes:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    image.info["transparency"] = b"\x80\x80"
    return encoded(image)


# encoded image, its colour, how far a lossy format may move it
KINDS = {
    "JPEG": (encoded(Image.new("RGB", (4, 4), (200, 100, 50)), "JPEG"), (200, 100, 50), 3),
    "gray JPEG": (encoded(Image.new("L", (4, 4), 77), "JPEG"), (77, 77, 77), 1),
    "CMYK JPEG": (encoded(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "JPEG"), (255, 0, 0), 3),
    "WebP": (encoded(Image.new("RGB", (4, 4), (200, 100, 50)), "WEBP"), (200, 100, 50), 6),
    "BMP": (encoded(Image.new("RGB", (4, 4), (200, 100, 50)), "BMP"), (200, 100, 50), 0),
    "gray PNG": (encoded(Image.new("L", (4, 4), 77)), (77, 77, 77), 0),
    "gray PNG with alpha": (encoded(Image.new("LA", (4, 4), (77, 10))), (77, 77, 77), 0),
    "black and white PNG": (encoded(Image.new("1", (4, 4), 1)), (255, 255, 255), 0),
    "PNG with alpha": (encoded(Image.new("RGBA", (4, 4), (200, 100, 50, 10))), (200, 100, 50), 0),
    "palette": (encoded(Image.new("RGB", (4, 4), (200, 100, 50)).quantize(4)), (200, 100, 50), 0),
    "palette with alpha": (palette_with_alpha(), (200, 100, 50), 0),
}


@pytest.mark.parametrize(("data", "color", "tolerance"), KINDS.values(), ids=KINDS)
def test_every_kind_of_image_becomes_rgb(data: bytes, color: tuple[int, int, int], tolerance: int):
    image = decode(data, "x")
    assert (image.mode, image.size) == ("RGB", (4, 4))
    assert np.abs(np.asarray(image).astype(int) - color).max() <= tolerance


def png_header(width: int, height: int) -> bytes:
    """A PNG that says its size and ends."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + b"\0\0\0\0IDAT"


def huge_jpeg() -> bytes:
    data = encoded(Image.new("RGB", (8, 8)), "JPEG")
    return data.replace(b"\xff\xc0\x00\x11\x08\x00\x08\x00\x08", b"\xff\xc0\x00\x11\x08\xff\xdc\xff\xdc")


JPEG = encoded(Image.effect_noise((64, 64), 80).convert("RGB"), "JPEG")
PNG = encoded(Image.effect_noise((64, 64), 80))
UNREADABLE = {
    "empty": (b"", r"not a JPEG, PNG, WebP or BMP image: it is empty"),
    "text": (b"<html>404", r"not a JPEG, PNG, WebP or BMP image: it begins with 3c 68 74 6d 6c 3e 34 30"),
    "another format": (encoded(picture(0), "TIFF"), r"not a JPEG, PNG, WebP or BMP image: it begins with 49 49"),
    "truncated JPEG": (JPEG[: len(JPEG) // 2], r"cannot be decoded: image file is truncated"),
    "truncated PNG": (PNG[: len(PNG) // 2], r"cannot be decoded: "),
    "damaged PNG": (PNG[:200] + bytes(50) + PNG[250:], r"cannot be decoded: "),
    "16 bits": (encoded(Image.new("I;16", (4, 4))), r"more than 8 bits per channel \(mode I;16\)"),
    "a bomb": (png_header(7072, 7072), r"7072 x 7072 pixels, more than 50,000,000"),
    "a bomb of which Pillow warns": (png_header(10_000, 10_000), r"10000 x 10000 pixels, more than 50,000,000"),
    "a bomb that Pillow refuses": (png_header(20_000, 20_000), r"more than 50,000,000 pixels"),
    "a JPEG bomb": (huge_jpeg(), r"more than 50,000,000 pixels"),
}


@pytest.mark.parametrize(("data", "message"), UNREADABLE.values(), ids=UNREADABLE)
def test_what_cannot_be_used_is_said_in_one_line(data: bytes, message: str):
    with pytest.raises(UnreadableImageError, match=rf"^val/3\.jpg: {message}") as raised:
        decode(data, "val/3.jpg")
    assert "\n" not in str(raised.value)


def test_the_largest_size_is_not_refused_for_its_size():
    with pytest.raises(UnreadableImageError, match="cannot be decoded"):
        decode(png_header(5000, MAX_PIXELS // 5000), "x")


def test_a_batch_leaves_out_and_names_what_cannot_be_read(tmp_path: Path):
    write_folders(tmp_path)
    (tmp_path / "train" / "cat" / "000.png").write_bytes(b"oops")
    (tmp_path / "val" / "dog" / "001.png").write_bytes(b"")
    data = open_images(tmp_path)
    (tmp_path / "train" / "dog" / "001.png").unlink()
    train = TrainBatches(data.train, size=8, batch_size=12, seed=0)[0]
    assert train.images.shape == (10, 3, 8, 8)
    assert sorted(train.labels.tolist()) == [0] * 5 + [1] * 5
    first, second = sorted(train.skipped)
    assert re.fullmatch(r".*train/cat/000\.png: not a JPEG.*begins with 6f 6f 70 73", first)
    assert re.fullmatch(r".*train/dog/001\.png: cannot be read: No such file or directory", second)
    val = EvalBatches(data.val, size=8, batch_size=4)[0]
    assert (len(val.images), len(val.labels), len(val.skipped)) == (3, 3, 1)


def test_a_batch_of_which_nothing_can_be_read_is_empty(tmp_path: Path):
    write_folders(tmp_path)
    for path in tmp_path.glob("*/*/*"):
        path.write_bytes(b"oops")
    data = open_images(tmp_path)
    for batch in (
        TrainBatches(data.train, size=8, batch_size=4, seed=0)[0],
        EvalBatches(data.val, size=8, batch_size=4)[0],
    ):
        assert (batch.images.shape, batch.labels.shape, len(batch.skipped)) == ((0, 3, 8, 8), (0,), 4)
        assert batch.labels.dtype == torch.int64


def batch(read: int, *skipped: str) -> Batch:
    return Batch(torch.zeros(read, 3, 1, 1), torch.zeros(read, dtype=torch.int64), list(skipped))


def test_ten_skipped_images_are_too_many_where_few_were_seen():
    skipped = SkippedImages()
    for i in range(9):
        skipped.count(batch(3, f"{i}.jpg: empty"))
    with pytest.raises(DataError, match=r"10 of 40 images could not be read, expected at most 1 %.*: 0\.jpg: empty; 1"):
        skipped.count(batch(3, "9.jpg: empty"))


def test_more_than_one_percent_are_too_many():
    skipped = SkippedImages()
    skipped.count(batch(1980))
    skipped.count(batch(0, *(f"{i}" for i in range(20))))
    with pytest.raises(DataError, match=r"21 of 2,001 images could not be read"):
        skipped.count(batch(0, "20"))


def test_the_count_goes_on_from_a_checkpoint(tmp_path: Path):
    skipped, resumed = SkippedImages(fraction=0.5), SkippedImages(fraction=0.5)
    skipped.count(batch(20, *"abcdefgh"))
    torch.save(skipped.state_dict(), tmp_path / "state")
    resumed.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    assert (resumed.seen, resumed.skipped) == (28, 8)
    with pytest.raises(DataError, match=r"29 of 49 images.*: a; b; c$"):
        resumed.count(batch(0, *("x" * 21)))
