"""The arms change exactly what section 4.2.1 lists, each change alone if one wants."""

import pytest
from torch import nn

from batchnorm.experiments.inception_arms import ALL, ARMS, CHANGES, PAPER_ARMS, PRESETS, Options, arm_named

OPTIONS = Options(width=0.1)


def facts(name: str) -> dict[str, object]:
    """What an arm does about each change, and the network it makes."""
    arm = arm_named(name)
    network = OPTIONS.network(arm, 10)
    rate = OPTIONS.learning_rate(arm, 0.01)
    halvings = [step for step in range(0, 10_000, 100) if rate(step) >= rate(0) / 2 - 1e-12]
    return {
        "batch_norm": any(isinstance(m, nn.BatchNorm2d) for m in network.modules()),
        "learning-rate": round(rate(0), 6),
        "dropout": network.dropout.p,
        "l2": OPTIONS.weight_decay_of(arm),
        "decay": halvings[-1],
        "lrn": any(isinstance(m, nn.LocalResponseNorm) for m in network.modules()),
        "shuffling": "shuffling" in arm.changes,
        "distortion": "distortion" in arm.changes,
    }


PLAIN = {
    "batch_norm": False,
    "learning-rate": 0.01,
    "dropout": 0.4,
    "l2": 2e-4,
    "decay": 8000,
    "lrn": True,
    "shuffling": False,
    "distortion": False,
}
X5 = {
    "batch_norm": True,
    "learning-rate": 0.05,
    "dropout": 0.0,
    "l2": 4e-5,
    "decay": 1300,
    "lrn": False,
    "shuffling": True,
    "distortion": True,
}


def test_arms_are_those_of_the_paper():
    assert list(PAPER_ARMS) == ["Inception", "BN-Baseline", "BN-x5", "BN-x30", "BN-x5-Sigmoid"]
    assert facts("Inception") == PLAIN
    assert facts("BN-Baseline") == PLAIN | {"batch_norm": True}
    assert facts("BN-x5") == X5
    assert facts("BN-x30") == X5 | {"learning-rate": 0.3}
    assert facts("BN-x5-Sigmoid") == X5
    assert facts("Inception-x5") == PLAIN | {"learning-rate": 0.05}


@pytest.mark.parametrize("change", CHANGES)
def test_each_change_can_be_left_out_alone(change: str):
    assert facts(f"BN-x5 without {change}") == X5 | {change: PLAIN[change]}
    assert CHANGES[change] not in " ".join(arm_named(f"BN-x5 without {change}").describe())


@pytest.mark.parametrize("name", ["BN-x6", "BN-x5 without", "BN-x5 without bn", "Inception without dropout", ""])
def test_arm_that_there_is_not_is_refused(name: str):
    with pytest.raises(KeyError):
        arm_named(name)


def test_descriptions_name_every_difference():
    assert arm_named("Inception").describe() == []
    assert len(ARMS["BN-x30"].describe()) == 1 + len(ALL)
    assert "higher learning rate: 30 times" in ARMS["BN-x30"].describe()
    assert ARMS["BN-x5-Sigmoid"].describe()[1] == "sigmoid instead of ReLU"


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_options(preset: str):
    options = Options(preset=preset, **PRESETS[preset])
    assert options.batch_size == 32


def test_preset_of_the_paper_has_its_learning_rates():
    options = Options(**PRESETS["paper"])
    rates = [options.learning_rate(arm, 0.0015)(0) for arm in PAPER_ARMS.values()]
    assert rates == pytest.approx([0.0015, 0.0015, 0.0075, 0.045, 0.0075])
