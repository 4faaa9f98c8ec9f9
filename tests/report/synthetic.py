"""Run folders with made-up numbers of realistic shape."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

STEPS = [*range(0, 1000, 100), *range(1000, 5000, 500), *range(5000, 10_000, 1000), *range(10_000, 50_001, 2000)]
SEEDS = (0, 1, 2)
ENVIRONMENT = {
    "python": "3.11.7",
    "platform": "Linux x86_64",
    "cpu": "AMD EPYC",
    "cpus": 2,
    "memory_gib": 23.6,
    "cpu_capability": "AVX512",
    "cuda": None,
    "threads": 1,
    "kernels": ["aten"],
    "packages": {"batchnorm": "0.1.0", "matplotlib": None, "numpy": "2.4.6", "torch": "2.13.0"},
}
OPTIONS = {
    "steps": 50_000,
    "batch_size": 60,
    "seeds": [0, 1, 2],
    "input": "binary",
    "hidden": [100, 100, 100],
    "learning_rate": 0.5,
    "init_std": 0.1,
    "momentum": 0.1,
    "eps": 1e-5,
    "device": "cpu",
}
NOTES = [
    "The paper gives no learning rate; 0.5 is the best of five for both arms (batchnorm reproduce mnist --sweep).",
    "The paper does not say how the images were made binary; here a pixel is 1 where its grey value is at least 128.",
]


def claim(name: str = "final-accuracy", **changes: Any) -> dict[str, Any]:
    """A claim as in claims.json."""
    record = {
        "name": name,
        "statement": "A network with BN ends at a higher test accuracy than the same network without",
        "source": "Ioffe & Szegedy 2015, section 4.1, Figure 1(a)",
        "rule": "the 95 % interval of the paired difference over seeds lies above 0",
        "paper": None,
        "unit": "percentage points",
        "values": [0.3, 0.4, 0.35],
        "mean": 0.35,
        "low": 0.2,
        "high": 0.5,
        "verdict": "reproduced",
        "detail": "plain 97.62 %, BN 98.01 %",
    }
    return record | changes


CLAIMS = [
    claim(),
    claim(
        "faster",
        statement="BN reaches the final accuracy of the plain network in fewer steps",
        rule="the 95 % interval of the ratio of steps, plain to BN, lies above 1",
        paper="faster; no number",
        unit="times fewer steps",
        values=[5.1, 6.2, 5.4],
        mean=5.5667,
        low=4.1,
        high=7.0,
        detail="plain 50,000 steps, BN 9,000",
    ),
    claim(
        "stable-distribution",
        statement="The input distribution of a sigmoid drifts less while training",
        source="Ioffe & Szegedy 2015, section 4.1, Figure 1(b, c)",
        rule="the range of the median over steps is smaller for at least half of the units, over all seeds",
        unit="of the units",
        values=[0.44, 0.47, 0.41],
        mean=0.44,
        low=0.36,
        high=0.52,
        verdict="not reproduced",
        detail="the median of a typical unit moves by 1.9 without BN, 0.6 with BN",
    ),
    claim(
        "algorithm-2",
        statement="Population statistics and the running average give the same accuracy",
        source="Ioffe & Szegedy 2015, section 3.1, Algorithm 2",
        rule="no rule: the paper states no difference",
        unit="percentage points",
        values=[],
        mean=None,
        low=None,
        high=None,
        verdict="not comparable",
        detail="the paper used the moving average only to follow training",
    ),
]
PHASES = {"batch": 41.1, "forward": 390.3, "backward": 420.2, "optimizer": 90.0}
TIMING = {
    "training_seconds": 71.2,
    "arms": {
        "bn": {
            "steps_per_second": 1061.0,
            "networks": 3,
            "step_microseconds": PHASES,
            "evaluation_seconds": 3.0,
            "checkpoint_seconds": 0.3,
        },
        "plain": {
            "steps_per_second": 1460.0,
            "networks": 3,
            "step_microseconds": PHASES | {"forward": 260.4, "backward": 275.9},
            "evaluation_seconds": 2.6,
            "checkpoint_seconds": 0.3,
        },
    },
}


def accuracy(arm: str, seed: int, step: int) -> float:
    """A curve like the paper's: BN rises at once, the plain network after a plateau."""
    if arm == "bn":
        return 0.10 + 0.88 * (1 - math.exp(-((step / 260) ** 0.42))) + 0.0008 * math.sin(seed + step / 700)
    rise = 1 / (1 + math.exp(-(step - 2600) / 420))
    return 0.113 + 0.80 * rise + 0.062 * (1 - math.exp(-step / 15_000)) * rise + 0.002 * math.sin(seed * 2 + step / 900)


