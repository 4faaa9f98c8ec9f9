"""Figure 1 of the paper: MNIST with and without BN.

Section 4.1: 28 x 28 binary input, three hidden layers of 100 sigmoid units, 10 outputs, cross-entropy, 50,000 steps of
60 examples, BN on each hidden layer. Both arms of a seed begin with the same weights and see the same batches.

Measured with the defaults on two cores (results/mnist): 97.2 % without BN, 97.6 % with, in 73 s.
"""

import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

from batchnorm.environment import describe_environment
from batchnorm.errors import RunError
from batchnorm.experiments.claims import claims_record
from batchnorm.experiments.data.mnist import CLASSES, PIXELS, Mnist, load_mnist
from batchnorm.experiments.mnist_claims import ARMS, figure1_claims
from batchnorm.experiments.models.mlp import StackedBatchNorm, StackedMLP
from batchnorm.experiments.run_folder import TIMING, WORK, finish_run, open_run
from batchnorm.experiments.training import Timing, describe_timing, read_rows, train
from batchnorm.experiments.workers import report_progress, run_jobs, should_stop
from batchnorm.files import write_atomic, write_json
from batchnorm.statistics import recalibrate

PERCENTILES = (0.15, 0.50, 0.85)
# A fixed sample of the test images: the curves are about change over training, which the sample shares.
PERCENTILE_IMAGES = 1000
# The uniform grid on which the percentiles' drift is measured: so many equal parts of the training.
GRID = 25

LEARNING_RATES = (0.01, 0.1, 0.5, 1.0, 2.0)
INIT_STDS = (0.05, 0.1, 1.0)

NOTES = (
    "The paper gives the network, 50,000 steps of 60 examples, sigmoid units, binary input and Gaussian initial "
    "weights. It gives no learning rate, initial scale, threshold of the binary input, epsilon, or constant of the "
    "running average.",
    "Default learning rate and initial scale: the middle of the sweep's grid on both axes (rates .01 .1 .5 1 2; "
    "scales .05 .1 1), fixed before anything was trained. The sweep shows every other point.",
    "Optimizer: plain SGD on the mean cross-entropy, without momentum, weight decay or schedule. Biases begin at 0.",
    "Both arms of a seed begin with the same weights and see the same batches: a shuffle per epoch, without repeats.",
    "Test accuracy uses population statistics, never those of the test batch: running averages along the training, and "
    "also Algorithm 2 at the end (an epoch of training batches, weights frozen).",
    "Percentiles are those of a sigmoid's input over the first 1,000 test images; with BN that input is BN's output.",
)


@dataclasses.dataclass(frozen=True)
class Options:
    """The settings of a run. The paper states input, hidden, steps and batch_size, and leaves the rest open.

    ``stacks`` is how many processes share the seeds of an arm. Matrix products of other stacks round differently, so
    it belongs to what determines the numbers.
    """

    steps: int = 50_000
    batch_size: int = 60
    seeds: tuple[int, ...] = (0, 1, 2)
    input: str = "binary"
    hidden: tuple[int, ...] = (100, 100, 100)
    learning_rate: float = 0.5
    init_std: float = 0.1
    momentum: float = 0.1
    eps: float = 1e-5
    device: str = "cpu"
    stacks: int = 1


# For the comparison of layers; 1.2 s in all
ROUNDS, STEPS_OF_A_ROUND = 5, 100


