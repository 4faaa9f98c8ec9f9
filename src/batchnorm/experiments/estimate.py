"""What a run will cost: FLOPs, memory and hours, from some mini-batches of every arm."""

import time
from typing import NamedTuple

import torch
import torch.nn.functional as F

from batchnorm.experiments.data.image_set import ImageData
from batchnorm.experiments.inception_arms import BASELINE, RATES, SWEEP_STEPS, Options, arm_named
from batchnorm.insight.memory import memory_report

STEPS = 3


def estimate(options: Options, data: ImageData, networks: dict[str, int]) -> str:
    """A few lines to read before a run is started; random images stand in for the data.

    Args:
        options: the settings.
        data: the images.
        networks: how many networks of each arm are trained.
    """
    images = options.batch_size * options.accumulate * options.world_size
    lines = [
        f"{len(data.train):,} training and {len(data.val):,} validation images of {len(data.classes)} classes, "
        f"{options.size} x {options.size}; {options.steps:,} steps of {images} images per network, "
        f"{options.steps * images / len(data.train):.1f} epochs"
    ]
    plan = [(name, count, options.steps) for name, count in networks.items()]
    if options.base_learning_rate is None:
        plan.insert(0, (f"{BASELINE}, learning rates", len(RATES), min(SWEEP_STEPS, options.steps)))
    total = 0.0
    for name, count, steps in plan:
        cost = one_step(options, name.partition(",")[0], len(data.classes))
        hours = cost.seconds * steps * options.accumulate * count / 3600
        total += hours
        lines.append(
            f"{name}: {cost.flops / 1e9:.1f} GFLOP and {cost.seconds * 1e3:.0f} ms per mini-batch, "
            f"{cost.kept / 2**20:.0f} MiB kept for the backward pass beside {cost.weights / 2**20:.0f} MiB of weights, "
            f"gradients and momentum; {count} x {steps:,} steps, {hours:.1f} h"
        )
    lines.append(f"together {total:.1f} h without evaluations")
    return "\n".join(lines)


class Cost(NamedTuple):
    """Of a mini-batch: seconds, floating-point operations, bytes that autograd keeps. And the bytes of the weights."""

    seconds: float
    flops: float
    kept: int
    weights: int


def one_step(options: Options, name: str, num_classes: int) -> Cost:
    from torch.utils.flop_counter import FlopCounterMode

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
    weights = 3 * sum(parameter.nbytes for parameter in model.parameters())
    return Cost(seconds, float(counter.get_total_flops()), memory_report(model, images).kept, weights)
