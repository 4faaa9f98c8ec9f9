"""The MNIST database of handwritten digits: 60,000 training and 10,000 test images of 28 x 28."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from batchnorm.errors import DataError
from batchnorm.experiments.data.idx import read_idx

BUNDLED = Path(__file__).with_name("mnist-idx")
PIXELS = 28 * 28
CLASSES = 10

# name, shape, md5 of the uncompressed file
TRAIN_IMAGES = ("train-images-idx3-ubyte", (60_000, 28, 28), "6bbc9ace898e44ae57da46a324031adb")
TRAIN_LABELS = ("train-labels-idx1-ubyte", (60_000,), "a25bea736e30d166cdddb491f175f624")
TEST_IMAGES = ("t10k-images-idx3-ubyte", (10_000, 28, 28), "2646ac647ad5339dbf082846283269ea")
TEST_LABELS = ("t10k-labels-idx1-ubyte", (10_000,), "27ae3e4e09519cfbb04c329615203637")

INPUTS = ("binary", "gray")
# The paper says "binary" and gives no rule: a pixel is on from half of the range upwards.
BINARY_THRESHOLD = 128


class Mnist(NamedTuple):
    """Images as uint8 (n, 784), a quarter of the memory traffic of float32; labels as int64 (n,).

    ``scale`` turns pixels into network inputs: 1 for binary images (0 or 1), 1/255 for gray ones.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    scale: float

    def inputs(self, images: Tensor) -> Tensor:
        """Network inputs in float32, 0 to 1."""
        floats = images.float()
        return floats if self.scale == 1 else floats.mul_(self.scale)


def load_mnist(folder: Path | None = None, input: str = "binary") -> Mnist:
    """Load the bundled database, or the user's own copy of it.

    Args:
        folder: where the four IDX files are, plain or ``.gz``; None for the bundled ones.
        input: "binary" (0 or 1, on from 128 upwards) or "gray" (0 to 1).

    Raises:
        DataError: a file is missing or is not the MNIST file it should be.

    Source:
        LeCun, Cortes, Burges, "The MNIST database of handwritten digits".

    Example:
        >>> data = load_mnist()
        >>> data.train_images.shape, data.test_labels[:4].tolist()
        (torch.Size([60000, 784]), [7, 2, 1, 0])
    """
    folder = BUNDLED if folder is None else folder
    arrays = [
        read_idx(locate(folder, name), shape, md5)
        for name, shape, md5 in (TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS)
    ]
    train_images, train_labels, test_images, test_labels = arrays
    return Mnist(
        pixels(train_images, input),
        torch.from_numpy(train_labels.astype(np.int64)),
        pixels(test_images, input),
        torch.from_numpy(test_labels.astype(np.int64)),
        1.0 if input == "binary" else 1 / 255,
    )


def locate(folder: Path, name: str) -> Path:
    """The file or its .gz form."""
    for candidate in (folder / f"{name}.gz", folder / name):
        if candidate.is_file():
            return candidate
    raise DataError(
        f"{folder}: no {name}.gz or {name}: expected the four IDX files of MNIST; leave --data out for the bundled ones"
    )


def pixels(images: np.ndarray, input: str) -> Tensor:
    flat = images.reshape(len(images), PIXELS)
    return torch.from_numpy((flat >= BINARY_THRESHOLD).astype(np.uint8) if input == "binary" else flat.copy())
