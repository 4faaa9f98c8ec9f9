"""``batchnorm recalibrate``."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from click.core import ParameterSource
from torch import Tensor, nn

from batchnorm.cli.checkpoints import SAFETENSORS, listing, read_checkpoint, write_checkpoint
from batchnorm.cli.inputs import Loader, Samples, is_file, open_inputs
from batchnorm.cli.options import FiniteRange
from batchnorm.cli.outputs import check_output
from batchnorm.cli.progress import Progress
from batchnorm.cli.repair import (
    NEVER_UPDATED,
    load_repairable,
    mean_and_variance,
    put_statistics,
    tell_faults,
    tracking_layers,
)
from batchnorm.cli.user_code import announce, build_model, failures, run_model
from batchnorm.errors import BatchNormError, DataError
from batchnorm.experiments.distributed import usable_device
from batchnorm.statistics import Recalibration
from batchnorm.statistics import recalibrate as measure_statistics
from batchnorm.statistics.layers import normalizing_layers

BATCH_SIZE = 64
HEADINGS = ("layer", "values", "standard error", "mean moved by", "variance new / old", "")


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--model", "factory", metavar="CODE", required=True, help="Function that builds the model.")
@click.option("--data", metavar="CODE|FILE", required=True, help="Loader, or .npy, .npz, .pt, .safetensors.")
@click.option("--out", type=click.Path(path_type=Path), help="[default: NAME.recalibrated.EXT beside CHECKPOINT]")
@click.option("--estimator", type=click.Choice(["pooled", "paper"]), default="pooled", show_default=True)
@click.option("--layers", multiple=True, help="Only layers whose name matches; * stands for anything.")
@click.option("--batch-size", type=click.IntRange(1), default=BATCH_SIZE, show_default=True, help="Of a file.")
@click.option("--max-samples", type=click.IntRange(1), help="Stop after so many.")
@click.option("--tolerance", type=FiniteRange(0, min_open=True), help="Stop at this standard error of the means.")
@click.option("--layer-by-layer", is_flag=True, help="A pass over the data for each layer, from first to last.")
@click.option("--device", default="cpu", show_default=True, help="Where to run the model: cpu, cuda, ...")
@click.option("--threads", type=click.IntRange(1), help="[default: one per core]")
@click.option("--force", is_flag=True, help="Overwrite an earlier file.")
@click.pass_context
def recalibrate(
    ctx: click.Context,
    checkpoint: Path,
    factory: str,
    data: str,
    out: Path | None,
    layers: tuple[str, ...],
    batch_size: int,
    device: str,
    threads: int | None,
    force: bool,
    **how: Any,
) -> int:
    """Measure a checkpoint's running statistics anew on data, and write a new checkpoint.

    CHECKPOINT is a state_dict, alone or inside what a trainer saves (.pt, .pth, ...), or .safetensors. Its weights
    must fit the model; running statistics may be missing or broken. Everything else is written as it was.

    CODE is PACKAGE.MODULE:NAME or path/to/FILE.py:NAME. It is run, while reading CHECKPOINT runs nothing. FILE counts
    samples along the first axis; FILE:NAME is one of several arrays.

    Exit status: 0 written, 1 written, but some layers still have no usable statistics, 2 an error, 130 interrupted.
    """
    if not is_file(data) and ctx.get_parameter_source("batch_size") is not ParameterSource.DEFAULT:
        raise click.UsageError("--batch-size is for files: the loader in your code makes its own batches.")
    out = out or checkpoint.with_name(f"{checkpoint.stem}.recalibrated{checkpoint.suffix}")
    if (out.suffix == SAFETENSORS) != (checkpoint.suffix == SAFETENSORS):
        raise click.UsageError(f"--out must end as the checkpoint does, in {checkpoint.suffix!r}: the format stays.")
    check_output(out, checkpoint, force)
    place = usable_device(device)
    if threads:
        torch.set_num_threads(threads)
    held = read_checkpoint(checkpoint)
    announce(factory, *([] if is_file(data) else [data]))
    inputs = open_inputs(data, batch_size)
    model = build_model(factory)
    with failures(f"moving the model to {place}"):
        model.to(place)
    faults, prefix = load_repairable(model, held)
    tell_faults(faults)
    check_layers(model, layers, faults)
    before = moments_of(model)
    result = measure(model, inputs, factory, layers=layers or "*", **how)
    put_statistics(model, result.counts, held, prefix)
    write_checkpoint(out, held)
    click.echo(f"wrote {out}", err=True)
    click.echo(table(result, before, moments_of(model), faults))
    return tell_unusable([name for name in faults if name not in result.counts])


def tell_unusable(names: Sequence[str]) -> int:
    """The exit status."""
    if names:
        click.echo(f"still without usable statistics: {listing(names)}", err=True)
    return 1 if names else 0


def check_layers(model: nn.Module, patterns: Sequence[str], faults: Mapping[str, str]) -> None:
    """Refuse patterns that match nothing, or leave out a layer without which others are measured wrongly."""
    try:
        chosen = normalizing_layers(model, patterns or "*")
    except ValueError as error:
        raise click.UsageError(f"--layers: {error}.") from error
    left = [name for name, fault in faults.items() if name not in chosen and fault != NEVER_UPDATED]
    if left:
        raise click.UsageError(f"--layers leaves out {listing(left)}, and what comes behind needs their statistics.")


def measure(model: nn.Module, inputs: Samples | Loader, factory: str, **how: Any) -> Recalibration:
    """Recalibrate with a progress bar; what the model raises is one line."""
    layers = tracking_layers(model)
    device = next(iter(layers.values())).running_mean.device
    passes = len(layers) if how["layer_by_layer"] else 1
    most = how["max_samples"]

    def call(model: nn.Module, item: Any) -> Any:
        return run_model(model, item, factory, device)

    def on_progress(batches: int, samples: int) -> None:
        done, total = (batches, inputs.batches) if most is None else (min(samples, most * passes), most)
        progress.update("measuring", done, total and total * passes)

    with Progress(None) as progress:
        try:
            return measure_statistics(model, inputs, call=call, on_progress=on_progress, **how)
        except BatchNormError:
            raise
        except ValueError as error:
            raise DataError(str(error)) from error


def moments_of(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and variance, eps added, of every layer."""
    layers = tracking_layers(model)
    moments = {name: mean_and_variance(layer) for name, layer in layers.items()}
    return {name: (mean.cpu(), var.cpu() + layers[name].eps) for name, (mean, var) in moments.items()}


