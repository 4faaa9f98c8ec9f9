"""Run folders of the ImageNet experiments with made-up numbers of realistic shape."""

import json
import math
from pathlib import Path
from typing import Any

from synthetic import ENVIRONMENT, PHASES, claim, write

STEPS = list(range(250, 8001, 250))
SETTINGS = {
    "preset": "small",
    "data": "tiny-imagenet-100",
    "classes": 100,
    "training_images": 50_000,
    "validation_images": 5000,
    "steps": 8000,
    "batch_size": 32,
    "size": 64,
    "width": 0.5,
    "seeds": [0],
    "base_learning_rate": 0.02,
}
NOTES = ["The paper does not give the momentum (0.9 here, as in GoogLeNet)."]
# how high each arm gets, and in how many steps about two thirds of it
SHAPES = {
    "Inception": (0.425, 2600),
    "BN-Baseline": (0.452, 1500),
    "BN-x5": (0.47, 620),
    "BN-x30": (0.481, 900),
    "BN-x5-Sigmoid": (0.31, 2100),
    "BN-x5 without decay": (0.44, 800),
    "BN-x5 without l2": (0.465, 640),
    "BN-x5 without dropout": (0.43, 760),
    "Inception-x5": (0.2, 900),
}
PAPER_ARMS = tuple(SHAPES)[:5]
CHANGES = [
    "BN before every nonlinearity",
    "higher learning rate: 5 times",
    "no Dropout",
    "no local response normalization",
]
SEARCH = {
    "candidates": [
        {"learning_rate": 0.0025, "validation_accuracy": 0.021},
        {"learning_rate": 0.01, "validation_accuracy": 0.062},
        {"learning_rate": 0.02, "validation_accuracy": 0.081},
        {"learning_rate": 0.04, "validation_accuracy": None},
    ],
    "chosen": 0.02,
    "rule": "the highest validation accuracy of Inception after 800 steps with seed 0",
}
CLAIMS = [
    claim(
        "steps-BN-x5",
        statement="BN-x5 reaches the best accuracy of Inception in fewer steps.",
        source="Ioffe & Szegedy 2015, section 4.2, Figure 3",
        rule="ratio of steps; the 95 % interval lies below 1",
        paper="0.068 (2.1 of 31 million steps)",
        unit="ratio of steps",
        values=[0.188],
        mean=0.188,
        low=0.156,
        high=0.219,
        detail="Inception 40.98 % at step 8000, BN-x5 at 1500",
    ),
    claim(
        "sigmoid", statement="With BN, Inception can be trained with sigmoids in place of ReLU.", mean=30.1, unit="%"
    ),
]


def accuracy(arm: str, seed: int, step: int) -> float:
    height, pace = SHAPES.get(arm, (0.4, 1500))
    return height * (1 - math.exp(-((step / pace) ** 0.9))) + 0.004 * math.sin(step / 310 + 2 * seed + pace)


def row(arm: str, seed: int, step: int, **changes: Any) -> dict[str, Any]:
    """A row of metrics.jsonl; ``diverged=True`` makes it that of a diverged network."""
    value = accuracy(arm, seed, step)
    record = {
        "arm": arm,
        "seed": seed,
        "step": step,
        "validation_accuracy": value,
        "validation_top5": value**0.5,
        "validation_loss": 4.6 * (1 - value),
        "training_loss": 4.4 * (1 - value),
        "learning_rate": 0.02 * 2 ** (-step / 8000),
        "skipped_images": 0,
    }
    if step == STEPS[-1]:
        record["validation_accuracy_population"] = value + 0.002 if arm.startswith("BN") else None
    if changes.pop("diverged", False):
        record |= {"validation_accuracy": 0.01, "validation_loss": None, "training_loss": None}
    return record | changes


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def arm_record(arm: str, rows: list[dict[str, Any]], level: float | None) -> dict[str, Any]:
    """What the experiment computes from the rows of the first seed."""
    rows = [row for row in rows if row["arm"] == arm and row["seed"] == 0 and row["validation_loss"] is not None]
    best = max((row["validation_accuracy"] for row in rows), default=None)
    reached = [row["step"] for row in rows if level is not None and row["validation_accuracy"] >= level]
    return {
        "arm": arm,
        "changes": [] if arm == "Inception" else CHANGES,
        "learning_rate": 0.1,
        "weight_decay": 4e-5,
        "dropout": 0.4,
        "parameters": 2_914_020,
        "steps_to_baseline": reached[0] if reached else None,
        "best_accuracy": best,
        "best_step": next((row["step"] for row in rows if row["validation_accuracy"] == best), None),
    }


