"""One network of the ImageNet experiments, for the training loop."""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from batchnorm.experiments.data.batches import EvalBatches, Loader, TrainBatches
from batchnorm.experiments.data.image_set import ImageData
from batchnorm.experiments.data.shuffling import seed_of
from batchnorm.experiments.data.skipping import SkippedImages
from batchnorm.experiments.distributed import Team
from batchnorm.experiments.inception_arms import Arm, Options
from batchnorm.statistics import recalibrate

# of the validation set; larger than a training batch, as nothing is kept for a backward pass
VALIDATION_BATCH = 100
# Batches of Algorithm 2 at the end of the training
POPULATION_BATCHES = 100


class Job(NamedTuple):
    """One network to train: an arm and a seed, for so many steps from a base learning rate."""

    name: str
    arm: Arm
    seed: int
    steps: int
    evaluation_steps: frozenset[int]
    base_learning_rate: float


class InceptionTask:
    """A job, for the training loop."""

    def __init__(
        self, job: Job, options: Options, data: ImageData, team: Team, workers: int, **variations: Any
    ) -> None:
        self.name, self.job, self.options, self.data, self.team = job.name, job, options, data, team
        arm = job.arm
        shared = dataclasses.asdict(options) | {"arms": None, "seeds": None, **variations}
        self.settings = json.dumps([job.name, arm.describe(), job.seed, job.steps, job.base_learning_rate, shared])
        self.steps, self.evaluation_steps = job.steps, set(job.evaluation_steps)
        self.skipped = SkippedImages()
        self.forget_losses()
        torch.manual_seed(job.seed)
        model = options.network(arm, len(data.classes), **variations).to(team.device)
        if options.channels_last:
            model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.model = model
        self.replica = team.replicate(self.model)
        decayed = [p for p in model.parameters() if p.dim() > 1]
        others = [p for p in model.parameters() if p.dim() <= 1]
        groups = [{"params": decayed, "weight_decay": options.weight_decay_of(arm)}, {"params": others}]
        self.optimizer = torch.optim.SGD(groups, lr=job.base_learning_rate, momentum=options.momentum)
        self.learning_rate = options.learning_rate(arm, job.base_learning_rate)
        # dropout differs between processes
        torch.manual_seed(seed_of(job.seed, team.rank))
        batches = TrainBatches(
            data.train,
            seed=job.seed,
            batch_size=options.batch_size,
            size=options.size,
            within_shards="shuffling" in arm.changes,
            distortion="reduced" if "distortion" in arm.changes else "full",
            flip=data.flip,
            rank=team.rank,
            world_size=team.world_size,
            channels_last=options.channels_last,
        )
        self.batches = Loader(batches, workers)
        self.validation = EvalBatches(data.val, batch_size=VALIDATION_BATCH, size=options.size)

    def close(self) -> None:
        self.batches.close()

    def batch(self, index: int) -> tuple[Tensor, Tensor]:
        batch = self.batches.batch(index)
        self.skipped.count(batch)
        return self.to_device(batch.images), batch.labels.to(self.team.device)

    def to_device(self, images: Tensor) -> Tensor:
        layout = torch.channels_last if self.options.channels_last else torch.contiguous_format
        return images.to(self.team.device, memory_format=layout)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.team.device.type, torch.bfloat16, enabled=self.options.precision == "bfloat16")

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        with self.autocast():
            scores = self.replica(images)
        loss = F.cross_entropy(scores.float(), labels)
        self.loss_sum = self.loss_sum.to(loss.device) + loss.detach()
        self.losses += 1
        return loss

    def forget_losses(self) -> None:
        """Those of the mini-batches since the last evaluation."""
        self.loss_sum, self.losses = torch.zeros((), dtype=torch.float64), 0

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped.state_dict(), "loss_sum": self.loss_sum.cpu(), "losses": self.losses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skipped.load_state_dict(state["skipped"])
        self.loss_sum, self.losses = state["loss_sum"], state["losses"]

    @torch.no_grad()
    def evaluate(self, step: int) -> list[dict[str, Any]]:
        """Validation accuracy with running averages, and with Algorithm 2 at the end."""
        self.team.share_buffers(self.model)
        top1, top5, loss = self.validate()
        training_loss = (
            self.team.sum(self.loss_sum).item() / (self.team.world_size * self.losses) if self.losses else None
        )
        row = {
            "arm": self.job.arm.name,
            "seed": self.job.seed,
            "step": step,
            "validation_accuracy": top1,
            "validation_top5": top5,
            "validation_loss": loss,
            "training_loss": training_loss,
            "learning_rate": self.learning_rate(step),
            "skipped_images": int(self.team.sum(torch.tensor(self.skipped.skipped)).item()),
        }
        self.forget_losses()
        if step == self.steps:
            row["validation_accuracy_population"] = self.population_accuracy() if self.job.arm.batch_norm else None
        return [row]

    def validate(self) -> tuple[float, float, float]:
        """Top-1 and top-5 accuracy and mean loss over the validation images, shared among the processes."""
        totals = torch.zeros(4, dtype=torch.float64)
        for images, labels in self.validation_batches():
            with self.autocast():
                scores = self.model(self.to_device(images)).float()
            labels = labels.to(scores.device)
            ranks = scores.topk(min(5, scores.shape[1]), 1).indices == labels[:, None]
            loss = F.cross_entropy(scores, labels, reduction="sum")
            totals += torch.stack([ranks[:, 0].sum(), ranks.sum(), loss, torch.tensor(len(labels))]).double().cpu()
        top1, top5, loss, count = self.team.sum(totals).tolist()
        return top1 / count, top5 / count, loss / count

    def validation_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        for index in range(self.team.rank, len(self.validation), self.team.world_size):
            batch = self.validation[index]
            yield batch.images, batch.labels

    def population_accuracy(self) -> float:
        """Algorithm 2 on the last training batches again, as they come without the shuffling of a new epoch."""
        running = {name: value.clone() for name, value in self.model.state_dict().items()}
        dataset = self.batches.dataset
        first = max(self.steps * self.options.accumulate - POPULATION_BATCHES, 0)
        batches = (self.to_device(dataset[i].images) for i in range(first, first + POPULATION_BATCHES))
        recalibrate(self.model, batches, estimator="paper")
        accuracy, *_ = self.validate()
        self.model.load_state_dict(running)
        return accuracy
