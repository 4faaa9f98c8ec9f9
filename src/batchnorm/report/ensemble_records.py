"""The records of an ensemble: the errors of every network alone and of all together."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchnorm.report.fields import count, field, fraction, objects, text, texts
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
class Errors:
    """Error rates on the center crop and on many crops, first guess and first five; NaN where a network diverged."""

    single_top1: float
    single_top5: float
    crops_top1: float
    crops_top5: float


@dataclass(frozen=True)
class Network:
    """One network of an ensemble."""

    name: str
    variations: list[str]
    errors: Errors


@dataclass(frozen=True)
class EnsembleRun(Run):
    """Networks, and the mean of their probabilities. The errors are over ``crop_images`` validation images."""

    setting: Setting
    evaluations: list[TrainingEvaluation]
    networks: list[Network]
    ensemble: Errors
    crop_images: int
    base_learning_rate: RateSearch | None


def read_ensemble(records: Records) -> EnsembleRun:
    claims, path = records.claims, records.folder / "claims.json"
    networks = [read_network(entry, path) for entry in objects(claims, "networks", path)]
    run = read_run(records, shown_names([network.name for network in networks], path))
    return EnsembleRun(
        **vars(run),
        setting=read_setting(run.options, records.folder / "config.json"),
        evaluations=read_training(records.folder / "metrics.jsonl", run.names),
        networks=networks,
        ensemble=read_errors(field(claims, "ensemble", dict, path), path, "ensemble: "),
        crop_images=count(claims, "crop_images", path),
        base_learning_rate=read_search({"base_learning_rate": None} | claims, path),
    )


def read_network(entry: dict[str, Any], path: Path) -> Network:
    name = text(entry, "name", path, "networks: ")
    where = f"{clean(name, NAME_LIMIT)}: "
    variations = texts(entry, "variations", path, where)[:CHANGES_LIMIT]
    return Network(name, [clean(each, CHANGE_LIMIT) for each in variations], read_errors(entry, path, where))


def read_errors(entry: dict[str, Any], path: Path, where: str) -> Errors:
    return Errors(
        single_top1=fraction(entry, "single_top1", path, where),
        single_top5=fraction(entry, "single_top5", path, where),
        crops_top1=fraction(entry, "crops_top1", path, where),
        crops_top5=fraction(entry, "crops_top5", path, where),
    )
