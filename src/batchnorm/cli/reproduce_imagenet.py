"""``batchnorm reproduce inception`` and ``batchnorm reproduce ensemble``."""

import dataclasses
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import torch
from click.core import ParameterSource

from batchnorm.cli.options import FiniteRange, resume_command, show
from batchnorm.cli.progress import Progress
from batchnorm.errors import RunError
from batchnorm.experiments.data.image_set import ImageData
from batchnorm.experiments.data.images import mnist_images, open_images
from batchnorm.experiments.distributed import join_team
from batchnorm.experiments.ensemble import CROP_IMAGES, MODEL, VARIATIONS, reproduce_ensemble
from batchnorm.experiments.estimate import estimate
from batchnorm.experiments.inception import Callbacks, reproduce_inception
from batchnorm.experiments.inception_arms import ARMS, PAPER_ARMS, PRESETS, Options, arm_named
from batchnorm.experiments.run_folder import CONFIG, default_folder, latest_folder, read_record
from batchnorm.experiments.tensorboard import rows_to_tensorboard
from batchnorm.experiments.training import StoppedError

QUICK = {"steps": 60, "evaluations": 3, "half_life": 60, "base_learning_rate": 0.01, "width": 0.125}
QUICK_CROP_IMAGES = 20
# of MNIST's; all of them would take nine tenths of the time
QUICK_VALIDATION_IMAGES = 500
# MNIST's images are 28 x 28
MNIST_SIZE = 32
# Options of the commands that are fields of the configuration by the same name
CONFIGURED = ("arms", "steps", "batch_size", "accumulate", "base_learning_rate", "device", "precision", "channels_last")


class ArmNames(click.ParamType):
    """Names of arms, separated by commas."""

    name = "names"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        names = tuple(dict.fromkeys(name.strip() for name in value.split(","))) if isinstance(value, str) else value
        for name in names:
            try:
                arm_named(name)
            except KeyError:
                self.fail(
                    f"there is no arm {name!r}: expected some of {', '.join(ARMS)}, or an ablation such as "
                    "'BN-x5 without decay'.",
                    param,
                    ctx,
                )
        return names


TRAINING_OPTIONS = (
    click.option("--data", type=click.Path(path_type=Path), help="train/ and val/, or shards.  [default: MNIST]"),
    click.option("--preset", type=click.Choice(list(PRESETS)), default="small", show_default=True),
    click.option("--out", type=click.Path(path_type=Path), help="Folder of the run.  [default: runs/NAME-TIME]"),
    click.option("--quick", is_flag=True, help="A narrow network and some steps: a trial of every part."),
    click.option("--estimate", "only_estimate", is_flag=True, help="Print FLOPs, memory and hours, and train nothing."),
    click.option("--resume", is_flag=True, help="Continue a stopped run, bit for bit: that of --out, or the latest."),
    click.option("--force", is_flag=True, help="Delete an earlier run in --out first."),
    click.option("--steps", type=click.IntRange(1), help="Per network.  [default: 8000; paper: 31 million]"),
    click.option("--batch-size", type=click.IntRange(2), default=32, show_default=True, help="Of one process."),
    click.option("--accumulate", type=click.IntRange(1), default=1, show_default=True, help="Mini-batches of a step."),
    click.option(
        "--learning-rate",
        "base_learning_rate",
        type=FiniteRange(0, min_open=True),
        help="Of the plain network.  [default: a sweep; paper: 0.0015]",
    ),
    click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True),
    click.option("--precision", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True),
    click.option("--channels-last/--contiguous", default=True, show_default=True, help="Memory format."),
    click.option("--workers", type=click.IntRange(0), default=1, help="Prepare images beside.  [default: 1; quick: 0]"),
    click.option("--threads", type=click.IntRange(1), help="Of a process.  [default: torch's]"),
    click.option("--tensorboard", type=click.Path(path_type=Path), help="Write the curves there as well."),
)


def training_options(command: Callable[..., int]) -> Callable[..., int]:
    for option in reversed(TRAINING_OPTIONS):
        command = option(command)
    return command


@click.command()
@click.option("--arms", type=ArmNames(), default=",".join(PAPER_ARMS), help="Networks.  [default: the paper's five]")
@click.option("--seeds", type=click.IntRange(1), default=1, show_default=True, help="Networks per arm.")
@training_options
@click.pass_context
def inception(ctx: click.Context, **_: Any) -> int:
    """Figures 2 and 3: Inception with and without BN, and with 5 and 30 times the learning rate.

    Section 4.2 of the paper. Without --data the bundled MNIST stands in for ImageNet. On several processes: torchrun
    --nproc-per-node 2 -m batchnorm reproduce inception ...
    """
    return run(ctx, "inception", reproduce_inception)


