"""A training batch is made of its step alone: crops, mirror images, distortions, resumed or not."""

import colorsys
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import places, write_folders, write_shards
from PIL import Image

from batchnorm.errors import MissingExtraError
from batchnorm.experiments.data.augmentation import Augmentation
from batchnorm.experiments.data.batches import Batch, EvalBatches, TrainBatches
from batchnorm.experiments.data.crops import crops_144
from batchnorm.experiments.data.image_set import ImageData
from batchnorm.experiments.data.images import mnist_images, open_images


@pytest.fixture(params=["folders", "shards"])
def data(request: pytest.FixtureRequest, tmp_path: Path) -> ImageData:
    return open_images({"folders": write_folders, "shards": write_shards}[request.param](tmp_path))


def same(a: Batch, b: Batch) -> bool:
    return a.images.equal(b.images) and a.labels.equal(b.labels) and a.skipped == b.skipped


def test_a_resumed_run_sees_the_batches_of_one_that_never_stopped(data: ImageData):
    settings = {"size": 16, "batch_size": 4, "seed": 5}
    straight = TrainBatches(data.train, **settings)
    batches = [straight[step] for step in range(8)]
    torch.manual_seed(1234)
    resumed = TrainBatches(data.train, **settings)
    assert all(same(resumed[step], batches[step]) for step in range(5, 8))
    images, labels, skipped = batches[0]
    assert (images.shape, images.dtype, labels.dtype, skipped) == ((4, 3, 16, 16), torch.float32, torch.int64, [])
    assert images.is_contiguous()
    assert -1 <= images.min() < images.max() <= 1


def test_epochs_seeds_and_ranks_draw_numbers_of_their_own(data: ImageData):
    def batches(seed: int = 0, rank: int = 0) -> TrainBatches:
        return TrainBatches(data.train, size=8, batch_size=6, seed=seed, rank=rank, world_size=2)

    first = batches()
    others = [first[first.steps_per_epoch], batches(seed=1)[0], batches(rank=1)[0]]
    assert not any(other.images.equal(first[0].images) for other in others)


def test_an_epoch_has_every_image_once(data: ImageData):
    batches = TrainBatches(data.train, size=8, batch_size=4, seed=0, distortion="none")
    assert batches.steps_per_epoch == 3
    # every picture has one colour, which no crop changes
    colors = torch.cat([batches[step].images[:, 1, 0, 0] for step in range(3)])
    assert len(set(colors.tolist())) == 12


def test_processes_share_a_step_and_no_image_comes_twice(data: ImageData):
    ranks = [
        TrainBatches(data.train, size=8, batch_size=3, seed=0, distortion="none", rank=r, world_size=2) for r in (0, 1)
    ]
    whole = TrainBatches(data.train, size=8, batch_size=6, seed=0, distortion="none")[1]
    colors = torch.stack([rank[1].images[:, 1, 0, 0] for rank in ranks], 1).flatten()
    assert colors.equal(whole.images[:, 1, 0, 0])


def test_making_a_batch_leaves_the_global_generator_alone(data: ImageData):
    state = torch.get_rng_state()
    TrainBatches(data.train, size=8, batch_size=4, seed=0)[0]
    assert torch.get_rng_state().equal(state)


def crops_of(image: Image.Image, count: int, **settings: object) -> np.ndarray:
    """Pixels of many crops, 0 to 255."""
    augmentation = Augmentation(32, distortion="none", **settings)
    return ((augmentation([image] * count, 0) + 1) * 127.5).numpy()


@pytest.mark.parametrize(("width", "height"), [(64, 64), (80, 50), (50, 80)])
def test_crops_have_the_stated_areas_and_shapes_and_lie_everywhere(width: int, height: int):
    crops = crops_of(places(width, height, step=3), 400, flip=False)
    # half a step of the output is lost on either side
    widths, heights = ((crops[:, c].max((1, 2)) - crops[:, c].min((1, 2))) / 3 * 32 / 31 for c in (0, 1))
    areas, aspects = widths * heights / (width * height), widths / heights
    assert 0.06 < areas.min() < 0.15
    # at most the whole width or height in a shape of 4/3
    largest = min(1, 4 / 3 * min(width, height) / max(width, height))
    assert 0.85 * largest < areas.max() < 1.05 * largest
    assert 0.68 < aspects.min() < 0.82
    assert 1.22 < aspects.max() < 1.47
    assert crops[:, 0].min() < 3
    assert crops[:, 0].max() > 3 * (width - 2)
    assert (np.diff(crops[:, 0], axis=2) >= 0).all()


