"""Images in a folder per class, as ImageNet is usually unpacked."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from batchnorm.errors import DataError
from batchnorm.experiments.data.image_set import ImageData, Images, UnreadableImageError, decode, require_vision

if TYPE_CHECKING:
    from PIL import Image  # pyright: ignore[reportMissingImports]

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
# So many images make a shard, as many as one of ImageNet's 1,281 usual tars holds
BLOCK = 1000
PERMUTATION_SEED = 0
NAMED = 3


class FolderImages(Images):
    """The files of a tree ``root/CLASS/FILE``, in one fixed permutation, read by path.

    Args:
        root: the folder of the class folders.
        classes: their names, by label.
        files: name of each image inside its class folder.
        labels: int64, of each image.
    """

    def __init__(self, root: Path, classes: list[str], files: list[str], labels: np.ndarray) -> None:
        order = torch.randperm(len(files), generator=torch.Generator().manual_seed(PERMUTATION_SEED)).numpy()
        self.root, self.classes = root, classes
        self.files = [files[i] for i in order.tolist()]
        self.labels = labels[order]
        self.shard_sizes = block_sizes(len(files))

    def load(self, index: int) -> "Image.Image":
        path = self.root / self.classes[self.labels[index]] / self.files[index]
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UnreadableImageError(f"{path}: cannot be read: {error.strerror}") from error
        return decode(data, str(path))


def block_sizes(count: int) -> list[int]:
    """Blocks of 1,000 and what remains.

    Example:
        >>> block_sizes(2300)
        [1000, 1000, 300]
    """
    return [min(BLOCK, count - start) for start in range(0, count, BLOCK)]


def open_folders(folder: Path) -> ImageData:
    """Find the images of ``train/CLASS/`` and ``val/CLASS/``; labels follow the sorted names of train's classes.

    Raises:
        DataError: train and val have different classes, a class has no image, or a folder cannot be read.
        MissingExtraError: Pillow is not installed.
    """
    require_vision("PIL")
    classes = class_names(folder / "train")
    check_same_classes(folder, classes, class_names(folder / "val"))
    train, val = (read_tree(folder / split, classes) for split in ("train", "val"))
    return ImageData(folder.resolve().name, "folders", train, val, classes)


def class_names(root: Path) -> list[str]:
    """The sorted names of the class folders of a split."""
    names = sorted(entry.name for entry in scan(root) if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        loose = sum(entry.name.lower().endswith(SUFFIXES) for entry in scan(root))
        found = f"{loose:,} images without one" if loose else "none"
        raise DataError(f"{root}: expected a folder of images per class, found {found}; sort the images into folders")
    return names


def check_same_classes(folder: Path, train: list[str], val: list[str]) -> None:
    for here, there, only in (("train", "val", set(train) - set(val)), ("val", "train", set(val) - set(train))):
        if only:
            more = ", ..." if len(only) > NAMED else ""
            raise DataError(
                f"{folder}: expected the same class folders in train and val, but {len(only):,} of {here} "
                f"are not in {there}: {', '.join(sorted(only)[:NAMED])}{more}; add or remove them"
            )


def read_tree(root: Path, classes: list[str]) -> FolderImages:
    files: list[str] = []
    counts: list[int] = []
    for name in classes:
        images = sorted(
            entry.name
            for entry in scan(root / name)
            if entry.name.lower().endswith(SUFFIXES) and not entry.name.startswith(".") and entry.is_file()
        )
        if not images:
            raise DataError(
                f"{root / name}: expected images ({' '.join(SUFFIXES)}), found none; remove the class or add some"
            )
        files += images
        counts.append(len(images))
    return FolderImages(root, classes, files, np.repeat(np.arange(len(classes), dtype=np.int64), counts))


def scan(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise DataError(
            f"{folder}: expected a folder that can be read: {error.strerror}; check it and its rights"
        ) from error