@click.command()
@click.option(
    "--crop-images",
    type=click.IntRange(2),
    default=CROP_IMAGES,
    show_default=True,
    help="Validation images to evaluate, with 145 crops each.",
)
@training_options
@click.pass_context
def ensemble(ctx: click.Context, crop_images: int, **_: Any) -> int:
    """Figure 4: six varied BN-x30 networks, with one crop and with 144, and their ensemble.

    Section 4.2.3 of the paper. Options as of batchnorm reproduce inception.
    """
    is_given = ctx.get_parameter_source("crop_images") is not ParameterSource.DEFAULT

    def reproduce(options: Options, folder: Path, *arguments: Any, **settings: Any) -> dict[str, Any]:
        chosen = crop_images if is_given or not ctx.params["quick"] else QUICK_CROP_IMAGES
        if settings["resume"] and not is_given:
            chosen = recorded_options(folder).get("crop_images", chosen)
        return reproduce_ensemble(options, folder, *arguments, crop_images=chosen, **settings)

    return run(ctx, "ensemble", reproduce)


def run(ctx: click.Context, experiment: str, reproduce: Callable[..., dict[str, Any]]) -> int:
    """Train, or say what it would cost; the exit status."""
    given = ctx.params
    resume, force, data = given["resume"], given["force"], given["data"]
    if resume and force:
        raise click.UsageError("--resume continues a run and --force deletes it: give one of them")
    if given["threads"]:
        torch.set_num_threads(given["threads"])
    folder = given["out"] or (latest_folder(experiment) if resume else default_folder(experiment))
    recorded = recorded_options(folder) if resume else {}
    # a process that prepares images takes longer to start than a trial to train
    is_given = ctx.get_parameter_source("workers") is not ParameterSource.DEFAULT
    workers = given["workers"] if is_given or not given["quick"] else 0
    few = QUICK_VALIDATION_IMAGES if given["quick"] else recorded.get("validation_images")
    images = mnist_images(validation_images=few) if data is None else open_images(data)
    with join_team(given["device"]) as team:
        options = choose_options(ctx, recorded, images, team.world_size)
        if team.is_first and data is None:
            click.echo("without --data the bundled MNIST stands in for ImageNet", err=True)
        if given["only_estimate"]:
            if team.is_first:
                six = {MODEL: len(VARIATIONS)}
                each = dict.fromkeys(options.arms, len(options.seeds))
                click.echo(estimate(options, images, six if experiment == "ensemble" else each))
            return 0
        curves = rows_to_tensorboard(given["tensorboard"] if team.is_first else None)
        with Progress(options.steps) as progress, interrupts() as stopped, curves as on_row:
            callbacks = Callbacks(on_row=on_row, should_stop=lambda: bool(stopped))
            if team.is_first:
                callbacks = callbacks._replace(on_progress=progress.update)
            try:
                record = reproduce(
                    options,
                    folder,
                    images,
                    team,
                    workers=workers,
                    resume=resume,
                    force=force,
                    callbacks=callbacks,
                )
            except StoppedError:
                if team.is_first:
                    click.echo(resume_command(experiment, folder, data), err=True)
                raise click.exceptions.Abort from None
        status = show(record, folder) if team.is_first else 0
        # torchrun takes every other status for a crash
        return status if team.world_size == 1 else 0


def recorded_options(folder: Path) -> dict[str, Any]:
    """The options of the run to resume; none from a folder without a configuration, which is refused later."""
    path = folder / CONFIG
    recorded = read_record(path).get("options") if path.exists() else {}
    if not isinstance(recorded, dict):
        raise RunError(f"{path}: expected options, found {recorded!r}; choose another --out")
    return recorded


def choose_options(ctx: click.Context, recorded: dict[str, Any], images: ImageData, world_size: int) -> Options:
    """The settings: what was given, then what the run to resume was made with, then the preset."""
    given = {
        name: value
        for name, value in ctx.params.items()
        if ctx.get_parameter_source(name) is not ParameterSource.DEFAULT
    }
    if recorded:
        fields = {field.name for field in dataclasses.fields(Options)}
        values = {name: value for name, value in recorded.items() if name in fields}
        values |= {name: tuple(values[name]) for name in ("seeds", "arms") if name in values}
    else:
        preset = ctx.params["preset"]
        values = {"preset": preset, "data": images.name, "world_size": world_size, **PRESETS[preset]}
        if preset == "small":
            # its images are smaller still
            values |= {"size": MNIST_SIZE} if images.name == "mnist" else {}
            values |= QUICK if "quick" in given else {}
            # the schedule ends where the training does
            values |= {"half_life": given["steps"]} if "steps" in given else {}
    values |= {name: given[name] for name in CONFIGURED if name in given}
    if "seeds" in given:
        values["seeds"] = tuple(range(given["seeds"]))
    try:
        return Options(**values)
    except TypeError as error:
        raise RunError(f"the configuration of the run to resume is not of this version ({error})") from error


@contextmanager
def interrupts() -> Iterator[list[int]]:
    """A list that grows with Ctrl-C or a request to end, so that training can save first; the second ends at once."""
    noted: list[int] = []

    def note(number: int, _: Any) -> None:
        if noted:
            raise KeyboardInterrupt
        noted.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
