"""Figure 4 of the paper: six varied BN-x30 networks, each with one crop and with 144, and their ensemble.

Section 4.2.3: the networks are trained one by one, and the ensemble predicts the mean of their class probabilities.
"""

import dataclasses
import functools
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from batchnorm.experiments.claims import NORMAL_QUANTILE, Claim, claims_record, judge
from batchnorm.experiments.data.crops import center_crop, crops_144
from batchnorm.experiments.data.image_set import ImageData, UnreadableImageError
from batchnorm.experiments.distributed import Team
from batchnorm.experiments.inception import SILENT, Callbacks, base_learning_rate, describe_data, hold_run, train_job
from batchnorm.experiments.inception_arms import ARMS, NOTES, Options
from batchnorm.experiments.inception_task import InceptionTask, Job
from batchnorm.experiments.run_folder import TIMING, WORK, finish_run
from batchnorm.experiments.training import StoppedError, Timing, describe_timing, read_rows
from batchnorm.files import finite, write_json

# which section 4.2.3 varies
MODEL = "BN-x30"
# 145 evaluations each, of six networks: 7 minutes for 64 x 64 pixels on two cores
CROP_IMAGES = 500

SOURCE = "Ioffe & Szegedy 2015, section 4.2.3, Figure 4"

# "Some of the following": larger initial weights, Dropout of 5 % or 10 %, per-activation BN in the last hidden layers
VARIATIONS: tuple[dict[str, Any], ...] = (
    {"initial_scale": 2.0},
    {"dropout": 0.05},
    {"dropout": 0.1},
    {"per_activation": True},
    {"initial_scale": 2.0, "dropout": 0.05},
    {"dropout": 0.1, "per_activation": True},
)
CROPS_NOTE = (
    "The paper says that each of the six networks has some of three variations, not which. Here: initial weights x 2; "
    "Dropout 5 %; Dropout 10 %; per-activation BN in the last module; initial weights x 2 and Dropout 5 %; Dropout "
    "10 % and per-activation BN. The 144 crops are GoogLeNet's, scaled to the size of the images."
)


def describe(variation: dict[str, Any]) -> list[str]:
    """A variation in words."""
    words = {
        "initial_scale": lambda value: f"initial weights x {value:g}",
        "dropout": lambda value: f"Dropout {100 * value:g} %",
        "per_activation": lambda value: "per-activation BN in the last module",
    }
    return [words[name](value) for name, value in variation.items()]


def reproduce_ensemble(
    options: Options,
    folder: Path,
    data: ImageData,
    team: Team,
    *,
    crop_images: int = CROP_IMAGES,
    workers: int = 1,
    resume: bool = False,
    force: bool = False,
    callbacks: Callbacks = SILENT,
) -> dict[str, Any]:
    """Train six networks, evaluate them and their ensemble, write the run folder, and return its claims.

    Args:
        options: the settings; ``arms`` and ``seeds`` are not used, network i has seed i.
        folder: of the run.
        data: the images.
        team: the processes that train together.
        crop_images: of the validation images, how many are evaluated; each means 145 evaluations per network.
        workers: processes that prepare images.
        resume: continue a stopped run.
        force: delete an earlier run in the folder.
        callbacks: progress, rows of the metrics as they come, and whether to stop.

    Raises:
        As ``reproduce_inception``.
    """
    crop_images = min(crop_images, len(data.val))
    settings = dataclasses.asdict(options) | {"arms": [], "networks": len(VARIATIONS), "crop_images": crop_images}
    config = {
        "schema_version": 1,
        "experiment": "ensemble",
        "options": settings | describe_data(data),
        "notes": [*NOTES, CROPS_NOTE],
    }
    with hold_run(folder, config, team, resume=resume, force=force) as record:
        if record is not None:
            return record
        started = time.perf_counter()
        run = functools.partial(
            train_job, options=options, folder=folder, data=data, team=team, workers=workers, callbacks=callbacks
        )
        base, sweep = base_learning_rate(options, folder, run)
        jobs = [network_job(number, options, base) for number in range(len(VARIATIONS))]
        variations = [network_variations(variation, options) for variation in VARIATIONS]
        results = {job.name: run(job, **variation) for job, variation in zip(jobs, variations, strict=True)}
        seconds = max(time.perf_counter() - started, sum(sum(timing) for timing in results.values()))
        alone = Team(team.device)
        tasks = [
            InceptionTask(job, options, data, alone, workers, **variation)
            for job, variation in zip(jobs, variations, strict=True)
        ]
        own = [predict(task, folder, team, crop_images, callbacks) for task in tasks]
        everyone = team.gather(own)
        if team.is_first:
            predictions = [joined(parts, crop_images) for parts in zip(*everyone, strict=True)]
            record = write_results(folder, jobs, results, seconds, predictions, data, sweep)
        record = team.gather(record)[0]
    return record


def network_job(number: int, options: Options, base: float) -> Job:
    name = f"network {number + 1}"
    arm = dataclasses.replace(ARMS[MODEL], name=name)
    return Job(name.replace(" ", "-"), arm, number, options.steps, options.evaluation_steps, base)


def network_variations(variation: dict[str, Any], options: Options) -> dict[str, Any]:
    """The arguments of ``Inception`` for a variation."""
    others = {name: value for name, value in variation.items() if name != "per_activation"}
    return others | ({"per_activation_size": options.size} if "per_activation" in variation else {})


