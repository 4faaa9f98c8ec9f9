"""``batchnorm reproduce``."""

import dataclasses
import importlib.util
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from batchnorm.cli.options import FiniteRange, resume_command, show
from batchnorm.cli.progress import Progress
from batchnorm.cli.reproduce_imagenet import ensemble, inception
from batchnorm.cli.reproduce_studies import minutes, study_command
from batchnorm.environment import usable_cpus
from batchnorm.errors import RunError
from batchnorm.experiments.catalogue import EXPERIMENTS
from batchnorm.experiments.data.mnist import INPUTS
from batchnorm.experiments.mnist import Options, reproduce_mnist
from batchnorm.experiments.mnist_claims import ARMS
from batchnorm.experiments.mnist_sweep import sweep_mnist
from batchnorm.experiments.run_folder import CONFIG, default_folder, latest_folder, read_record

PLAIN_WIDTH = 79
QUICK_STEPS = 1000
QUICK_SEEDS = 2
GRID = ("learning_rate", "init_std")
# Options of the command that are fields of the configuration, so that --resume can take them from the run
CONFIGURED = ("steps", "input", "learning_rate", "init_std", "device")


@click.group(invoke_without_command=True)
@click.option("--list", "only_list", is_flag=True, help="Show every experiment: source, claim, expected minutes.")
@click.pass_context
def reproduce(ctx: click.Context, only_list: bool) -> None:
    """Run an experiment and give a verdict per claim.

    Exit status: 0 all claims reproduced, 1 some not, 2 an error, 130 interrupted.
    """
    if only_list:
        click.echo(listing())
        ctx.exit()
    if ctx.invoked_subcommand is None:
        raise click.exceptions.NoArgsIsHelpError(ctx)


