"""The order of the images depends on seed, epoch and position alone, and on nothing that happened before."""

import itertools

import pytest
import torch

from batchnorm.errors import DataError
from batchnorm.experiments.data.shuffling import Order, epoch_order

SIZES = [5, 3, 5, 7, 4]
STARTS = [0, 5, 8, 13, 20, 24]


@pytest.mark.parametrize("within", [True, False])
def test_an_epoch_has_every_image_once_and_shards_stay_together(within: bool):
    for epoch in range(5):
        order = epoch_order(SIZES, 3, epoch, within_shards=within).tolist()
        assert sorted(order) == list(range(24))
        shards = [sum(image >= start for start in STARTS) for image in order]
        assert len(set(itertools.pairwise(shards)) - {(i, i) for i in range(6)}) == 4


def test_without_shuffling_within_shards_their_images_stay_in_order():
    order = epoch_order(SIZES, 3, 1, within_shards=False).tolist()
    followers = sum(b == a + 1 for a, b in itertools.pairwise(order))
    assert followers >= 24 - len(SIZES)
    assert order != list(range(24))


def test_seeds_and_epochs_have_orders_of_their_own():
    orders = {
        tuple(epoch_order(SIZES, seed, epoch, within_shards=True).tolist()) for seed in range(4) for epoch in range(4)
    }
    assert len(orders) == 16


def test_any_step_can_be_asked_for_and_the_global_generator_does_not_matter():
    straight = Order(SIZES, seed=1, batch_size=5)
    steps = [straight.step(i) for i in range(12)]
    torch.manual_seed(99)
    state = torch.get_rng_state()
    jumping = Order(SIZES, seed=1, batch_size=5)
    assert [jumping.step(i) for i in reversed(range(12))] == steps[::-1]
    assert torch.get_rng_state().equal(state)


def test_an_incomplete_last_batch_is_left_out():
    order = Order(SIZES, seed=1, batch_size=5)
    assert order.steps_per_epoch == 4
    for epoch in range(3):
        seen = [image for step in range(4) for image in order.step(4 * epoch + step)]
        assert len(set(seen)) == 20


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_processes_share_the_images_of_a_step(world_size: int):
    whole = Order(SIZES, seed=1, batch_size=12)
    ranks = [
        Order(SIZES, seed=1, batch_size=12 // world_size, rank=r, world_size=world_size) for r in range(world_size)
    ]
    for step in range(6):
        parts = [rank.step(step) for rank in ranks]
        assert [image for together in zip(*parts, strict=True) for image in together] == whole.step(step)


def test_a_set_smaller_than_a_step_is_refused():
    with pytest.raises(
        DataError, match=r"training set has 24 images, expected at least the 26 of one step; take smaller"
    ):
        Order(SIZES, seed=0, batch_size=13, world_size=2)
