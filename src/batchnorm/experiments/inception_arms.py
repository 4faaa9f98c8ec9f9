"""What is compared in section 4.2: the arms, what each changes, and the settings of each preset."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from batchnorm.experiments.models.inception import Inception

# Section 4.2.1: what BN allows to change. BN-x5 and BN-x30 make all of these changes.
CHANGES = {
    "learning-rate": "higher learning rate",
    "dropout": "no Dropout",
    "l2": "L2 weight regularization divided by 5",
    "decay": "learning rate decays 6 times faster",
    "lrn": "no local response normalization",
    "shuffling": "shuffled within shards too",
    "distortion": "weaker photometric distortion",
}
ALL = frozenset(CHANGES)


@dataclasses.dataclass(frozen=True)
class Arm:
    """A network and how it is trained. ``factor`` times the base learning rate is used where that is changed."""

    name: str
    batch_norm: bool = True
    activation: str = "relu"
    factor: float = 1.0
    changes: frozenset[str] = frozenset()

    def without(self, change: str) -> "Arm":
        """The same but for one change: an ablation."""
        return dataclasses.replace(self, name=f"{self.name} without {change}", changes=self.changes - {change})

    def describe(self) -> list[str]:
        """What sets it apart from the plain network, in words."""
        words = ["BN before every nonlinearity"] if self.batch_norm else []
        words += ["sigmoid instead of ReLU"] if self.activation == "sigmoid" else []
        for change, text in CHANGES.items():
            if change in self.changes:
                words.append(f"{text}: {self.factor:g} times" if change == "learning-rate" else text)
        return words


BASELINE = "Inception"
PAPER_ARMS = {
    arm.name: arm
    for arm in (
        Arm(BASELINE, batch_norm=False),
        Arm("BN-Baseline"),
        Arm("BN-x5", factor=5, changes=ALL),
        Arm("BN-x30", factor=30, changes=ALL),
        Arm("BN-x5-Sigmoid", activation="sigmoid", factor=5, changes=ALL),
    )
}
# Section 4.2.2 says of these in passing that they do not train at all.
OTHER_ARMS = {
    arm.name: arm
    for arm in (
        Arm("Inception-x5", batch_norm=False, factor=5, changes=frozenset({"learning-rate"})),
        Arm("Inception-Sigmoid", batch_norm=False, activation="sigmoid"),
    )
}
ARMS = PAPER_ARMS | OTHER_ARMS


def arm_named(name: str) -> Arm:
    """An arm by its name; "BN-x5 without decay" and the like are ablations.

    Raises:
        KeyError: there is no such arm.
    """
    base, _, change = name.partition(" without ")
    return ARMS[base].without(change) if change in ARMS[base].changes else ARMS[name]


@dataclasses.dataclass(frozen=True)
class Options:
    """The settings of a run: all that determines its numbers, except for the images themselves.

    ``data`` is the name of the image set. ``base_learning_rate`` is that of the plain network; None where a sweep
    chooses it. ``half_life`` counts the steps in which the plain network's learning rate halves. ``batch_size`` is that
    of one process, which takes ``accumulate`` of them for a step.
    """

    preset: str = "small"
    data: str = "mnist"
    steps: int = 8000
    evaluations: int = 32
    size: int = 64
    width: float = 0.5
    batch_size: int = 32
    accumulate: int = 1
    seeds: tuple[int, ...] = (0,)
    arms: tuple[str, ...] = tuple(PAPER_ARMS)
    base_learning_rate: float | None = None
    half_life: int = 8000
    momentum: float = 0.9
    weight_decay: float = 2e-4
    dropout: float = 0.4
    device: str = "cpu"
    precision: str = "float32"
    channels_last: bool = True
    world_size: int = 1

    @property
    def evaluation_steps(self) -> frozenset[int]:
        """Evenly spaced, the last step among them."""
        return frozenset(-(-self.steps * part // self.evaluations) for part in range(1, self.evaluations + 1))

    def learning_rate(self, arm: Arm, base: float) -> Callable[[int], float]:
        """Exponential decay, of a step counted from 0."""
        initial = base * (arm.factor if "learning-rate" in arm.changes else 1.0)
        half_life = self.half_life / (6 if "decay" in arm.changes else 1)
        return lambda step: initial * math.exp2(-step / half_life)

    def network(self, arm: Arm, num_classes: int, **variations: Any) -> Inception:
        settings = {
            "dropout": 0.0 if "dropout" in arm.changes else self.dropout,
            "local_response_norm": "lrn" not in arm.changes,
        }
        return Inception(
            num_classes,
            batch_norm=arm.batch_norm,
            activation=arm.activation,
            width=self.width,
            **settings | variations,
        )

    def weight_decay_of(self, arm: Arm) -> float:
        return self.weight_decay / (5 if "l2" in arm.changes else 1)


# 0.0015 is the paper's. GoogLeNet, whose schedule the paper continues, multiplies by 0.96 every 8 epochs, which halves
# in 5.4 million steps of 32 images. 31 million steps are those of the plain network in Figure 3.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "steps": 31_000_000,
        "evaluations": 310,
        "size": 224,
        "width": 1.0,
        "half_life": 5_436_000,
        "base_learning_rate": 0.0015,
    },
    # The plain rate halves over the run, so that 6 times faster ends at 1/64.
    "small": {"steps": 8000, "evaluations": 32, "size": 64, "width": 0.5, "half_life": 8000},
}
# For every other preset, the plain network's learning rate that does best in so many steps
RATES = (0.005, 0.01, 0.02, 0.04, 0.08)
SWEEP_STEPS = 800

NOTES = (
    "The paper gives the network, the arms, the mini-batch of 32, the learning rates 0.0015, 0.0075 and 0.045, and "
    "that they decay exponentially, 6 times faster in the changed networks. It does not give the momentum (0.9 here, "
    "as in GoogLeNet), the decay, the L2 weight (2e-4 here, on weights alone), the strength of the distortions, "
    "initial values (He's here) or epsilon.",
    "Places and rates of Dropout (40 %) and of local response normalization are GoogLeNet's.",
    "Outside the paper's own preset, the base learning rate is the best of a short sweep of the plain network alone; "
    "BN-x5 and BN-x30 take 5 and 30 times that, as in the paper.",
    "Validation accuracy is that of the center crop, with running averages as population statistics; the last row also "
    "has Algorithm 2.",
    "All arms of a seed see the same images in the same order, apart from what the arm itself changes.",
)
