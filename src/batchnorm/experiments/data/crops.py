"""What a network is evaluated on: the center of an image, or GoogLeNet's 144 crops."""

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image  # pyright: ignore[reportMissingImports]

# Lengths of the shorter side, in sevenths of the network's input: 256, 288, 320 and 352 pixels for 224
SCALES = (8, 9, 10, 11)
CROPS = 144


def center_crop(image: "Image.Image", size: int) -> Tensor:
    """The center of an image whose shorter side is resized to 8/7 of ``size``, 256 pixels for 224.

    An image of ``size`` x ``size`` is taken as it is: small data sets have been cropped already.

    Args:
        image: RGB.
        size: height and width of the crop, in pixels.

    Returns:
        float32 (3, size, size) in [-1, 1].

    Example:
        >>> from PIL import Image
        >>> center_crop(Image.new("RGB", (500, 375), "white"), 224).unique().tolist()
        [1.0]
    """
    if image.size != (size, size):
        width, height = image.size
        side = min(width, height) * size / scaled(SCALES[0], size)
        left, top = (width - side) / 2, (height - side) / 2
        image = resize(image, size, (left, top, left + side, top + side))
    return normalize(to_pixels(image))


def crops_144(image: "Image.Image", size: int) -> Tensor:
    """GoogLeNet's 144 crops, whose softmax outputs are averaged.

    The image is resized to 4 scales, shorter side 8/7, 9/7, 10/7 and 11/7 of ``size``; each scale has 3 squares, left,
    center and right or top, center and bottom; each square has 6 crops, its corners (top left, top right, bottom left,
    bottom right), its center, and the whole square resized to ``size``; each crop comes as it is and mirrored.

    Args:
        image: RGB, of any size.
        size: height and width of a crop, in pixels.

    Returns:
        float32 (144, 3, size, size) in [-1, 1]; crop ``((scale * 3 + square) * 6 + crop) * 2 + mirrored``, each counted
        in the order above.

    Source:
        Szegedy et al., "Going deeper with convolutions", section 7; used for the ensemble of the paper, section 4.2.3.

    Example:
        >>> from PIL import Image
        >>> crops_144(Image.new("RGB", (50, 40)), 28).shape
        torch.Size([144, 3, 28, 28])
    """
    crops = []
    for scale in SCALES:
        length = scaled(scale, size)
        far = length - size
        places = ((0, 0), (0, far), (far, 0), (far, far), (far // 2, far // 2))
        for box in squares(image):
            square = resize(image, length, box)
            pixels = to_pixels(square)
            crops += [pixels[:, top : top + size, left : left + size] for top, left in places]
            crops.append(to_pixels(resize(square, size, (0, 0, length, length))))
    plain = torch.stack(crops)
    return normalize(torch.stack([plain, plain.flip(-1)], 1).flatten(0, 1))


def scaled(sevenths: int, size: int) -> int:
    return round(sevenths * size / 7)


def squares(image: "Image.Image") -> list[tuple[float, float, float, float]]:
    """Left, center and right square of a wide image, or top, center and bottom one of a high image."""
    width, height = image.size
    side = min(width, height)
    return [
        (part * (width - side), part * (height - side), part * (width - side) + side, part * (height - side) + side)
        for part in (0, 0.5, 1)
    ]


def resize(image: "Image.Image", size: int, box: tuple[float, float, float, float]) -> "Image.Image":
    """A square part of an image, with antialiasing. The rest is never resized, however long an image is."""
    from PIL import Image  # pyright: ignore[reportMissingImports]

    return image.resize((size, size), Image.Resampling.BILINEAR, box=box)


def to_pixels(image: "Image.Image") -> Tensor:
    """uint8 (3, height, width)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def normalize(pixels: Tensor) -> Tensor:
    """0 to 255 as float32 in [-1, 1]."""
    return pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1)
