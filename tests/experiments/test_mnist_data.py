"""What the networks get to see of the bundled database."""

import numpy as np
import pytest
import torch

from batchnorm.experiments.data.idx import read_idx
from batchnorm.experiments.data.mnist import BINARY_THRESHOLD, BUNDLED, TEST_IMAGES, Mnist, load_mnist

TRAIN_COUNTS = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
TEST_COUNTS = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


@pytest.fixture(scope="module")
def raw() -> np.ndarray:
    name, shape, md5 = TEST_IMAGES
    return read_idx(BUNDLED / f"{name}.gz", shape, md5).reshape(10_000, 784)


def test_labels_are_the_ten_digits_in_the_published_numbers(mnist: Mnist):
    assert mnist.train_labels.bincount().tolist() == TRAIN_COUNTS
    assert mnist.test_labels.bincount().tolist() == TEST_COUNTS
    assert mnist.train_labels.dtype == torch.int64


def test_binary_inputs_are_0_or_1_with_the_stated_threshold(mnist: Mnist, raw: np.ndarray):
    inputs = mnist.inputs(mnist.test_images)
    assert inputs.dtype == torch.float32
    assert inputs.unique().tolist() == [0.0, 1.0]
    np.testing.assert_array_equal(inputs.numpy(), raw >= BINARY_THRESHOLD)
    assert {BINARY_THRESHOLD - 1, BINARY_THRESHOLD} <= set(np.unique(raw).tolist())


def test_gray_inputs_are_the_pixels_from_0_to_1(raw: np.ndarray):
    gray = load_mnist(input="gray")
    inputs = gray.inputs(gray.test_images)
    assert (inputs.min(), inputs.max()) == (0.0, 1.0)
    np.testing.assert_allclose(inputs.numpy(), raw / 255, rtol=1e-6)


def test_inputs_leave_the_images_as_they_were(mnist: Mnist):
    before = mnist.test_images[:10].clone()
    mnist.inputs(mnist.test_images[:10]).add_(1)
    assert mnist.test_images[:10].equal(before)
