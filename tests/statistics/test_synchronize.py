"""Statistics of two gloo processes become those of all data, on each of them, or none changes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import batchnorm.nn
from batchnorm.statistics import copy_running_stats, synchronize_running_stats

WORLD = 2
SIZES = [5, 11]


class Branches(nn.Module):
    """Layers that all see the input, so that each measures what one process with all data would."""

    def __init__(self) -> None:
        super().__init__()
        self.theirs = nn.BatchNorm1d(4, momentum=None)
        self.ours = nn.Sequential(batchnorm.nn.BatchNorm1d(4, momentum=None, activation="relu"))
        self.white = batchnorm.nn.Whitening1d(4, momentum=None, group_size=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.theirs(x) + self.ours(x) + self.white(x)


def shard(rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(SIZES[rank], 4, generator=generator, dtype=torch.float64) + 10 * rank


def after_a_step(rank: int) -> nn.Module:
    parallel = nn.parallel.DistributedDataParallel(Branches().double(), broadcast_buffers=False)
    parallel(shard(rank)).square().sum().backward()
    return parallel


def statistics(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def attempt(model: nn.Module, **options: Any) -> str:
    """The error of a synchronization that must change nothing."""
    before = statistics(model)
    try:
        synchronize_running_stats(model, **options)
    except (ValueError, RuntimeError) as error:
        torch.testing.assert_close(statistics(model), before, rtol=0, atol=0, equal_nan=True)
        return f"{type(error).__name__}: {error}"
    return "no error"


def cases(rank: int) -> dict[str, Callable[[], Any]]:
    def merged() -> dict[str, Tensor]:
        model = after_a_step(rank)
        synchronize_running_stats(model, count=SIZES[rank])
        copy_running_stats(model, plain := Branches().double())
        return statistics(plain)

    def two_normals(frozen: bool = False, process_group: Any = None) -> dict[str, Tensor]:
        model = Branches()
        model.theirs.running_mean.fill_(4.0 * rank)
        model.theirs.frozen_statistics = frozen
        synchronize_running_stats(model, process_group=process_group)
        return statistics(model)

    def groups_of_one() -> dict[str, Tensor]:
        return two_normals(process_group=[dist.new_group([each]) for each in range(WORLD)][rank])

    def poisoned() -> str:
        model = Branches()
        model.ours[0].running_var[2] = 1.0 if rank != 1 else float("nan")
        return attempt(model)

    return {
        "merged": merged,
        "two normals": two_normals,
        "frozen": lambda: two_normals(frozen=True),
        "groups of one": groups_of_one,
        "NaN": poisoned,
        "other layers": lambda: attempt(Branches() if rank == 0 else nn.BatchNorm1d(4)),
        "a count on one": lambda: attempt(Branches(), count=7 if rank == 0 else None),
        "fails on one": lambda: attempt(Branches(), count=7 if rank == 0 else 0),
    }


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    torch.save({name: case() for name, case in cases(rank).items()}, f"{folder}/{rank}.pt")
    # a rank that leaves first closes connections the other may still read from
    dist.barrier()
    dist.destroy_process_group()


def test_processes_agree_on_the_statistics_of_all_data_or_all_fail(tmp_path: Path):
    torch.multiprocessing.spawn(worker, (str(tmp_path),), nprocs=WORLD)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD)]
    whole = Branches().double()
    whole(torch.cat([shard(rank) for rank in range(WORLD)]))
    for results in ranks:
        torch.testing.assert_close(results["merged"], statistics(whole))
        torch.testing.assert_close(results["merged"], ranks[0]["merged"], rtol=0, atol=0)
        assert results["NaN"] == "ValueError: process 1 has inf or NaN in the running statistics of layer 'ours.0'"
        assert "process 1 has other layers than process 0" in results["other layers"]
        assert "or only one of them gives a count" in results["a count on one"]
        assert results["two normals"]["theirs.running_mean"].tolist() == [2] * 4
        assert results["two normals"]["theirs.running_var"].tolist() == [5] * 4
    for name in ("frozen", "groups of one"):
        assert [results[name]["theirs.running_mean"].tolist() for results in ranks] == [[0] * 4, [4] * 4]
        assert [results[name]["theirs.running_var"].tolist() for results in ranks] == [[1] * 4, [1] * 4]
    assert ranks[1]["fails on one"] == "ValueError: expected counts of at least 1, got 0"
    assert ranks[0]["fails on one"] == "RuntimeError: nothing was changed: process 1 failed, see its message"


def test_one_process_alone_keeps_its_bits():
    model = Branches().double()
    model(torch.randn(9, 4, dtype=torch.float64))
    before = statistics(model)
    for options in ({}, {"weight": 3.0}, {"count": 7}):
        synchronize_running_stats(model, **options)
        torch.testing.assert_close(statistics(model), before, rtol=0, atol=0)


def test_frozen_statistics_alone_are_nothing_to_do():
    model = nn.Sequential(nn.BatchNorm1d(4))
    model[0].frozen_statistics = True
    synchronize_running_stats(model)
    assert model[0].running_mean.tolist() == [0] * 4
