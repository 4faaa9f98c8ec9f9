"""A regression that trains in milliseconds, with an optimizer and a generator whose state a resumed run needs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adam": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, amsgrad=True),
}


class TinyTask:
    """Everything that ``train`` asks of a task."""

    def __init__(self, optimizer: str = "adam", steps: int = 40, every: int = 7, name: str = "tiny") -> None:
        torch.manual_seed(1)
        self.name, self.steps = name, steps
        self.settings = f"{optimizer}, {steps} steps"
        self.evaluation_steps = {*range(0, steps, every), steps}
        self.model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 1))
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.loss_scale = 1.0

    def batch(self, step: int) -> tuple[Tensor, ...]:
        x = torch.randn(6, 3, generator=torch.Generator().manual_seed(step))
        return x, x.sum(1, keepdim=True)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.model(x) - y).square().mean() * self.loss_scale

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing but model and optimizer changes."""

    @torch.no_grad()
    def evaluate(self, step: int) -> list[dict[str, Any]]:
        x, y = self.batch(-1 - step)
        return [{"step": step, "error": (self.model(x) - y).square().mean().item()}]


def bits(task: TinyTask) -> list[bytes]:
    """The whole state of a model, to compare exactly."""
    return [value.numpy().tobytes() for value in task.model.state_dict().values()]


def metrics(folder: Path) -> bytes:
    return (folder / "tiny.jsonl").read_bytes()