@torch.no_grad()
def predict(task: InceptionTask, folder: Path, team: Team, count: int, callbacks: Callbacks) -> Tensor:
    """Class probabilities (2, images, classes), of the center crop and mean of 144, for this process's share of images.

    They are NaN for an image that cannot be read.
    """
    checkpoint = torch.load(folder / WORK / f"{task.name}.checkpoint", weights_only=True, map_location="cpu")
    task.model.load_state_dict(checkpoint["model"])
    model, size = task.model.eval(), task.options.size
    found = []
    for index in range(team.rank, count, team.world_size):
        callbacks.on_progress(f"{task.name}-crops", index, count)
        if callbacks.should_stop():
            raise StoppedError
        try:
            image = task.data.val.load(index)
        except UnreadableImageError:
            found.append(torch.full((2, len(task.data.classes)), torch.nan))
            continue
        inputs = torch.cat([center_crop(image, size)[None], crops_144(image, size)])
        with task.autocast():
            probabilities = model(task.to_device(inputs)).float().softmax(1).cpu()
        found.append(torch.stack([probabilities[0], probabilities[1:].mean(0)]))
    callbacks.on_progress(f"{task.name}-crops", count, count)
    return torch.stack(found, 1) if found else torch.empty(2, 0, len(task.data.classes))


def joined(parts: tuple[Tensor, ...], count: int) -> Tensor:
    """What the processes predicted, in the order of the images."""
    whole = parts[0].new_empty(2, count, parts[0].shape[2])
    for rank, part in enumerate(parts):
        whole[:, rank :: len(parts)] = part
    return whole


def errors(probabilities: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """For each image 1 where the class is not the first guess, and 1 where it is not among the first five."""
    guesses = probabilities.topk(min(5, probabilities.shape[1]), 1).indices == labels[:, None]
    return 1 - guesses[:, 0].double(), 1 - guesses.any(1).double()


class Errors:
    """Top-1 and top-5 errors of each image: (images,) for every network and for their ensemble, by number of crops."""

    def __init__(self, predictions: list[Tensor], labels: Tensor) -> None:
        readable = ~predictions[0][0, :, 0].isnan()
        labels = labels[readable]
        kept = [prediction[:, readable] for prediction in predictions]
        self.networks = [[errors(probabilities, labels) for probabilities in pair] for pair in kept]
        self.ensemble = [errors(probabilities, labels) for probabilities in torch.stack(kept).mean(0)]
        self.images = len(labels)

    def mean(self, crops: int, top: int) -> Tensor:
        """Of the networks, image by image; ``crops``: 0 for one, 1 for 144; ``top``: 0 for top-1, 1 for top-5."""
        return torch.stack([network[crops][top] for network in self.networks]).mean(0)


def ensemble_claims(errors: Errors) -> list[Claim]:
    crops, whole = "144 crops instead of one", "the ensemble instead of its networks, with 144 crops"
    return [
        claim("crops-top1", crops, "top-1", errors.mean(0, 0) - errors.mean(1, 0), "25.2 % to 21.99 %"),
        claim("crops-top5", crops, "top-5", errors.mean(0, 1) - errors.mean(1, 1), "7.82 % to 5.82 %"),
        claim("ensemble-top1", whole, "top-1", errors.mean(1, 0) - errors.ensemble[1][0], "21.99 % to 20.1 %"),
        claim("ensemble-top5", whole, "top-5", errors.mean(1, 1) - errors.ensemble[1][1], "5.82 % to 4.9 %"),
    ]


def claim(name: str, what: str, top: str, differences: Tensor, paper: str) -> Claim:
    """That an error falls, from the differences of the images."""
    value = 100 * differences.mean().item()
    half = 100 * NORMAL_QUANTILE * differences.std().item() / math.sqrt(len(differences))
    mean, low, high, verdict = judge([value], above=0.0, alone=(value - half, value + half))
    return Claim(
        name=name,
        statement=f"{what[0].upper()}{what[1:]}: the {top} error falls.",
        source=SOURCE,
        rule=f"{top} error before less {top} error after, on the same {len(differences):,} validation images, mean "
        "over the networks; the 95 % interval over the images lies above 0",
        paper=paper,
        unit="percentage points",
        values=[value],
        mean=mean,
        low=low,
        high=high,
        verdict=verdict,
        detail=f"{len(differences):,} images",
    )


def write_results(
    folder: Path,
    jobs: list[Job],
    results: dict[str, Timing],
    seconds: float,
    predictions: list[Tensor],
    data: ImageData,
    sweep: dict[str, Any] | None,
) -> dict[str, Any]:
    """Timing, metrics and claims; the record of the claims."""
    arms = {job.arm.name: describe_timing(results[job.name], job.steps, 1) for job in jobs}
    write_json(folder / TIMING, {"training_seconds": round(seconds, 2), "arms": arms})
    rows = [row for job in jobs for row in read_rows(folder / WORK / f"{job.name}.jsonl")]
    found = Errors(predictions, torch.from_numpy(data.val.labels[: predictions[0].shape[1]]))
    networks = [
        {"name": job.arm.name, "variations": describe(variation), **rates(network)}
        for job, variation, network in zip(jobs, VARIATIONS, found.networks, strict=True)
    ]
    extra = {
        "networks": networks,
        "ensemble": rates(found.ensemble),
        "crop_images": found.images,
        "base_learning_rate": sweep,
    }
    return finish_run(folder, rows, claims_record("ensemble", ensemble_claims(found), **finite(extra)))


def rates(found: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Error rates, 0 to 1."""
    names = (("single_top1", "single_top5"), ("crops_top1", "crops_top5"))
    return {
        name: value.mean().item()
        for pair, values in zip(names, found, strict=True)
        for name, value in zip(pair, values, strict=True)
    }
