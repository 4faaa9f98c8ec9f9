"""DistributedDataParallel around our layers: two gloo processes, gradients and buffers as with torch's layers."""

import copy
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

import batchnorm.nn

WORLD = 2
STEPS = 2


def train(model: torch.nn.Module, rank: int) -> dict[str, Tensor]:
    """Gradients and buffers after a few steps of data-parallel training, each rank with its own data."""
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    for step in range(STEPS):
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(10 * step + rank))
        model.zero_grad()
        parallel(x).square().sum().backward()
    grads = {f"{name}.grad": p.grad for name, p in model.named_parameters()}
    return grads | dict(model.named_buffers())


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    torch.manual_seed(0)
    linear = torch.nn.Linear(4, 3)
    results = {
        home.__name__: train(torch.nn.Sequential(copy.deepcopy(linear), home.BatchNorm1d(3)), rank)
        for home in (batchnorm.nn, torch.nn)
    }
    layers = batchnorm.nn.GhostBatchNorm1d(3, ghost_batch_size=2), batchnorm.nn.BatchRenorm1d(3)
    results["relatives"] = train(torch.nn.Sequential(copy.deepcopy(linear), *layers), rank)
    torch.save(results, f"{folder}/{rank}.pt")
    # a rank that leaves first closes connections the other may still read from
    dist.barrier()
    dist.destroy_process_group()


def test_data_parallel_gradients_and_buffers_equal_torchs(tmp_path: Path):
    torch.multiprocessing.spawn(worker, (str(tmp_path),), nprocs=WORLD)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD)]
    for results in ranks:
        torch.testing.assert_close(results["batchnorm.nn"], results["torch.nn"])
        assert results["batchnorm.nn"]["1.num_batches_tracked"] == STEPS
        assert results["relatives"]["2.schedule_step"] == STEPS
    for name in ("batchnorm.nn", "relatives"):
        grads = [{k: v for k, v in results[name].items() if k.endswith("grad")} for results in ranks]
        torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=0)