def write_common(folder: Path, experiment: str, settings: dict[str, Any], arms: tuple[str, ...]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    config = {"schema_version": 1, "experiment": experiment, "options": settings, "notes": NOTES}
    write(folder, "config.json", config)
    write(folder, "environment.json", ENVIRONMENT)
    phases = {phase: 300 * value for phase, value in PHASES.items()}
    timing = {
        "networks": 1,
        "steps_per_second": 3.54,
        "step_microseconds": phases,
        "evaluation_seconds": 311.2,
        "checkpoint_seconds": 4.1,
    }
    timings = {arm: timing | {"step_microseconds": phases | {"batch": 9000.0 + 900 * i}} for i, arm in enumerate(arms)}
    write(folder, "timing.json", {"training_seconds": 12_345.6, "arms": timings})


def write_inception(
    folder: Path,
    arms: tuple[str, ...] = PAPER_ARMS,
    seeds: tuple[int, ...] = (0,),
    diverged: dict[str, int] | None = None,
    **settings: Any,
) -> Path:
    """A finished run. Every seed of the arms in ``diverged`` diverges before the step that stands there."""
    write_common(folder, "inception", SETTINGS | {"seeds": list(seeds), "arms": list(arms)} | settings, arms)
    ends = diverged or {}
    rows = [
        row(arm, seed, step, diverged=step >= ends.get(arm, math.inf))
        for seed in seeds
        for arm in arms
        for step in STEPS
    ]
    write_rows(folder, rows)
    level = arm_record("Inception", rows, None)["best_accuracy"]
    claims = {
        "schema_version": 1,
        "experiment": "inception",
        "verdict": "reproduced",
        "claims": CLAIMS,
        "arms": [arm_record(arm, rows, level) for arm in arms],
        "baseline_accuracy": level,
        "base_learning_rate": SEARCH,
    }
    write(folder, "claims.json", claims)
    return folder


def errors(shift: float) -> dict[str, float]:
    return {
        "single_top1": 0.52 + shift,
        "single_top5": 0.25 + shift,
        "crops_top1": 0.49 + shift,
        "crops_top5": 0.22 + shift,
    }


def write_ensemble(folder: Path, count: int = 6) -> Path:
    """A finished ensemble of so many networks."""
    names = tuple(f"network {i + 1}" for i in range(count))
    write_common(folder, "ensemble", SETTINGS | {"networks": count, "arms": []}, names)
    write_rows(folder, [row(name, i, step) for i, name in enumerate(names) for step in STEPS])
    variations = (["initial weights x 2"], ["Dropout 5 %"], ["Dropout 10 %", "per-activation BN in the last module"])
    claims = {
        "schema_version": 1,
        "experiment": "ensemble",
        "verdict": "not reproduced",
        "claims": [claim("ensemble-top1", statement="The ensemble instead of its networks: the top-1 error falls.")],
        "networks": [
            {"name": name, "variations": variations[i % 3], **errors(0.002 * i)} for i, name in enumerate(names)
        ],
        "ensemble": errors(-0.04),
        "crop_images": 500,
    }
    write(folder, "claims.json", claims)
    return folder


def study_panel(name: str = "accuracy", **changes: Any) -> dict[str, Any]:
    """A panel as in claims.json."""
    lines = [
        {"name": "BN", "x": [0, 100, 200], "y": [0.1, 0.9, 0.95], "low": [0.1, 0.8, 0.9], "high": [0.1, 0.95, 0.97]},
        {"name": "plain", "x": [0, 200], "y": [0.1, None], "low": None, "high": None},
    ]
    record = {"name": name, "title": "Test accuracy", "x": "steps", "y": "accuracy", "lines": lines}
    return record | {"x_log": False, "y_log": False} | changes


def write_study(folder: Path, name: str = "outside-gradient", **changes: Any) -> Path:
    """A finished study of two arms and two panels."""
    arms = ("BN", "plain")
    write_common(folder, name, {"steps": 200, "seeds": [0, 1]}, arms)
    write_rows(folder, [{"arm": arm, "seed": seed, "step": 200, "loss": 1.0} for arm in arms for seed in (0, 1)])
    batch_sizes = [{"name": "BN", "x": [2, 16, 512], "y": [1e-3, 0.2, 40.0], "low": None, "high": None}]
    claims = {
        "schema_version": 1,
        "experiment": name,
        "verdict": "reproduced",
        "claims": [claim("bias-grows")],
        "title": "Normalization outside the gradient",
        "source": "Ioffe & Szegedy 2015, section 2",
        "arms": list(arms),
        "panels": [study_panel(), study_panel("noise", x="batch size", lines=batch_sizes, x_log=True, y_log=True)],
        "tables": [
            {
                "name": "networks",
                "heading": "The whole network",
                "columns": ["Network", "gradient", "accuracy"],
                "rows": [["BN", "inside", "95.00%"], ["plain", "none", "\N{EN DASH}"]],
                "caption": "Means over the seeds.",
            }
        ],
        "caption": "Lines are means over the seeds.",
    }
    write(folder, "claims.json", claims | changes)
    return folder
