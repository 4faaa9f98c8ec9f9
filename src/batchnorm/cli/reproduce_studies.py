"""The studies of ``batchnorm reproduce``: one command for each, all with the same options."""

import dataclasses
from pathlib import Path
from typing import Any

import click

from batchnorm.cli.options import resume_command, show
from batchnorm.cli.progress import Progress
from batchnorm.environment import usable_cpus
from batchnorm.errors import RunError
from batchnorm.experiments.catalogue import Entry
from batchnorm.experiments.run_folder import CONFIG, default_folder, latest_folder, read_record

OPTIONS = (
    click.option("--out", type=click.Path(path_type=Path), help="Folder of the run.  [default: runs/NAME-TIME]"),
    click.option("--seeds", type=click.IntRange(1), help="Networks per arm.  [default: the study's]"),
    click.option("--steps", type=click.IntRange(1), help="Of a network.  [default: the study's]"),
    click.option("--quick", is_flag=True, help="Few steps and two seeds: a trial of every part."),
    click.option("--resume", is_flag=True, help="Continue a stopped run: that of --out, or the latest."),
    click.option("--force", is_flag=True, help="Delete an earlier run in --out first."),
    click.option("--threads", type=click.IntRange(1), help="Processes of one thread each.  [default: one per core]"),
)


def study_command(entry: Entry) -> click.Command:
    """The command of a study."""

    def command(**given: Any) -> int:
        return run(entry.name, **given)

    command.__doc__ = f"{entry.claim}.\n\n{entry.source}. On the bundled MNIST; {minutes(entry)} on two cores."
    for option in reversed(OPTIONS):
        command = option(command)
    return click.command(entry.name)(command)


def minutes(entry: Entry) -> str:
    return f"about {entry.minutes:g} minute{'s' if entry.minutes != 1 else ''}"


def run(
    name: str,
    out: Path | None,
    seeds: int | None,
    steps: int | None,
    quick: bool,
    resume: bool,
    force: bool,
    threads: int | None,
) -> int:
    """Run a study and show its verdicts; the exit status."""
    from batchnorm.experiments.study import reproduce_study, study_named

    if resume and force:
        raise click.UsageError("--resume continues a run and --force deletes it: give one of them")
    folder = out or (latest_folder(name) if resume else default_folder(name))
    study = study_named(name)
    changed: dict[str, Any] = dict(study.quick) if quick else recorded(folder, study.options) if resume else {}
    changed |= {"seeds": tuple(range(seeds))} if seeds else {}
    changed |= {"steps": steps} if steps else {}
    options = dataclasses.replace(study.options, **changed)
    workers = threads or usable_cpus()
    try:
        with Progress(options.steps, len(study.arms(options)) * len(options.seeds)) as progress:
            record = reproduce_study(
                name, options, folder, workers=workers, resume=resume, force=force, on_progress=progress.update
            )
    except KeyboardInterrupt:
        click.echo(resume_command(name, folder), err=True)
        raise
    return show(record, folder)


def recorded(folder: Path, options: Any) -> dict[str, Any]:
    """What the run to resume was made with; nothing from a folder without a configuration, which is refused later."""
    path = folder / CONFIG
    found = read_record(path).get("options") if path.exists() else {}
    names = {field.name for field in dataclasses.fields(options)}
    if not isinstance(found, dict) or not set(found) <= names:
        raise RunError(f"{path}: the options are not those of this version; choose another --out")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}