def table(
    result: Recalibration,
    before: Mapping[str, tuple[Tensor, Tensor]],
    after: Mapping[str, tuple[Tensor, Tensor]],
    faults: Mapping[str, str],
) -> str:
    """What changed, layer by layer, and which layers were left alone."""
    rows: list[tuple[str, ...]] = [HEADINGS]
    for name, count in result.counts.items():
        moved = ("", "") if name in faults else changes(*before[name], *after[name])
        error = result.standard_errors[name]
        # one batch tells nothing about how much batches differ
        shown = "" if math.isnan(error) else f"{error:.2g} sd"
        rows.append((name or "(the model)", f"{count:,}", shown, *moved, faults.get(name, "")))
    rows += [(name or "(the model)", "", "", "", "", "not reached") for name in result.not_reached]
    rows += [(name or "(the model)", "", "", "", "", "frozen") for name in result.frozen]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{cell:{'<>'[0 < i < 5]}{widths[i]}}" for i, cell in enumerate(row)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def changes(mean: Tensor, var: Tensor, new_mean: Tensor, new_var: Tensor) -> tuple[str, str]:
    """The largest change of a mean in new standard deviations; the least and largest ratio of variances."""
    ratios = new_var / var
    moved = ((new_mean - mean).abs() / new_var.sqrt()).max()
    return f"{float(moved):.2g} sd", f"{float(ratios.min()):.2g} to {float(ratios.max()):.2g}"
