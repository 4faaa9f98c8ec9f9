"""Figures 2 and 3 of the paper: Inception with and without BN on ImageNet, or on as much of it as there is.

Section 4.2: Inception, BN-Baseline, BN-x5, BN-x30 and BN-x5-Sigmoid, mini-batches of 32, SGD with momentum and a
learning rate that decays exponentially; steps to the plain network's best accuracy, and the best accuracy of each.
Under ``torchrun`` every process trains a replica.
"""

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save

from batchnorm.environment import describe_environment
from batchnorm.experiments.claims import claims_record
from batchnorm.experiments.data.image_set import ImageData
from batchnorm.experiments.distributed import Team
from batchnorm.experiments.inception_arms import (
    BASELINE,
    NOTES,
    RATES,
    SWEEP_STEPS,
    Arm,
    Options,
    arm_named,
)
from batchnorm.experiments.inception_claims import Run, Runs, best, inception_claims, steps_to
from batchnorm.experiments.inception_task import InceptionTask, Job
from batchnorm.experiments.run_folder import TIMING, WORK, finish_run, open_run
from batchnorm.experiments.training import Timing, describe_timing, read_rows, train
from batchnorm.files import finite, write_atomic, write_json

LOOK_EVERY = 10


class Callbacks(NamedTuple):
    """How a run talks to whoever started it."""

    on_progress: Callable[[str, int, int], None] = lambda job, step, steps: None
    on_row: Callable[[dict[str, Any]], None] = lambda row: None
    should_stop: Callable[[], bool] = lambda: False


SILENT = Callbacks()


def reproduce_inception(
    options: Options,
    folder: Path,
    data: ImageData,
    team: Team,
    *,
    workers: int = 1,
    resume: bool = False,
    force: bool = False,
    callbacks: Callbacks = SILENT,
) -> dict[str, Any]:
    """Train every arm for every seed, one after the other, write the run folder, and return its claims.

    Args:
        options: the settings.
        folder: of the run: config, environment, metrics, timing, claims and final checkpoints (safetensors).
        data: the images.
        team: the processes that train together.
        workers: processes that prepare images; they do not change the numbers.
        resume: continue a stopped run, bit for bit.
        force: delete an earlier run in the folder.
        callbacks: progress, rows of the metrics as they come, and whether to stop.

    Returns:
        The record that ``claims.json`` holds.

    Raises:
        DataError: too many images cannot be read.
        RunError: the folder cannot be used as asked, or another process ended.
        StoppedError: asked to stop; ``resume`` continues.
    """
    config = {
        "schema_version": 1,
        "experiment": "inception",
        "options": dataclasses.asdict(options) | describe_data(data),
        "notes": list(NOTES),
    }
    with hold_run(folder, config, team, resume=resume, force=force) as record:
        if record is not None:
            return record
        started = time.perf_counter()
        run = functools.partial(
            train_job, options=options, folder=folder, data=data, team=team, workers=workers, callbacks=callbacks
        )
        base, sweep = base_learning_rate(options, folder, run)
        jobs = [
            job_of(arm_named(name), seed, options, base, len(options.seeds) > 1)
            for seed in options.seeds
            for name in options.arms
        ]
        results = {job.name: run(job) for job in jobs}
        seconds = max(time.perf_counter() - started, sum(sum(timing) for timing in results.values()))
        record = write_results(folder, jobs, results, seconds, options, data, sweep, team)
    return record


def describe_data(data: ImageData) -> dict[str, Any]:
    return {
        "classes": len(data.classes),
        "training_images": len(data.train),
        "validation_images": len(data.val),
    }


@contextlib.contextmanager
def hold_run(
    folder: Path, config: dict[str, Any], team: Team, *, resume: bool, force: bool
) -> Iterator[dict[str, Any] | None]:
    """``open_run`` by the first process, while the others wait for it."""
    if team.is_first:
        with open_run(folder, config, resume=resume, force=force) as record:
            if record is None:
                (folder / WORK).mkdir(exist_ok=True)
                (folder / "checkpoints").mkdir(exist_ok=True)
                if not (folder / "environment.json").exists():
                    environment = describe_environment() | {"threads": torch.get_num_threads()}
                    write_json(folder / "environment.json", environment)
            team.gather(record)
            yield record
    else:
        yield team.gather(None)[0]


