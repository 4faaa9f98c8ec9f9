"""Tiny images, folders and shards of them, and an image set that says how it was read."""

import io
import os
import signal
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from batchnorm.experiments.data.image_set import Images

CLASSES = ("cat", "dog")
# images of each class
COUNTS = {"train": 6, "val": 2}


def picture(index: int, width: int = 10, height: int = 8) -> Image.Image:
    """Of one colour, which tells the index."""
    return Image.new("RGB", (width, height), (40 * (index // 36), 7 * (index % 36), 90))


def places(width: int, height: int, step: int = 1) -> Image.Image:
    """Red tells the column and green the row."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, :, 0] = step * np.arange(width)
    pixels[:, :, 1] = step * np.arange(height)[:, None]
    return Image.fromarray(pixels)


def encoded(image: Image.Image, format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format)
    return buffer.getvalue()


def samples(split: str) -> list[tuple[int, bytes]]:
    """Label and PNG of each image of a split; no two are the same."""
    first = 0 if split == "train" else 50
    count = COUNTS[split] * len(CLASSES)
    return [(i % len(CLASSES), encoded(picture(first + i))) for i in range(count)]


def write_folders(folder: Path) -> Path:
    for split in COUNTS:
        for i, (label, data) in enumerate(samples(split)):
            path = folder / split / CLASSES[label] / f"{i:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    return folder


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def pairs(numbered: list[tuple[int, bytes]], first: int = 0) -> list[tuple[str, bytes]]:
    """The members of a shard."""
    return [
        member
        for i, (label, data) in enumerate(numbered, first)
        for member in ((f"{i:06}.png", data), (f"{i:06}.cls", str(label).encode()))
    ]


def write_shards(folder: Path) -> Path:
    """Train in shards of 5, 5 and 2 images, val in one."""
    train = samples("train")
    for shard, start in enumerate(range(0, len(train), 5)):
        write_tar(folder / f"train-{shard:06}.tar", pairs(train[start : start + 5], start))
    write_tar(folder / "val-000000.tar", pairs(samples("val")))
    return folder


class ReadingImages(Images):
    """Images whose red is the number of threads of the process that read them.

    Reading number ``deadly`` kills it, and number ``faulty`` raises what is no error of the data.
    """

    def __init__(self, count: int, deadly: int = -1, faulty: int = -1) -> None:
        self.labels, self.shard_sizes = np.arange(count, dtype=np.int64), [count]
        self.deadly, self.faulty = deadly, faulty

    def load(self, index: int) -> Image.Image:
        if index == self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        if index == self.faulty:
            raise RuntimeError(f"cannot read {index}")
        return Image.new("RGB", (8, 8), (torch.get_num_threads(), 0, 0))
