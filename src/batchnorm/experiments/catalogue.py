"""Every experiment of ``batchnorm reproduce``: what it shows, where the claim is from, how long it takes."""

from typing import NamedTuple


class Entry(NamedTuple):
    """An experiment. ``minutes``: expected on two cores. ``module``: where its ``STUDY`` is, if it is one."""

    name: str
    claim: str
    source: str
    minutes: float
    module: str | None = None


IOFFE = "Ioffe & Szegedy 2015"
EXPERIMENTS = (
    Entry(
        "mnist", "Figure 1: accuracy with and without BN, and how a sigmoid's input moves", f"{IOFFE}, section 4.1", 1.5
    ),
    Entry(
        "inception",
        "Figures 2 and 3: Inception with and without BN, at 5 and 30 times the rate",
        f"{IOFFE}, section 4.2",
        75,
    ),
    Entry(
        "ensemble",
        "Figure 4: six varied networks, one crop, 144 crops, and their ensemble",
        f"{IOFFE}, section 4.2.3",
        70,
    ),
    Entry(
        "outside-gradient",
        "Normalization that the gradient ignores: a bias drifts at constant loss, a scale blows up",
        f"{IOFFE}, section 2",
        0.5,
        "batchnorm.experiments.outside_gradient",
    ),
)
BY_NAME = {entry.name: entry for entry in EXPERIMENTS}