def job_of(arm: Arm, seed: int, options: Options, base: float, several: bool) -> Job:
    name = arm.name.replace(" ", "-") + (f"-seed{seed}" if several else "")
    return Job(name, arm, seed, options.steps, options.evaluation_steps, base)


def base_learning_rate(
    options: Options, folder: Path, run: Callable[[Job], Timing]
) -> tuple[float, dict[str, Any] | None]:
    """What was given, or the plain network's best of a few, after a short training with the first seed, and how."""
    if options.base_learning_rate is not None:
        return options.base_learning_rate, None
    steps = min(SWEEP_STEPS, options.steps)
    candidates = []
    for rate in RATES:
        job = Job(f"sweep-{rate:g}", arm_named(BASELINE), options.seeds[0], steps, frozenset({steps}), rate)
        run(job)
        (row,) = read_rows(folder / WORK / f"{job.name}.jsonl")
        loss = row["validation_loss"]
        accuracy = None if loss is None else row["validation_accuracy"]
        candidates.append({"learning_rate": rate, "validation_accuracy": accuracy, "validation_loss": loss})
    # so early, accuracies are close to chance, and losses tell more
    losses = [math.inf if c["validation_loss"] is None else c["validation_loss"] for c in candidates]
    chosen = RATES[losses.index(min(losses))]
    rule = f"the lowest validation loss of {BASELINE} after {steps:,} steps with seed {options.seeds[0]}"
    return chosen, {"candidates": candidates, "chosen": chosen, "rule": rule}


def train_job(
    job: Job,
    *,
    options: Options,
    folder: Path,
    data: ImageData,
    team: Team,
    workers: int,
    callbacks: Callbacks,
    **variations: Any,
) -> Timing:
    """Train one network, from its checkpoint if there is one, and leave its final weights."""
    task = InceptionTask(job, options, data, team, workers, **variations)
    try:
        timing = train(
            task,
            folder / WORK,
            learning_rate=task.learning_rate,
            accumulate=options.accumulate,
            team=team,
            on_row=callbacks.on_row,
            look_every=LOOK_EVERY,
            on_progress=lambda step: callbacks.on_progress(job.name, step, job.steps),
            should_stop=callbacks.should_stop,
        )
    finally:
        task.close()
    if team.is_first:
        state = {name: value.contiguous() for name, value in task.model.state_dict().items()}
        write_atomic(folder / "checkpoints" / f"{job.name}.safetensors", save(state))
    return timing


def write_results(
    folder: Path,
    jobs: list[Job],
    results: dict[str, Timing],
    seconds: float,
    options: Options,
    data: ImageData,
    sweep: dict[str, Any] | None,
    team: Team,
) -> dict[str, Any]:
    """Timing, metrics and claims, by the first process; the record of the claims for all."""
    record = None
    if team.is_first:
        arms = {job.arm.name: describe_timing(results[job.name], job.steps, 1) for job in jobs}
        write_json(folder / TIMING, {"training_seconds": round(seconds, 2), "arms": arms})
        rows = [row for job in jobs for row in read_rows(folder / WORK / f"{job.name}.jsonl")]
        runs = Runs(rows, options.seeds, len(data.val))
        claims = inception_claims(runs, len(data.classes))
        plain = runs.of(BASELINE)
        extra = {
            "arms": [
                describe_arm(runs.of(job.arm.name), job, options, data, plain)
                for job in jobs
                if job.seed == options.seeds[0]
            ],
            "baseline_accuracy": best(plain[0]) if plain else None,
            "base_learning_rate": sweep,
        }
        record = finish_run(folder, rows, claims_record("inception", claims, **finite(extra)))
    return team.gather(record)[0]


def describe_arm(runs: list[Run], job: Job, options: Options, data: ImageData, plain: list[Run]) -> dict[str, Any]:
    """A line of Figure 3, of the first seed."""
    network = options.network(job.arm, len(data.classes))
    accuracy = best(runs[0])
    return {
        "arm": job.arm.name,
        "changes": job.arm.describe(),
        "learning_rate": options.learning_rate(job.arm, job.base_learning_rate)(0),
        "weight_decay": options.weight_decay_of(job.arm),
        "dropout": network.dropout.p,
        "parameters": sum(p.numel() for p in network.parameters()),
        "steps_to_baseline": steps_to(runs[0], best(plain[0])) if plain else None,
        "best_accuracy": accuracy,
        "best_step": steps_to(runs[0], accuracy),
    }
