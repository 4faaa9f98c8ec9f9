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
        1,
        "batchnorm.experiments.outside_gradient",
    ),
    Entry(
        "whitening",
        "Full whitening against BN: cost, training, singular covariances, and what its gradient is for",
        f"{IOFFE}, sections 2 and 3",
        5,
        "batchnorm.experiments.whitening",
    ),
    Entry(
        "batch-size",
        "Batches of 2 to 512 with BN, Ghost BN and Batch Renorm, evaluated with running and population statistics",
        "Ioffe 2017; Hoffer et al. 2017; Wu & Johnson 2021",
        5,
        "batchnorm.experiments.batch_size",
    ),
    Entry(
        "scale",
        "BN does not see the scale of weights: identities, growth of |W|, accuracy over the initial scale",
        f"{IOFFE}, section 3.3; van Laarhoven 2017",
        5,
        "batchnorm.experiments.scale",
    ),
    Entry(
        "placement",
        "BN before or after the nonlinearity, with and without bias, gamma and beta",
        f"{IOFFE}, sections 3 and 3.2",
        6,
        "batchnorm.experiments.placement",
    ),
    Entry(
        "regularization",
        "BN against Dropout and L2: what is left for them to do",
        f"{IOFFE}, sections 3.4 and 4.2.1",
        7,
        "batchnorm.experiments.regularization",
    ),
)
BY_NAME = {entry.name: entry for entry in EXPERIMENTS}
