"""Rules about values on layers that no training makes: they say something or nothing, but never fail."""

import warnings

import numpy as np
import pytest

from batchnorm.doctor.catalogue import RULES
from batchnorm.doctor.rule import Needs
from doctor.layers_by_hand import findings_of, make_layer

CODES = [rule.code for rule in RULES if "BN100" <= rule.code <= "BN109" and rule.needs <= {Needs.FILE}]
VALUES = [0.0, -0.0, 1.0, -1.0, 1e-45, 1e-320, 1e-5, -1e-5, 65504.0, 3e38, -3e38, 1e308, np.inf, -np.inf, np.nan]


def hostile(generator: np.random.Generator, path: str):
    size = int(generator.choice([0, 1, 2, 5]))
    kind = str(generator.choice(["float16", "bfloat16", "float32", "float64", "int64", "uint8", "bool"]))

    def array(*shape: int) -> np.ndarray:
        values = generator.choice(VALUES, shape)
        with warnings.catch_warnings():
            # overflow to inf, and inf as an integer, are what is wanted here
            warnings.simplefilter("ignore")
            return values.astype(kind) if hasattr(np, kind) else values.astype("float32")

    def some(*shape: int) -> np.ndarray | None:
        return array(*shape) if generator.random() < 0.8 else None

    return make_layer(
        path,
        framework=str(generator.choice(["torch", "tensorflow", "keras"])),
        dtype=kind,
        sure=bool(generator.random() < 0.5),
        eps=generator.choice([None, *VALUES]),
        momentum=generator.choice([None, *VALUES]),
        weight=some(size),
        bias=some(size),
        running_mean=some(size),
        running_var=some(size),
        num_batches_tracked=some(),
    )


@pytest.mark.parametrize("code", CODES)
def test_any_values_are_survived(code: str):
    generator = np.random.default_rng(0)
    for _ in range(300):
        findings_of(code, *(hostile(generator, str(i)) for i in range(int(generator.integers(0, 4)))))
