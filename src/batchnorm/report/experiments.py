"""The experiments whose runs can be reported: how the records of each are read, and what its page shows."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchnorm.report.contents import Contents
from batchnorm.report.ensemble_page import ensemble_contents
from batchnorm.report.ensemble_records import read_ensemble
from batchnorm.report.fields import broken, field
from batchnorm.report.inception_page import inception_contents
from batchnorm.report.inception_records import read_inception
from batchnorm.report.mnist_page import mnist_contents
from batchnorm.report.mnist_records import read_mnist
from batchnorm.report.records import Records, Run, read_records
from batchnorm.report.study_page import study_contents
from batchnorm.report.study_records import read_study
from batchnorm.report.text import clean


@dataclass(frozen=True)
class Experiment:
    """``read`` checks the records of a run; ``contents`` draws the :class:`Run` that it returns."""

    read: Callable[[Records], Run]
    contents: Callable[[Any], Contents]


STUDY = Experiment(read_study, study_contents)
# By the name in config.json. A new experiment adds a line here. Its reader checks rows and claims (metrics.py,
# fields.py) around what read_run checks for all; its contents are sections: figures (panels.py), tables (contents.py).
EXPERIMENTS = {
    "mnist": Experiment(read_mnist, mnist_contents),
    "inception": Experiment(read_inception, inception_contents),
    "ensemble": Experiment(read_ensemble, ensemble_contents),
    "outside-gradient": STUDY,
    "whitening": STUDY,
    "batch-size": STUDY,
    "scale": STUDY,
    "placement": STUDY,
    "regularization": STUDY,
}


def load_run(folder: str | Path) -> Run:
    """Read the records of a finished run.

    Args:
        folder: holds config.json, environment.json, metrics.jsonl, claims.json, timing.json; a sweep also sweep.json.

    Returns:
        :class:`Run`, with more fields according to its experiment.

    Raises:
        RunError: a record is missing, is not JSON, or has unexpected contents. One line says which, and what to do.

    Example:
        >>> load_run("no-such-folder")
        Traceback (most recent call last):
        batchnorm.errors.RunError: no-such-folder: not a folder; expected the folder of a finished run
    """
    records = read_records(folder)
    path = records.folder / "config.json"
    name = field(records.config, "experiment", str, path)
    if name not in EXPERIMENTS:
        problem, remedy = f"'experiment' is {clean(name, 40)}", "use the version of batchnorm that wrote it"
        raise broken(path, problem, " or ".join(EXPERIMENTS), remedy)
    return EXPERIMENTS[name].read(records)


def contents_of(run: Run) -> Contents:
    """What the page of a run shows.

    Raises:
        RunError: the run lacks what a figure needs.
        MissingExtraError: matplotlib is not installed.
    """
    return EXPERIMENTS[run.experiment].contents(run)
