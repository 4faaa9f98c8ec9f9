"""What processes tell each other about statistics: everything in one message, and errors that all of them raise."""

import torch
import torch.distributed as dist
from torch import Tensor


def gather(packed: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The vectors (K,) of all processes, (W, K), in one collective call; alone, (1, K)."""
    if not is_distributed():
        return packed[None]
    rows = [torch.empty_like(packed) for _ in range(dist.get_world_size(group))]
    dist.all_gather(rows, packed, group=group)
    return torch.stack(rows)


def agree(error: Exception | None, device: torch.device, group: dist.ProcessGroup | None = None) -> None:
    """Raise on every process what failed on one, so that none waits for another."""
    if not is_distributed():
        if error is not None:
            raise error
        return
    failed = gather(torch.tensor([error is not None], dtype=torch.uint8, device=device), group)[:, 0].nonzero()
    if error is not None:
        raise error
    if len(failed):
        raise RuntimeError(f"nothing was changed: process {int(failed[0])} failed, see its message")


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()
