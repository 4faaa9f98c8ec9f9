"""Nine lines are told apart: by dashes, and where dashes repeat by color, with every common color blindness."""

import itertools

import numpy as np
import pytest

from batchnorm.report.looks import COLORS, Look, looks

# Machado, Oliveira and Fernandes 2009, severity 1, for linear RGB
BLINDNESS = {
    "none": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
NINE = [str(i) for i in range(9)]


def linear(color: str) -> np.ndarray:
    rgb = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIELAB under D65."""
    ratio = TO_XYZ @ np.clip(rgb, 0, 1) / TO_XYZ.sum(1)
    x, y, z = np.where(ratio > 216 / 24389, np.cbrt(ratio), (24389 / 27 * ratio + 16) / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("color", COLORS)
def test_lines_stand_out_from_white(color: str) -> None:
    luminance = float(TO_XYZ[1] @ linear(color))
    assert 1.05 / (luminance + 0.05) >= 3


@pytest.mark.parametrize("blindness", BLINDNESS)
def test_colors_differ_most_where_dashes_do_not(blindness: str) -> None:
    seen = {arm: lab(BLINDNESS[blindness] @ linear(look.color)) for arm, look in looks(NINE).items()}
    for first, second in itertools.combinations(NINE, 2):
        same_dashes = looks(NINE)[first].dashes == looks(NINE)[second].dashes
        distance = np.linalg.norm(seen[first] - seen[second])
        assert distance >= (30 if same_dashes or blindness == "none" else 10), (first, second)


def test_45_lines_differ() -> None:
    assert len(set(looks(map(str, range(45))).values())) == 45
    assert looks(map(str, range(46)))["45"] == looks(NINE)["0"]


def test_first_two_are_those_of_the_other_figures() -> None:
    assert list(looks(["plain", "bn"]).values()) == [Look("#d55e00", (4, 1.6)), Look("#0072b2", ())]
