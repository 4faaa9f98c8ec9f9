"""What a run will cost: FLOPs, memory and hours, from one step of every arm."""

import resource
import sys
import time

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from batchnorm.experiments.data.image_set import ImageData
from batchnorm.experiments.inception_arms import RATES, SWEEP_STEPS, Options, arm_named
from batchnorm.insight.memory import memory_report

STEPS = 3


def estimate(options: Options, data: ImageData) -> str:
    """A few lines to read before a run is started; random images stand in for the data."""
    lines = [
        f"{len(data.train):,} training and {len(data.val):,} validation images of {len(data.classes)} classes, "
        f"{options.size} x {options.size}; {options.steps:,} steps of {options.batch_size * options.world_size} images "
        f"per network, {options.steps * options.batch_size * options.world_size / len(data.train):.1f} epochs"
    ]
    total = 0.0
    for name in options.arms:
        seconds, flops, saved = one_step(options, name, len(data.classes))
        hours = seconds * options.steps * options.accumulate * len(options.seeds) / 3600
        if options.base_learning_rate is None and name == options.arms[0]:
            hours += seconds * len(RATES) * min(SWEEP_STEPS, options.steps) / 3600
        total += hours
        lines.append(
            f"{name}: {flops / 1e9:.1f} GFLOP and {seconds * 1e3:.0f} ms per step, {saved / 2**20:.0f} MiB kept for "
            f"the backward pass, {hours:.1f} h"
        )
    # kilobytes on Linux, bytes on macOS
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**10 if sys.platform == "linux" else 2**20)
    lines.append(f"together {total:.1f} h without evaluations; {peak:,.0f} MiB of memory so far")
    return "\n".join(lines)


def one_step(options: Options, name: str, num_classes: int) -> tuple[float, float, int]:
    """Seconds of a step, floating-point operations of it, bytes that autograd keeps."""
    arm = arm_named(name)
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    model = options.network(arm, num_classes).to(options.device, memory_format=layout)  # pyright: ignore[reportCallIssue]
    images = torch.randn(options.batch_size, 3, options.size, options.size).to(options.device, memory_format=layout)
    labels = torch.randint(num_classes, (options.batch_size,), device=options.device)

    def step() -> None:
        F.cross_entropy(model(images), labels).backward()

    step()
    started = time.perf_counter()
    for _ in range(STEPS):
        step()
    seconds = (time.perf_counter() - started) / STEPS
    with FlopCounterMode(display=False) as counter:
        step()
    return seconds, float(counter.get_total_flops()), memory_report(model, images).kept
