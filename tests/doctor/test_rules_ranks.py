"""Two gloo processes: rules about statistics, batches and layers that differ between them say the same on both."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import batchnorm
from batchnorm.doctor.examine import examine
from examined import batches, trained

WORLD = 2


def run(code: str, *args: Any) -> list[tuple[str, str, dict[str, Any]]]:
    return [(one.layer, str(one.severity), one.measured) for one in examine(*args, select=code).findings]


def partly_synchronized() -> nn.Module:
    model = trained()
    model[4] = nn.SyncBatchNorm.convert_sync_batchnorm(model[4])
    return model


def cases(rank: int) -> dict[str, Any]:
    torch.manual_seed(0)
    equal = trained()
    torch.manual_seed(0)
    other = trained()
    other[4].running_mean += rank
    torch.manual_seed(0)
    parallel = DistributedDataParallel(trained().train())
    parallel(batches(2)[rank])
    # to make one takes all processes
    model = trained()
    everywhere = nn.SyncBatchNorm.convert_sync_batchnorm(trained()).eval()
    items, uneven = batches(2), batches(2 + rank)
    results = {
        "BN403 equal": run("BN403", equal),
        "BN403 other mean": run("BN403", other),
        "BN403 parallel": run("BN403", parallel),
        "BN403 other model": run("BN403", nn.Sequential(nn.Linear(2, 2)) if rank else model),
        "BN402 uneven": run("BN402", everywhere, uneven),
        "BN402 even": run("BN402", everywhere, items),
        "BN402 not synchronized": run("BN402", trained(), uneven),
        "BN401 few": run("BN401", trained(), [x[:3] for x in items]),
        "BN401 many": run("BN401", trained(), items),
        "BN401 few, synchronized": run("BN401", everywhere, [x[:3] for x in items]),
        "BN401 mixed": run("BN401", partly_synchronized()),
        "BN108": run("BN108", parallel, [x * (1 + 4 * rank) for x in items]),
        "not run": [one.code for one in examine(trained()).not_run],
    }
    batchnorm.synchronize_running_stats(other)
    return results | {"BN403 synchronized": run("BN403", other)}


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    torch.save(cases(rank), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_processes_find_what_differs_between_them(tmp_path: Path):
    torch.multiprocessing.spawn(worker, (str(tmp_path),), nprocs=WORLD)
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD))
    here, there = one.pop("BN108"), other.pop("BN108")
    assert one == other
    # measured on the data of both, held against statistics that differ
    assert [row[0] for row in here] == [row[0] for row in there] == ["module.1"]
    for name in ("BN403 equal", "BN403 synchronized", "BN402 even", "BN402 not synchronized", "BN401 many"):
        assert one[name] == []
    assert one["BN401 few, synchronized"] == []
    ((layer, severity, measured),) = one["BN403 other mean"]
    assert (layer, severity, measured["var_factor"]) == ("4", "warning", 1.0)
    assert measured["mean_off"] > 0.5
    assert [row[:2] for row in one["BN403 parallel"]] == [(f"module.{i}", "info") for i in (1, 4, 9)]
    assert one["BN403 other model"] == [("", "warning", {"process": 1})]
    assert one["BN402 uneven"] == [("", "warning", {"batches": [2, 3], "synchronized_layers": 3})]
    assert one["BN401 few"] == [("", "warning", {"samples": 3.0, "processes": 2, "layers": 3})]
    assert [row[:2] for row in one["BN401 mixed"]] == [("1", "warning"), ("9", "warning")]
    assert not {"BN401", "BN403"} & {*one["not run"]}


def test_one_process_alone_does_not_run_them():
    skipped = {one.code: one.needs for one in examine(trained(), batches(1)).not_run}
    assert [skipped[code] for code in ("BN401", "BN402", "BN403")] == [["ranks"]] * 3