@reproduce.command()
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the run.  [default: runs/mnist-TIME]")
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True, help="Networks per arm, in pairs.")
@click.option("--sweep", is_flag=True, help="Both arms at every learning rate (.01 .1 .5 1 2) and scale (.05 .1 1).")
@click.option(
    "--quick", is_flag=True, help=f"{QUICK_STEPS:,} steps and {QUICK_SEEDS} seeds: a trial, not the paper's run."
)
@click.option("--resume", is_flag=True, help="Continue a stopped run, bit for bit: that of --out, or the latest.")
@click.option("--force", is_flag=True, help="Delete an earlier run in --out first.")
@click.option("--data", type=click.Path(path_type=Path), help="Your own MNIST files.  [default: the bundled ones]")
@click.option(
    "--input", type=click.Choice(INPUTS), default="binary", show_default=True, help="Pixels as in the paper, or gray."
)
@click.option("--steps", type=click.IntRange(1), default=50_000, show_default=True)
@click.option("--learning-rate", type=FiniteRange(0, min_open=True), default=Options.learning_rate, show_default=True)
@click.option("--init-std", type=FiniteRange(0), default=Options.init_std, show_default=True, help="Of the weights.")
@click.option("--device", default="cpu", show_default=True, help="Where to train: cpu, cuda, ...")
@click.option("--threads", type=click.IntRange(1), help="Processes of one thread each.  [default: one per core]")
@click.pass_context
def mnist(
    ctx: click.Context,
    out: Path | None,
    seeds: int,
    sweep: bool,
    quick: bool,
    resume: bool,
    force: bool,
    data: Path | None,
    threads: int | None,
    **_: Any,
) -> int:
    """Figure 1: accuracy over steps with and without BN, and how a sigmoid's input moves.

    Section 4.1 of the paper: three hidden layers of 100 sigmoid units, 50,000 steps of 60 examples.
    """
    if resume and force:
        raise click.UsageError("--resume continues a run and --force deletes it: give one of them")
    folder = out or (latest_folder("mnist") if resume else default_folder("mnist"))
    recorded = recorded_options(ctx, folder) if resume else {}
    sweep = sweep or bool(recorded.get("sweep"))
    if sweep and any(ctx.get_parameter_source(name) is not ParameterSource.DEFAULT for name in GRID):
        raise click.UsageError("--sweep trains its own grid: leave out --learning-rate and --init-std.")
    workers = threads or usable_cpus()
    options = choose_options(ctx, recorded, seeds, quick)
    run = sweep_mnist if sweep else reproduce_mnist
    if run is reproduce_mnist and options.device == "cpu":
        stacks = recorded.get("stacks") or max(1, min(len(options.seeds), workers // len(ARMS)))
        options = dataclasses.replace(options, stacks=stacks)
    if importlib.util.find_spec("matplotlib") is None:
        click.echo("matplotlib is not installed, so there will be no figures: pip install matplotlib", err=True)
    try:
        with Progress(options.steps) as progress:
            record = run(
                options,
                folder,
                data_folder=data,
                workers=workers,
                resume=resume,
                force=force,
                on_progress=progress.update,
            )
    except KeyboardInterrupt:
        click.echo(resume_command("mnist", folder), err=True)
        raise
    return show(record, folder)


def recorded_options(ctx: click.Context, folder: Path) -> dict[str, Any]:
    """The options of the run to resume, checked; none from a folder without a configuration, which is refused later."""
    path = folder / CONFIG
    recorded = read_record(path).get("options") if path.exists() else {}
    if not isinstance(recorded, dict):
        raise RunError(f"{path}: expected options, found {recorded!r}; choose another --out")
    seeds = recorded.get("seeds", [0])
    if not (isinstance(seeds, list) and seeds and all(isinstance(seed, int) for seed in seeds)):
        raise RunError(f"{path}: expected a list of seeds, found {seeds!r}; choose another --out")
    for param in ctx.command.params:
        value = recorded.get(str(param.name))
        if param.name in CONFIGURED and value is not None and not (recorded.get("sweep") and param.name in GRID):
            try:
                param.type_cast_value(ctx, value)
            except click.BadParameter as error:
                raise RunError(f"{path}: {param.name}: {error.message} Choose another --out") from error
    return recorded


def choose_options(ctx: click.Context, recorded: dict[str, Any], seeds: int, quick: bool) -> Options:
    """The settings: what was given, then what the run to resume was made with, then the defaults."""

    def given(name: str) -> bool:
        return ctx.get_parameter_source(name) is not ParameterSource.DEFAULT

    values = {name: ctx.params[name] for name in CONFIGURED}
    values["seeds"] = tuple(range(seeds))
    if quick:
        values.update(steps=QUICK_STEPS if not given("steps") else values["steps"])
        values.update(seeds=tuple(range(QUICK_SEEDS)) if not given("seeds") else values["seeds"])
    for name in values:
        kept = recorded.get(name)
        if not given(name) and kept is not None and not (quick and name in ("steps", "seeds")):
            is_grid = isinstance(kept, Sequence) and name in GRID
            values[name] = values[name] if is_grid else tuple(kept) if name == "seeds" else kept
    return Options(**values)


@reproduce.command("all")
@click.option("--quick", is_flag=True, help="Trials of every part: under three minutes on two cores.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the runs.  [default: runs/all-TIME]")
@click.option("--resume", is_flag=True, help="Continue where a stopped run of all ended: that of --out, or the latest.")
@click.pass_context
def everything(ctx: click.Context, quick: bool, out: Path | None, resume: bool) -> int:
    """Every experiment, one after the other, each in a folder of its own.

    Inception and its ensemble run on the bundled MNIST here.
    """
    folder = out or (latest_folder("all") if resume else default_folder("all"))
    statuses = {}
    for entry in EXPERIMENTS:
        click.echo(f"{entry.name}: {entry.claim}", err=True)
        place = folder / entry.name
        command = reproduce.get_command(ctx, entry.name)
        assert command is not None
        arguments = ["--out", str(place), *(["--quick"] if quick else [])]
        arguments += ["--resume"] if resume and place.exists() else []
        statuses[entry.name] = command.main(arguments, prog_name=entry.name, standalone_mode=False)
    lines = [f"{name}: {'all claims reproduced' if not status else 'not all'}" for name, status in statuses.items()]
    click.echo("\n".join(lines))
    return max(statuses.values())


def listing() -> str:
    """Every experiment of the catalogue."""
    blocks = []
    for entry in EXPERIMENTS:
        source = f"{entry.source}; {minutes(entry)} on two cores"
        blocks.append(f"{entry.name}\n{indented(entry.claim)}\n{indented(source)}")
    return "\n".join(blocks)


def indented(text: str) -> str:
    return textwrap.fill(text, PLAIN_WIDTH, initial_indent="    ", subsequent_indent="    ")


reproduce.add_command(inception)
reproduce.add_command(ensemble)
for _entry in EXPERIMENTS:
    if _entry.module is not None:
        reproduce.add_command(study_command(_entry))