class MnistTask:
    """One arm, all seeds of a stack, for the training loop."""

    def __init__(self, name: str, arm: str, seeds: list[int], options: Options, data: Mnist) -> None:
        self.name, self.arm, self.seeds, self.options = name, arm, seeds, options
        self.settings = json.dumps({"arm": arm, "seeds": seeds, "options": dataclasses.asdict(options)})
        device = torch.device(options.device)
        self.train_images, self.train_labels = data.train_images.to(device), data.train_labels.to(device)
        self.test_inputs, self.test_labels = data.inputs(data.test_images.to(device)), data.test_labels.to(device)
        self.inputs = data.inputs
        self.steps = options.steps
        self.evaluation_steps = evaluation_steps(options.steps)
        self.model = StackedMLP(
            seeds,
            (PIXELS, *options.hidden, CLASSES),
            batch_norm=arm == "bn",
            init_std=options.init_std,
            eps=options.eps,
            momentum=options.momentum,
        ).to(options.device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=options.learning_rate, fused=True)
        self.batches_per_epoch = len(data.train_labels) // options.batch_size
        self.epoch = -1

    def batch(self, index: int) -> tuple[Tensor, Tensor]:
        epoch, position = divmod(index, self.batches_per_epoch)
        if epoch != self.epoch:
            self.epoch, self.order = epoch, self.epoch_order(epoch)
        chosen = self.order[position]
        inputs = self.inputs(self.train_images.index_select(0, chosen))
        return inputs.view(len(self.seeds), self.options.batch_size, PIXELS), self.train_labels.index_select(0, chosen)

    def epoch_order(self, epoch: int) -> Tensor:
        """Which examples make up each step: (steps of the epoch, stack x batch_size), a shuffle of its own per seed."""
        count = self.batches_per_epoch * self.options.batch_size
        orders = []
        for seed in self.seeds:
            generator = torch.Generator().manual_seed(1_000_003 * (seed + 1) + epoch)
            order = torch.randperm(len(self.train_labels), generator=generator)
            orders.append(order[:count].view(self.batches_per_epoch, self.options.batch_size))
        return torch.cat(orders, 1).to(self.options.device)

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """The sum over the stack of each network's mean cross-entropy: every network gets its own gradient."""
        scores = self.model(images).reshape(-1, CLASSES)
        return F.cross_entropy(scores, labels, reduction="sum") / self.options.batch_size

    @torch.no_grad()
    def evaluate(self, step: int) -> list[dict[str, Any]]:
        """Test accuracy with running statistics, and the percentiles of every sigmoid input of the last layer."""
        z = self.model.last_sigmoid_input(self.test_inputs)
        scores = self.model.output(torch.sigmoid(z))
        accuracy, loss = self.accuracy(scores), self.test_loss(scores)
        curves = z[:, :PERCENTILE_IMAGES].quantile(torch.tensor(PERCENTILES, device=z.device), dim=1)
        rows = []
        for i, seed in enumerate(self.seeds):
            row = {
                "arm": self.arm,
                "seed": seed,
                "learning_rate": self.options.learning_rate,
                "init_std": self.options.init_std,
                "step": step,
                "test_accuracy": accuracy[i],
                "test_loss": round(loss[i], 6),
            }
            row["percentiles"] = [[round(value, 3) for value in curve] for curve in curves[:, i].tolist()]
            if step == self.steps:
                row["test_accuracy_population"] = None
            rows.append(row)
        if step == self.steps and self.arm == "bn":
            for row, value in zip(rows, self.population_accuracy(), strict=True):
                row["test_accuracy_population"] = value
        return rows

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing but model and optimizer changes."""

    def population_accuracy(self) -> list[float]:
        """Test accuracy after Algorithm 2: statistics averaged over an epoch of training batches, weights frozen."""
        running = {name: value.clone() for name, value in self.model.state_dict().items()}
        batches = (self.batch(step)[0] for step in range(self.batches_per_epoch))
        recalibrate(self.model, batches, estimator="paper")
        accuracy = self.accuracy(self.model(self.test_inputs))
        self.model.load_state_dict(running)
        return accuracy

    def accuracy(self, scores: Tensor) -> list[float]:
        return (scores.argmax(-1) == self.test_labels).double().mean(-1).tolist()

    def test_loss(self, scores: Tensor) -> list[float]:
        return [F.cross_entropy(network, self.test_labels).item() for network in scores]


def evaluation_steps(steps: int) -> set[int]:
    """Dense at first, where the arms differ most, then uniform: 2,000 apart for 50,000 steps."""
    dense = {*range(100, 1000, 100), *range(1000, 5000, 500), *range(5000, 10_000, 1000)}
    return {step for step in dense if step < steps} | grid_steps(steps)


def grid_steps(steps: int) -> set[int]:
    return {steps * part // GRID for part in range(GRID + 1)}


def reproduce_mnist(
    options: Options,
    folder: Path,
    *,
    data_folder: Path | None = None,
    workers: int = 1,
    resume: bool = False,
    force: bool = False,
    on_progress: Callable[[str, int], None] = lambda job, step: None,
) -> dict[str, Any]:
    """Train both arms for every seed, write the run folder, and return its claims.

    Args:
        options: the settings.
        folder: of the run: config, environment, metrics, timing, claims and final checkpoints (safetensors).
        data_folder: the user's own MNIST files; None for the bundled ones.
        workers: processes of one thread each. They change the time, not the numbers of given ``options``.
        resume: continue a stopped run, bit for bit.
        force: delete an earlier run in the folder.
        on_progress: called with a job's name and its finished steps.

    Returns:
        The record that ``claims.json`` holds.

    Raises:
        DataError: the data files are not MNIST's.
        RunError: the folder or the device cannot be used as asked, or a worker died.
    """
    check_inputs(options, data_folder)
    config = {
        "schema_version": 1,
        "experiment": "mnist",
        "options": dataclasses.asdict(options),
        "notes": list(NOTES),
    }
    with open_run(folder, config, resume=resume, force=force) as record:
        if record is None:
            jobs = {
                f"{arm}-{i}" if options.stacks > 1 else arm: (arm, arm, seeds, options, data_folder)
                for arm in ARMS
                for i, seeds in enumerate(split_evenly(options.seeds, options.stacks))
            }
            rows = train_all(jobs, folder, workers, on_progress)
            claims, unit = figure1_claims(rows, options.seeds, grid_steps(options.steps))
            record = finish_run(folder, rows, claims_record("mnist", claims, unit_drawn=unit))
    return record


def split_evenly(seeds: tuple[int, ...], parts: int) -> list[list[int]]:
    """The seeds in order, in parts that differ by one at most, larger ones first.

    Example:
        >>> split_evenly((0, 1, 2), 2)
        [[0, 1], [2]]
    """
    size, larger = divmod(len(seeds), parts)
    ends = [size * (i + 1) + min(i + 1, larger) for i in range(parts)]
    return [list(seeds[start:end]) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def check_inputs(options: Options, data_folder: Path | None) -> None:
    """Refuse data and device before anything is written."""
    load_mnist(data_folder, options.input)
    try:
        torch.zeros(1, device=options.device).item()
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise RunError(f"device {options.device!r} cannot be used here: {reason}; try --device cpu") from error


def train_all(
    jobs: dict[str, tuple[Any, ...]], folder: Path, workers: int, on_progress: Callable[[str, int], None]
) -> list[dict[str, Any]]:
    """Train every stack and return the rows of all of them; what it took goes into ``timing.json``."""
    workers = min(workers, len(jobs))
    write_json(folder / "environment.json", {**describe_environment(), "threads": workers})
    started = time.perf_counter()
    arguments = [(name, (name, *job, folder)) for name, job in jobs.items()]
    results = run_jobs(train_job, arguments, workers=workers, on_progress=on_progress)
    timings = {name: timing for name, (timing, _) in results.items()}
    totals = [sum(timing) for timing in timings.values()]
    # a resumed run took longer than this session, by as much as its tasks remember
    training_seconds = max(time.perf_counter() - started, max(totals), sum(totals) / workers)
    arms: dict[str, dict[str, Any]] = {}
    for name, (label, _, seeds, options, _) in jobs.items():
        # the first stack of an arm is its largest
        if label not in arms:
            arms[label] = describe_timing(timings[name], options.steps, len(seeds)) | results[name][1]
    write_json(folder / TIMING, {"training_seconds": round(training_seconds, 2), "arms": arms})
    rows = [row for name in jobs for row in read_rows(folder / WORK / f"{name}.jsonl")]
    return sorted(rows, key=lambda row: (row["arm"], row["seed"], row["step"]))


def train_job(
    name: str, label: str, arm: str, seeds: list[int], options: Options, data_folder: Path | None, folder: Path
) -> tuple[Timing, dict[str, Any]]:
    """Train one stack in a worker and leave each network's final weights.

    Returns where the time went and, with BN, what its layers cost.
    """
    task = MnistTask(name, arm, seeds, options, load_mnist(data_folder, options.input))
    (folder / WORK).mkdir(exist_ok=True)
    report = functools.partial(report_progress, name)
    timing = train(task, folder / WORK, on_progress=report, should_stop=should_stop)
    (folder / "checkpoints").mkdir(exist_ok=True)
    for i, seed in enumerate(seeds):
        write_atomic(folder / "checkpoints" / f"{label}-seed{seed}.safetensors", save(task.model.network_state(i)))
    return timing, {"step_in_turn_microseconds": steps_in_turn(task)} if arm == "bn" else {}


def steps_in_turn(task: MnistTask) -> dict[str, float]:
    """Microseconds of a step with our fused layers and with torch's, by turns; the weights of the task change.

    Both go through the same steps; the median over the rounds is taken.
    """
    model = task.model.train()
    stacked_norms = [norm for norm in model.norms if isinstance(norm, StackedBatchNorm)]
    fused: list[nn.Module] = [stacked.norm for stacked in stacked_norms]
    torchs: list[nn.Module] = [
        nn.Sequential(nn.BatchNorm1d(norm.num_features, norm.eps, norm.momentum), nn.Sigmoid())
        for norm in (stacked.norm for stacked in stacked_norms)
    ]
    seconds: dict[str, list[float]] = {"torch": [], "fused": []}
    steps = min(STEPS_OF_A_ROUND, task.steps)
    for _ in range(ROUNDS):
        for name, layers in (("torch", torchs), ("fused", fused)):
            for stacked, layer in zip(stacked_norms, layers, strict=True):
                stacked.add_module("norm", layer)
            optimizer = torch.optim.SGD(model.parameters(), lr=task.options.learning_rate, fused=True)
            started = time.perf_counter()
            for step in range(steps):
                loss = task.loss(*task.batch(step))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            seconds[name].append((time.perf_counter() - started) / steps)
    return {name: round(statistics.median(times) * 1e6, 1) for name, times in seconds.items()}
