"""What every image set has: labels, shards, and images that are read one by one."""

import importlib.util
import io
import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from batchnorm.errors import DataError, MissingExtraError

if TYPE_CHECKING:
    from PIL import Image  # pyright: ignore[reportMissingImports]

# A photograph of 50 million pixels takes 150 MB; the largest of ImageNet has 22 million.
MAX_PIXELS = 50_000_000
# What a file says it is does not count: ImageNet has a PNG and CMYK files among its .JPEG. Pillow's other readers are
# never asked.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP")


class UnreadableImageError(DataError):
    """One image cannot be used; the message names it and says why."""


class Images(ABC):
    """Labelled images in an order of their own, cut into shards.

    ``labels`` has one int64 for each image, 0 to classes - 1. ``shard_sizes`` adds up to their number: images 0 to
    ``shard_sizes[0] - 1`` are the first shard. Images of one shard are read together.
    """

    labels: np.ndarray
    shard_sizes: list[int]

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def load(self, index: int) -> "Image.Image":
        """The image at a place of the order, RGB, 8 bits.

        Raises:
            UnreadableImageError: it is damaged or too large.
            DataError: its shard cannot be read.
        """


@dataclass(frozen=True)
class ImageData:
    """A training set and a validation set.

    Args:
        name: of the data set: its folder's, or "mnist".
        layout: "folders", "shards", or "mnist" for the bundled digits, which stand in where there is no ImageNet.
        train: the training set.
        val: the validation set.
        classes: the name of each label.
        flip: whether a mirrored image still shows its class.
    """

    name: str
    layout: str
    train: Images
    val: Images
    classes: list[str]
    flip: bool = True


def decode(data: bytes, name: str) -> "Image.Image":
    """Decode a JPEG, PNG, WebP or BMP image to RGB.

    Gray, palette and CMYK images are converted, an alpha channel is left out, an orientation in EXIF is ignored: what
    ``torchvision.datasets.ImageFolder`` does.

    Args:
        data: the encoded bytes.
        name: of the image, for the message.

    Raises:
        UnreadableImageError: damaged, truncated, of another format, of more than 8 bits per channel, or of more than
            50 million pixels, which is seen in the header before anything is decoded.
    """
    from PIL import Image, UnidentifiedImageError  # pyright: ignore[reportMissingImports]

    try:
        # Pillow warns of odd metadata and of bombs that are refused here anyway
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise UnreadableImageError(f"{name}: {width} x {height} pixels, more than {MAX_PIXELS:,}")
                if image.mode.startswith(("I", "F")):
                    raise UnreadableImageError(f"{name}: more than 8 bits per channel (mode {image.mode})")
                return image.convert("RGB")
    except (UnreadableImageError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise UnreadableImageError(f"{name}: more than {MAX_PIXELS:,} pixels") from error
    except UnidentifiedImageError as error:
        begin = f"begins with {data[:8].hex(' ')}" if data else "is empty"
        raise UnreadableImageError(f"{name}: not a JPEG, PNG, WebP or BMP image: it {begin}") from error
    except Exception as error:
        # A damaged file surfaces as OSError, SyntaxError, ValueError, struct.error, zlib.error, ...
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UnreadableImageError(f"{name}: cannot be decoded: {reason}") from error


def require_vision(*packages: str) -> None:
    """Refuse to begin without the packages that come with an extra.

    Raises:
        MissingExtraError: one is not installed.
    """
    for package in packages:
        if importlib.util.find_spec(package) is None:
            name = {"PIL": "pillow"}.get(package, package)
            raise MissingExtraError(f"{name} is not installed: pip install 'batchnorm[vision]'")