def test_half_of_the_images_are_mirrored_unless_they_must_not_be():
    crops = crops_of(places(64, 64), 400)
    mirrored = crops[:, 0, 0, 0] > crops[:, 0, 0, -1]
    assert 150 < mirrored.sum() < 250
    # rows stay where they are
    assert (np.diff(crops[:, 1], axis=1) >= 0).all()


def test_images_of_several_sizes_make_a_batch_in_their_order():
    colors = [10, 60, 110, 160, 210]
    images = [Image.new("RGB", (9 + 3 * (i % 2), 11), (color, 0, 0)) for i, color in enumerate(colors)]
    batch = Augmentation(8, distortion="none")(images, 3)
    assert ((batch[:, 0] + 1) * 127.5).mean((1, 2)).round().tolist() == colors


@pytest.mark.parametrize(("distortion", "brightness", "turn"), [("full", 32 / 255, 0.2), ("reduced", 16 / 255, 0.1)])
def test_distortions_stay_within_their_ranges_and_use_them(distortion: str, brightness: float, turn: float):
    augmentation = Augmentation(4, distortion=distortion)
    gray = (augmentation([Image.new("RGB", (8, 8), (102, 102, 102))] * 200, 0) + 1) / 2
    # contrast, saturation and hue leave a gray area as it is
    factors = gray[:, 0].mean((1, 2)) / 0.4
    assert factors.min() == pytest.approx(1 - brightness, abs=0.1 * brightness)
    assert factors.max() == pytest.approx(1 + brightness, abs=0.1 * brightness)
    red = (augmentation([Image.new("RGB", (8, 8), (140, 110, 110))] * 200, 0) + 1) / 2
    hues = [(colorsys.rgb_to_hsv(*color)[0] + 0.5) % 1 - 0.5 for color in red[:, :, 0, 0].tolist()]
    assert max(hues) == pytest.approx(turn, rel=0.1)
    assert min(hues) == pytest.approx(-turn, rel=0.1)


def test_distorted_images_stay_within_bounds_and_undistorted_ones_are_the_pixels():
    white = [Image.new("RGB", (8, 8), "white")] * 50
    assert Augmentation(8)(white, 0).abs().max() == 1
    assert Augmentation(8, distortion="none")(white, 0).unique().tolist() == [1]


def test_another_distortion_is_refused():
    with pytest.raises(ValueError, match="distortion 'strong': expected one of full, reduced, none"):
        Augmentation(8, distortion="strong")


@pytest.mark.parametrize("package", ["kornia", "PIL"])
def test_a_missing_package_names_the_extra(data: ImageData, monkeypatch: pytest.MonkeyPatch, package: str):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=re.escape("is not installed: pip install 'batchnorm[vision]'")):
        TrainBatches(data.train, size=8, batch_size=4, seed=0)


def test_an_evaluation_has_every_image_in_order(data: ImageData):
    batches = EvalBatches(data.train, size=8, batch_size=5)
    assert len(batches) == 3
    found = [batches[i] for i in range(3)]
    assert [len(batch.images) for batch in found] == [5, 5, 2]
    assert torch.cat([batch.labels for batch in found]).tolist() == data.train.labels.tolist()
    assert len(set(torch.cat([batch.images[:, 1, 0, 0] for batch in found]).tolist())) == 12
    with pytest.raises(IndexError, match="batch 3 of 3"):
        batches[3]


def test_an_evaluation_can_take_144_crops(data: ImageData):
    batch = EvalBatches(data.val, size=7, batch_size=3, crops=crops_144)[1]
    assert batch.images.shape == (1, 144, 3, 7, 7)
    assert batch.labels.shape == (1,)


def test_digits_come_as_they_are_or_enlarged():
    data = mnist_images()
    same_size = EvalBatches(data.val, size=28, batch_size=4)[0].images
    expected = np.stack([np.asarray(data.val.load(i)) for i in range(4)]).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(same_size.numpy(), expected / 127.5 - 1, atol=1e-6)
    assert TrainBatches(data.train, size=64, batch_size=2, seed=0, flip=data.flip)[7].images.shape == (2, 3, 64, 64)
