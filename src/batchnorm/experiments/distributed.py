"""One process or several: the same training under ``torchrun``, with one replica of the model per process.

Every process computes the gradient of its own mini-batches and DistributedDataParallel averages them. Batch
normalization stays per replica, as in the paper; the running statistics are those of the first process.
"""

import contextlib
import datetime
import gc
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from batchnorm.errors import RunError

TIMEOUT_SECONDS = 300.0


class Team:
    """The processes of a run; this one is number ``rank`` of ``world_size`` and computes on ``device``."""

    def __init__(self, device: torch.device, rank: int = 0, world_size: int = 1) -> None:
        self.device, self.rank, self.world_size = device, rank, world_size
        self.replica: DistributedDataParallel | None = None

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0

    def replicate(self, model: nn.Module) -> nn.Module:
        """The model whose gradients are averaged over the team; the model itself where it is alone."""
        if self.world_size == 1:
            return model
        devices = [self.device] if self.device.type == "cuda" else None
        self.replica = DistributedDataParallel(model, device_ids=devices)
        return self.replica

    def accumulating(self, is_last: bool) -> AbstractContextManager[Any]:
        """Around forward and backward of a mini-batch: only after the last one of a step gradients are averaged."""
        return contextlib.nullcontext() if is_last or self.replica is None else self.replica.no_sync()

    def any(self, condition: bool) -> bool:
        """Whether it holds for any process; all of them must ask."""
        return self.sum(torch.tensor([float(condition)])).item() > 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over the processes, in float64, on the CPU."""
        values = values.double()
        if self.world_size == 1:
            return values.cpu()
        values = values.to(self.device)
        dist.all_reduce(values)
        return values.cpu()

    def gather(self, value: Any) -> list[Any]:
        """What every process has, in the order of their ranks."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Until every process has come here."""
        if self.world_size > 1:
            dist.barrier()

    def share_buffers(self, model: nn.Module) -> None:
        """Give every process the running statistics of the first."""
        if self.world_size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)


@contextlib.contextmanager
def join_team(device: str = "cpu", timeout: float = TIMEOUT_SECONDS) -> Iterator[Team]:
    """The team that ``torchrun`` started this process for, or this process alone.

    Args:
        device: "cpu" (gloo) or "cuda" (NCCL, one GPU per process).
        timeout: seconds after which a process that waits for another gives up.

    Raises:
        RunError: the device cannot be used, or another process of the team ended.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    own = f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in os.environ else device
    chosen = usable_device(own)
    if world_size == 1:
        yield Team(chosen)
        return
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    backend = "nccl" if chosen.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout))
    team = Team(chosen, dist.get_rank(), world_size)
    try:
        yield team
    # gloo raises a plain RuntimeError when a connection breaks
    except (dist.DistError, RuntimeError) as error:
        if isinstance(error, torch.cuda.OutOfMemoryError) or not is_about_others(error):
            raise
        raise RunError(
            f"process {dist.get_rank()} lost another process of the run, which ended or hangs "
            f"({' '.join(str(error).split())[:120]}); see its message, and continue with --resume"
        ) from error
    finally:
        # A replica that outlives the group keeps its threads, and their end at that of the process is an abort
        team.replica = None
        gc.collect()
        dist.destroy_process_group()
        gc.collect()


def is_about_others(error: Exception) -> bool:
    """Whether a collective failed because of another process."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error).lower()
    return any(words in text for words in ("gloo", "connection", "timed out", "peer", "socket", "broken pipe"))


def usable_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise RunError(f"device {name!r} cannot be used here: {reason}; try --device cpu") from error
    return device
