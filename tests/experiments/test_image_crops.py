"""Center crop and GoogLeNet's 144 crops, at places checked by hand."""

import numpy as np
import pytest
import torch
from pictures import places
from PIL import Image
from torch import Tensor

from batchnorm.experiments.data.crops import CROPS, center_crop, crops_144


def corner(crop: Tensor) -> tuple[float, float]:
    """Column and row of the top left pixel, from pictures whose red and green tell them."""
    column, row = ((crop[:2, 0, 0] + 1) * 127.5).tolist()
    return round(column, 2), round(row, 2)


def test_an_image_of_the_right_size_is_taken_as_it_is():
    image = places(14, 14)
    crop = center_crop(image, 14)
    expected = np.asarray(image).transpose(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(crop, torch.from_numpy(expected).float())
    assert crop.dtype == torch.float32


def test_the_center_crop_has_seven_eighths_of_the_shorter_side():
    # 16 is 8/7 of 14: nothing is resized, and one pixel is cut off on every side
    crop = center_crop(places(16, 16), 14)
    assert crop.shape == (3, 14, 14)
    assert corner(crop) == (1, 1)
    assert corner(crop.flip(1, 2)) == (14, 14)
    # 224 of 256 pixels: columns 38 + 16 to 38 + 240
    assert corner(center_crop(places(332 - 100, 256), 224)) != corner(center_crop(places(256, 256), 224)) == (16, 16)
    assert corner(center_crop(places(20, 16), 14)) == (3, 1)
    assert corner(center_crop(places(16, 20), 14)) == (1, 3)


@pytest.mark.parametrize("size", [(1, 3000), (3000, 1), (1, 1), (3, 500)])
def test_odd_shapes_do_not_blow_up(size: tuple[int, int]):
    image = Image.new("RGB", size, (255, 0, 0))
    for crop in (center_crop(image, 28), crops_144(image, 14)):
        assert crop.amax((-2, -1)).reshape(-1, 3).unique(dim=0).tolist() == [[1, -1, -1]]


def numbered(crops: Tensor) -> Tensor:
    """(scale, square, crop, mirrored, 3, size, size)."""
    return crops.view(4, 3, 6, 2, *crops.shape[1:])


def test_there_are_144_crops_and_every_second_one_is_the_mirror_image_of_the_one_before():
    crops = crops_144(places(40, 30), 14)
    assert crops.shape == (CROPS, 3, 14, 14)
    assert crops.dtype == torch.float32
    assert crops.is_contiguous()
    assert crops[1::2].equal(crops[::2].flip(-1))
    assert -1 <= crops.min() < crops.max() <= 1


@pytest.mark.parametrize("turned", [False, True], ids=["wide", "high"])
def test_squares_and_corners_of_the_smallest_scale(turned: bool):
    # 16 pixels are 8/7 of 14: the first scale is the image itself
    size = (16, 24) if turned else (24, 16)
    plain = numbered(crops_144(places(*size), 14))[0, :, :, 0]
    for square, offset in enumerate((0, 4, 8)):
        x, y = (0, offset) if turned else (offset, 0)
        found = [corner(plain[square, crop]) for crop in range(5)]
        assert found == [(x, y), (x + 2, y), (x, y + 2), (x + 2, y + 2), (x + 1, y + 1)]


def test_the_scales_are_8_to_11_sevenths_and_the_sixth_crop_is_the_whole_square():
    # 70 x 70 pixels, of which a crop of 14 at scale s / 7 shows 7 / s of each side
    image = places(70, 70, step=3)
    plain = numbered(crops_144(image, 14))[:, 0, :, 0]
    for scale, part in enumerate((7 / 8, 7 / 9, 7 / 10, 7 / 11)):
        for crop in range(5):
            red = (plain[scale, crop, 0] + 1) * 127.5 / 3
            assert (red[0, -1] - red[0, 0]).item() == pytest.approx(part * 70 * 13 / 14, rel=0.03)
        whole = np.asarray(image.resize((14, 14), Image.Resampling.BILINEAR)).transpose(2, 0, 1) / 127.5 - 1
        # resized twice, which blurs the edges
        np.testing.assert_allclose(plain[scale, 5, :, 2:-2, 2:-2], whole[:, 2:-2, 2:-2], atol=0.03)


def test_a_square_image_has_three_times_the_same_square():
    crops = numbered(crops_144(places(32, 32), 14))
    assert crops[:, 0].equal(crops[:, 1])
    assert crops[:, 0].equal(crops[:, 2])
