"""Moments in a session of TensorFlow, which is played by a function here; the real one is in the tutorial's test."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import batchnorm


def session(**tensors: np.ndarray) -> Any:
    """Each feed is the number of a batch."""

    def run(fetches: Any, feed: Any) -> Any:
        return {path: tensors[x][feed["batch"]] for path, x in fetches.items()}

    return SimpleNamespace(run=run, graph=SimpleNamespace(get_operations=list))


FEEDS = [{"batch": 0}, {"batch": 1}]


def test_batches_of_any_size_are_one_population_far_from_zero_too():
    generator = np.random.default_rng(0)
    batches = [1e4 + generator.normal(size=(count, 3, 3, 2)).astype("f4") for count in (5, 11)]
    found = batchnorm.measure_tensorflow(session(x=batches), FEEDS, {"bn": "x"})
    every = np.concatenate([batch.astype("f8").reshape(-1, 2) for batch in batches])
    np.testing.assert_allclose(found["bn"][0], every.mean(0), rtol=1e-14)
    np.testing.assert_allclose(found["bn"][1], every.var(0, ddof=1), rtol=1e-11)


@pytest.mark.parametrize(
    ("batches", "feeds", "inputs", "message"),
    [
        ([np.ones((2, 1))] * 2, [], {"bn": "x"}, "no feeds to measure on"),
        ([np.ones((2, 1))] * 2, FEEDS, None, "no fused batch normalization"),
        ([np.ones((1, 1))] * 2, FEEDS[:1], {"bn": "x"}, "'bn' received one value per channel"),
        ([np.full((2, 1), np.inf)] * 2, FEEDS, {"bn": "x"}, "'bn' received inf or NaN"),
    ],
)
def test_what_gives_no_moments_is_refused(batches: Any, feeds: Any, inputs: Any, message: str):
    with pytest.raises(ValueError, match=message):
        batchnorm.measure_tensorflow(session(x=batches), feeds, inputs)
