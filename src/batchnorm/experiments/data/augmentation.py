"""Random crops, mirror images and photometric distortions of training images."""

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from batchnorm.experiments.data.image_set import require_vision

if TYPE_CHECKING:
    from PIL import Image  # pyright: ignore[reportMissingImports]

# GoogLeNet's crops (Szegedy et al. 2014, section 6): 8 % to 100 % of the area, 3/4 to 4/3 in shape
AREA = (0.08, 1.0)
ASPECT = (3 / 4, 4 / 3)


class Distortion(NamedTuple):
    """How far colours may move: factors from 1 - x to 1 + x, and the hue by a part of a turn."""

    brightness: float
    contrast: float
    saturation: float
    hue: float


DISTORTIONS = {
    "full": Distortion(32 / 255, 0.5, 0.5, 0.2),
    "reduced": Distortion(16 / 255, 0.25, 0.25, 0.1),
    "none": None,
}


class Augmentation:
    """Turn decoded images into the input of a training step.

    Each image gets a crop of its own, 8 % to 100 % of its area with sides 3/4 to 4/3, resized to ``size`` (bilinear,
    with antialiasing where it shrinks); is mirrored with probability 1/2; and has its colours distorted. kornia draws
    the random numbers, mirrors and distorts; Pillow resizes.

    The paper distorts photometrically as Howard (2013) does and reduces the distortions for BN (section 4.2.1), and
    gives no numbers. Here, with factors and turns drawn per image and the four in an order drawn per batch:

    ============  ===============  =============
    \\             full             reduced
    ============  ===============  =============
    brightness    x 0.875 - 1.125  x 0.94 - 1.06
    contrast      x 0.5 - 1.5      x 0.75 - 1.25
    saturation    x 0.5 - 1.5      x 0.75 - 1.25
    hue           +-0.2 turns      +-0.1 turns
    ============  ===============  =============

    "full" has the ranges of the preprocessing published with TensorFlow's Inception networks, "reduced" half of them.

    Args:
        size: height and width of the output, in pixels.
        distortion: "full", "reduced" or "none".
        flip: whether to mirror; digits and letters should not be.

    Raises:
        MissingExtraError: kornia or Pillow is not installed.
        ValueError: another distortion.

    Source:
        Szegedy et al., "Going deeper with convolutions", section 6 (crops); Howard, "Some improvements on deep
        convolutional neural network based image classification" (distortions); tensorflow/models,
        ``inception_preprocessing.py`` (their ranges).
    """

    def __init__(self, size: int, *, distortion: str = "full", flip: bool = True) -> None:
        require_vision("kornia", "PIL")
        if distortion not in DISTORTIONS:
            raise ValueError(f"distortion {distortion!r}: expected one of {', '.join(DISTORTIONS)}")
        self.size, self.distortion, self.flip = size, distortion, flip
        self.steps: list[Any] | None = None

    def __call__(self, images: "list[Image.Image]", seed: int) -> Tensor:
        """The images as float32 (n, 3, size, size) in [-1, 1]; the same for the same images and seed."""
        if not images:
            return torch.empty(0, 3, self.size, self.size)
        # kornia has no generator of its own; torch.manual_seed would seed the GPUs' too, which nobody puts back
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            batch = to_batch(self.crop(images))
            for step in self.load_steps():
                batch = step(batch)
        return batch.mul_(2).sub_(1)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"steps": None}

    def crop(self, images: "list[Image.Image]") -> "list[Image.Image]":
        from kornia.augmentation.random_generator import ResizedCropGenerator  # pyright: ignore[reportMissingImports]
        from PIL import Image  # pyright: ignore[reportMissingImports]

        generator = ResizedCropGenerator((self.size, self.size), AREA, ASPECT)
        crops = list(images)
        by_size: dict[tuple[int, int], list[int]] = {}
        for i, image in enumerate(images):
            by_size.setdefault(image.size, []).append(i)
        for (width, height), members in by_size.items():
            corners = generator(torch.Size((len(members), 3, height, width)))["src"]
            # kornia's corners are pixels of the crop, Pillow's box ends behind the last one
            boxes = torch.cat([corners[:, 0], corners[:, 2] + 1], 1).tolist()
            for i, (left, top, right, bottom) in zip(members, boxes, strict=True):
                crops[i] = images[i].resize(
                    (self.size, self.size), Image.Resampling.BILINEAR, box=(left, top, right, bottom)
                )
        return crops

    def load_steps(self) -> list[Any]:
        """kornia's modules, made at first use: a process that only hands batches out need not import it."""
        if self.steps is None:
            from kornia.augmentation import ColorJitter, RandomHorizontalFlip  # pyright: ignore[reportMissingImports]

            ranges = DISTORTIONS[self.distortion]
            self.steps = [RandomHorizontalFlip(p=0.5)] if self.flip else []
            self.steps += [ColorJitter(*ranges)] if ranges else []
        return self.steps


def to_batch(images: "list[Image.Image]") -> Tensor:
    """RGB images of one size as float32 (n, 3, height, width) in [0, 1]."""
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format).div_(255)
