"""The bundled data, read once, and a small part of it for training in the test's own process."""

import pytest

from batchnorm.experiments.data.mnist import Mnist, load_mnist


@pytest.fixture(scope="session")
def mnist() -> Mnist:
    return load_mnist()


@pytest.fixture(scope="session")
def small_mnist(mnist: Mnist) -> Mnist:
    """1,220 training images, which do not fill their last batch of 60, and 500 test images."""
    return Mnist(
        mnist.train_images[:1220], mnist.train_labels[:1220], mnist.test_images[:500], mnist.test_labels[:500], 1.0
    )
