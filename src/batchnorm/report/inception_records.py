"""The records of an Inception run: arms, how fast each reaches the plain network's accuracy, and the curves."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchnorm.report.fields import count, finite, fraction, objects, optional, text, texts
from batchnorm.report.records import Records, Run, read_run
from batchnorm.report.text import clean
from batchnorm.report.training_records import (
    CHANGE_LIMIT,
    CHANGES_LIMIT,
    NAME_LIMIT,
    RateSearch,
    Setting,
    TrainingEvaluation,
    read_search,
    read_setting,
    read_training,
    shown_names,
)


@dataclass(frozen=True)
class Arm:
    """How an arm was trained, and what came of it: a row of Figure 3. ``best_accuracy`` is NaN if it diverged."""

    arm: str
    changes: list[str]
    learning_rate: float
    weight_decay: float | None
    dropout: float | None
    parameters: int
    steps_to_baseline: int | None
    best_accuracy: float
    best_step: int | None


@dataclass(frozen=True)
class InceptionRun(Run):
    """A run of some arms. ``baseline_accuracy`` is the plain network's best; NaN if it diverged or was not trained."""

    setting: Setting
    evaluations: list[TrainingEvaluation]
    arms: list[Arm]
    baseline_accuracy: float
    base_learning_rate: RateSearch | None


def read_inception(records: Records) -> InceptionRun:
    claims, path = records.claims, records.folder / "claims.json"
    arms = [read_arm(entry, path) for entry in objects(claims, "arms", path)]
    run = read_run(records, shown_names([arm.arm for arm in arms], path))
    return InceptionRun(
        **vars(run),
        setting=read_setting(run.options, records.folder / "config.json"),
        evaluations=read_training(records.folder / "metrics.jsonl", run.names),
        arms=arms,
        baseline_accuracy=fraction(claims, "baseline_accuracy", path),
        base_learning_rate=read_search(claims, path),
    )


def read_arm(entry: dict[str, Any], path: Path) -> Arm:
    arm = text(entry, "arm", path, "arms: ")
    where = f"arm {clean(arm, NAME_LIMIT)}: "
    return Arm(
        arm=arm,
        changes=[clean(change, CHANGE_LIMIT) for change in texts(entry, "changes", path, where)[:CHANGES_LIMIT]],
        learning_rate=finite(entry, "learning_rate", path, where),
        weight_decay=optional(finite, entry, "weight_decay", path, where),
        dropout=optional(finite, entry, "dropout", path, where),
        parameters=count(entry, "parameters", path, where),
        steps_to_baseline=optional(count, entry, "steps_to_baseline", path, where),
        best_accuracy=fraction(entry, "best_accuracy", path, where),
        best_step=optional(count, entry, "best_step", path, where),
    )
