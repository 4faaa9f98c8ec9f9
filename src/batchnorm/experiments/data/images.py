"""Open the images of an experiment: a tree of folders, WebDataset shards, or the bundled MNIST."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from batchnorm.errors import DataError
from batchnorm.experiments.data.folders import block_sizes, open_folders
from batchnorm.experiments.data.image_set import ImageData, Images, require_vision
from batchnorm.experiments.data.mnist import CLASSES, load_mnist
from batchnorm.experiments.data.shards import open_shards

if TYPE_CHECKING:
    from PIL import Image  # pyright: ignore[reportMissingImports]

SPLITS = ("train", "val")
EXPECTED = "expected train/CLASS/*.jpg and val/CLASS/*.jpg, or WebDataset shards train-*.tar and val-*.tar"
NAMED = 3


def open_images(folder: Path) -> ImageData:
    """Open a folder of images, in whichever of two layouts it has, and check it before anything is trained.

    - Folders: ``train/CLASS/`` and ``val/CLASS/`` with .jpg, .jpeg, .png, .webp or .bmp files, as ImageNet is usually
      unpacked. Classes are the sorted folder names. A shard is a block of 1,000 images of one fixed permutation.
    - WebDataset shards: ``train-*.tar`` and ``val-*.tar`` with KEY.jpg (.jpeg, .png) and KEY.cls, a number. Names of
      the classes are in ``classes.json``, where there is one.

    Args:
        folder: what holds train and val.

    Returns:
        :class:`ImageData`.

    Raises:
        DataError: the folder is missing, empty or of neither layout, a set is missing or not complete, or the classes
            of the two sets disagree. Damaged images are not looked for; see :class:`TrainBatches`.
        MissingExtraError: Pillow, or webdataset where there are shards, is not installed.
    """
    if not folder.is_dir():
        found = "is not a folder" if folder.exists() else "does not exist"
        raise DataError(f"{folder}: {found}: {EXPECTED}; check the path")
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise DataError(f"{folder}: cannot be read: {error.strerror}; check its rights") from error
    layouts = {
        open_folders: [split for split in SPLITS if (folder / split).is_dir()],
        open_shards: [split for split in SPLITS if any(folder.glob(f"{split}-*.tar"))],
    }
    found = {layout: splits for layout, splits in layouts.items() if splits}
    if not found:
        content = f"found {', '.join(names[:NAMED])}{', ...' if len(names) > NAMED else ''}" if names else "it is empty"
        raise DataError(f"{folder}: {EXPECTED}, but {content}; give the folder that holds both sets")
    if len(found) == 2:
        raise DataError(f"{folder}: {EXPECTED}, but it has both; move one of them away")
    [(layout, splits)] = found.items()
    if len(splits) < 2:
        raise DataError(f"{folder}: {EXPECTED}, but found only {splits[0]}; give the folder that holds both sets")
    return layout(folder)


class DigitImages(Images):
    """Gray digits as RGB images, from memory.

    Args:
        pixels: uint8 (n, 784).
        labels: int64 (n,).
    """

    def __init__(self, pixels: Tensor, labels: Tensor) -> None:
        self.pixels = pixels.view(-1, 28, 28).numpy()
        self.labels = labels.numpy()
        self.shard_sizes = block_sizes(len(self.labels))

    def load(self, index: int) -> "Image.Image":
        from PIL import Image  # pyright: ignore[reportMissingImports]

        return Image.fromarray(np.asarray(self.pixels[index])).convert("RGB")


def mnist_images(folder: Path | None = None, *, validation_images: int | None = None) -> ImageData:
    """The MNIST digits as an image set, 60,000 and 10,000 images of 28 x 28 pixels, for machines without ImageNet.

    Args:
        folder: the user's own copy of the four files; None for the bundled ones.
        validation_images: how many of the 10,000, the first ones; None for all.

    Raises:
        DataError: the files are not MNIST's.
        MissingExtraError: Pillow is not installed.

    Example:
        >>> data = mnist_images()
        >>> data.name, len(data.train), len(data.val), data.train.load(0).size
        ('mnist', 60000, 10000, (28, 28))
    """
    require_vision("PIL")
    mnist = load_mnist(folder, "gray")
    return ImageData(
        name="mnist",
        layout="mnist",
        train=DigitImages(mnist.train_images, mnist.train_labels),
        val=DigitImages(mnist.test_images[:validation_images], mnist.test_labels[:validation_images]),
        classes=[str(digit) for digit in range(CLASSES)],
        flip=False,
    )