def percentile_rows(arm: str, seed: int, step: int, units: int = 100) -> list[list[float]]:
    drift = np.arange(units) % 7 - 3
    x = step / 50_000
    if arm == "bn":
        middle, width = 0.06 * drift - 0.3 * x**0.3, 1.0 + 0.5 * x**0.4
    else:
        middle = 0.35 * drift * (x**0.5) + 0.4 * np.sin(step / 1500 + seed) * math.exp(-step / 9000)
        width = 0.1 + 2.3 * x**0.35
    return [np.round(middle + sign * width, 3).tolist() for sign in (-1.05, 0, 0.95)]


def write(folder: Path, name: str, record: Any) -> None:
    (folder / name).write_text(json.dumps(record))


def write_run(folder: Path, steps: list[int] | None = None, **changes: Any) -> Path:
    """A finished MNIST run; ``changes`` replaces options, notes, environment, claims or timing."""
    folder.mkdir(parents=True, exist_ok=True)
    options, notes = changes.get("options", OPTIONS), changes.get("notes", NOTES)
    write(folder, "config.json", {"schema_version": 1, "experiment": "mnist", "options": options, "notes": notes})
    write(folder, "environment.json", changes.get("environment", ENVIRONMENT))
    claims = {"schema_version": 1, "experiment": "mnist", "verdict": "not reproduced", "unit_drawn": 17}
    write(folder, "claims.json", claims | {"claims": changes.get("claims", CLAIMS)})
    write(folder, "timing.json", changes.get("timing", TIMING))
    steps = steps or STEPS
    rows = [
        metrics_row(arm, seed, step, step == steps[-1]) for arm in ("plain", "bn") for step in steps for seed in SEEDS
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def metrics_row(arm: str, seed: int, step: int, last: bool) -> dict[str, Any]:
    value = accuracy(arm, seed, step)
    row = {"arm": arm, "seed": seed, "step": step, "test_accuracy": value, "test_loss": 2.3 * (1 - value)}
    row["percentiles"] = percentile_rows(arm, seed, step)
    if last:
        row["test_accuracy_population"] = value + 0.0003 if arm == "bn" else None
    return row


def write_sweep(folder: Path) -> Path:
    """A finished sweep over five learning rates and three initial scales."""
    write_run(folder, steps=[0, 100])
    points, rows = [], []
    for std in (0.05, 0.1, 1.0):
        for rate in (0.01, 0.1, 0.5, 1.0, 2.0):
            plain = 0.976 - 0.004 * abs(math.log(rate)) - (0.72 if rate < 0.1 and std < 0.1 else 0) - 0.05 * (std == 1)
            bn = 0.981 - 0.0015 * abs(math.log(rate)) - 0.012 * (std == 1)
            arms = {}
            for arm, mean in (("plain", plain), ("bn", bn)):
                values = [mean - 0.001, mean, mean + 0.001]
                arms[arm] = {"mean": mean, "low": mean - 0.0025, "high": mean + 0.0025, "values": values}
                rows += [
                    {
                        "arm": arm,
                        "seed": i,
                        "step": 50_000,
                        "test_accuracy": value,
                        "learning_rate": rate,
                        "init_std": std,
                    }
                    for i, value in enumerate(values)
                ]
            points.append({"learning_rate": rate, "init_std": std, "arms": arms})
    best = {}
    for arm in ("plain", "bn"):
        point = max(points, key=lambda point: point["arms"][arm]["mean"])
        mean = point["arms"][arm]["mean"]
        best[arm] = {"learning_rate": point["learning_rate"], "init_std": point["init_std"], "mean": mean}
    write(folder, "sweep.json", {"schema_version": 1, "points": points, "best": best})
    claims = [claim("best-accuracy", statement="Each at its best setting, BN ends at a higher test accuracy")]
    write(
        folder, "claims.json", {"schema_version": 1, "experiment": "mnist", "verdict": "reproduced", "claims": claims}
    )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
