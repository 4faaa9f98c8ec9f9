"""Started several times at once, by torchrun or by hand: trains a small network in the folder given."""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.errors import RunError
from batchnorm.experiments.distributed import Team, join_team
from batchnorm.experiments.training import StoppedError, train

STEPS = 12


class SharedTask:
    """Every process sees other mini-batches; dropout, if any, draws from each process's own generator."""

    name, settings, steps, evaluation_steps = "shared", "shared", STEPS, {6, STEPS}

    def __init__(self, team: Team, dropout: float) -> None:
        torch.manual_seed(1)
        self.team = team
        self.seen = 0
        self.model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 1)).double()
        self.replica = team.replicate(self.model)
        torch.manual_seed(2 + team.rank)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)

    def batch(self, index: int) -> tuple[Tensor, ...]:
        if os.environ.get("DIES") == f"{self.team.rank}:{index}":
            os._exit(3)
        number = index * self.team.world_size + self.team.rank
        x = torch.randn(6, 3, generator=torch.Generator().manual_seed(number)).double()
        self.seen += len(x)
        return x, x.sum(1, keepdim=True)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.replica(x) - y).square().mean()

    def evaluate(self, step: int) -> list[dict[str, Any]]:
        weights = [parameter.detach().flatten().tolist() for parameter in self.model.parameters()]
        return [{"step": step, "seen": self.team.sum(torch.tensor(self.seen)).item(), "weights": weights}]

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]


def train_in(team: Team, folder: Path, accumulate: int, dropout: float, stop_at: int) -> None:
    done = []
    task = SharedTask(team, dropout)
    train(
        task,
        folder,
        learning_rate=lambda step: 0.05 * 0.9**step,
        accumulate=accumulate,
        team=team,
        look_every=1,
        on_progress=done.append,
        # one process alone is asked to stop
        should_stop=lambda: team.rank == team.world_size - 1 and done[-1] == stop_at,
    )


def main(folder: Path, accumulate: int, dropout: float, stop_at: int) -> int:
    try:
        with join_team(timeout=20) as team:
            train_in(team, folder, accumulate, dropout, stop_at)
    except StoppedError:
        return 5
    except RunError as error:
        print(f"RunError: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])))
