"""What the runs of the ImageNet experiments have in common: their setting, and a row of metrics per evaluation."""

import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchnorm.report.fields import (
    OPTIONAL_NUMBER,
    OPTIONAL_OBJECT,
    broken,
    count,
    field,
    finite,
    fraction,
    objects,
    real,
    text,
)
from batchnorm.report.metrics import Evaluation, check_complete, read_rows
from batchnorm.report.text import clean

NAME_LIMIT = 60
CHANGE_LIMIT = 200
CHANGES_LIMIT = 20
PAPER_PRESET = "paper"
STAND_IN = "mnist"


@dataclass(frozen=True)
class Setting:
    """What was trained on what, as far as the page says it in words."""

    preset: str
    data: str
    classes: int
    training_images: int
    validation_images: int
    steps: int
    batch_size: int
    size: int  # pixels
    width: float  # of the paper's network


@dataclass(frozen=True)
class TrainingEvaluation(Evaluation):
    """A network on the validation images. Every number of one that diverged is NaN, even if it still hits a label."""

    accuracy_population: float  # with Algorithm 2; at the last step only
    top5: float
    validation_loss: float
    training_loss: float
    learning_rate: float
    skipped_images: int


@dataclass(frozen=True)
class RateSearch:
    """Validation accuracy and loss by learning rate, NaN where the network diverged, and the rule that chose one."""

    candidates: list[tuple[float, float, float]]
    chosen: float
    rule: str


def read_setting(options: dict[str, Any], path: Path) -> Setting:
    where = "options: "
    width = finite(options, "width", path, where)
    return Setting(
        preset=clean(text(options, "preset", path, where), NAME_LIMIT),
        data=clean(text(options, "data", path, where), NAME_LIMIT),
        classes=count(options, "classes", path, where),
        training_images=count(options, "training_images", path, where),
        validation_images=count(options, "validation_images", path, where),
        steps=count(options, "steps", path, where),
        batch_size=count(options, "batch_size", path, where),
        size=count(options, "size", path, where),
        width=width,
    )


def read_training(path: Path, arms: Collection[str]) -> list[TrainingEvaluation]:
    """All rows: of these arms and no others, every network of an arm at the same steps."""
    rows = [read_row(row, arms, path, where) for row, where in read_rows(path)]
    check_complete(rows, path)
    for arm in arms:
        if not any(row.arm == arm for row in rows):
            raise broken(path, f"no row of arm {clean(arm, NAME_LIMIT)}", "rows of every arm in claims.json")
    return rows


def read_row(row: dict[str, Any], arms: Collection[str], path: Path, where: str) -> TrainingEvaluation:
    arm = text(row, "arm", path, where)
    if arm not in arms:
        raise broken(path, f"{where}'arm' is {clean(arm, NAME_LIMIT)}", "an arm of claims.json")
    loss = real(field(row, "validation_loss", OPTIONAL_NUMBER, path, where))
    accuracies = [
        fraction({name: None} | row if name.endswith("population") else row, name, path, where)
        for name in ("validation_accuracy", "validation_accuracy_population", "validation_top5")
    ]
    accuracy, population, top5 = [math.nan] * 3 if math.isnan(loss) else accuracies
    return TrainingEvaluation(
        arm=arm,
        seed=count(row, "seed", path, where),
        step=count(row, "step", path, where),
        accuracy=accuracy,
        accuracy_population=population,
        top5=top5,
        validation_loss=loss,
        training_loss=real(field(row, "training_loss", OPTIONAL_NUMBER, path, where)),
        learning_rate=finite(row, "learning_rate", path, where),
        skipped_images=count(row, "skipped_images", path, where),
    )


def shown_names(arms: Collection[str], path: Path) -> dict[str, str]:
    """Arms as a reader sees them; each once, and at least one."""
    if not arms:
        raise broken(path, "no arms", "at least one")
    names: dict[str, str] = {}
    for arm in arms:
        if arm in names:
            raise broken(path, f"{clean(arm, NAME_LIMIT)} is there twice", "every arm once")
        names[arm] = clean(arm, NAME_LIMIT)
    return names


def read_search(claims: dict[str, Any], path: Path) -> RateSearch | None:
    """None where the learning rate was given, and so not searched for."""
    record = field(claims, "base_learning_rate", OPTIONAL_OBJECT, path)
    if record is None:
        return None
    where = "base_learning_rate: "
    return RateSearch(
        candidates=[
            (
                finite(entry, "learning_rate", path, where),
                fraction(entry, "validation_accuracy", path, where),
                real(entry.get("validation_loss")),
            )
            for entry in objects(record, "candidates", path, where)
        ],
        chosen=finite(record, "chosen", path, where),
        rule=text(record, "rule", path, where),
    )
