"""Two gloo processes: recalibration merges their data, an error of one is an error of both, and DDP trains on."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import batchnorm.nn as bnn
from batchnorm.statistics import deferred_stats, recalibrate

WORLD = 2
# of each process's batches: uneven, and the one that would wait for process 0 has more of them
SIZES = ((9,), (5, 7, 2))
DATA = [[torch.randn(n, 4, generator=torch.Generator().manual_seed(n)) + n for n in sizes] for sizes in SIZES]
HOMES = {"torch": nn, "ours": bnn}


def chain(home: Any) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), home.BatchNorm1d(4), nn.ReLU(), home.BatchNorm1d(4), bnn.Whitening1d(4))


def failing(rank: int) -> Iterator[Tensor]:
    yield from DATA[rank]
    if rank == 1:
        raise ConnectionError("the disk of process 1")


class SyncOnCpu(nn.SyncBatchNorm):
    """Torch's refuses the CPU in training. Statistics of all processes, without the gradient through them."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        parts: list[Tensor] = [input] * WORLD
        dist.all_gather_object(parts, input.detach())
        whole = torch.cat(parts)
        self.num_batches_tracked += 1
        self.running_mean.mul_(1 - self.momentum).add_(whole.mean(0) * self.momentum)
        self.running_var.mul_(1 - self.momentum).add_(whole.var(0) * self.momentum)
        return (input - whole.mean(0)) / whole.std(0)


def error_of(call: Any) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def recalibrated(rank: int, home: Any) -> dict[str, Any]:
    results = {}
    for estimator in ("pooled", "paper"):
        model = chain(home)
        done = recalibrate(model, DATA[rank], estimator=estimator)
        results[estimator] = {**model.state_dict()}, done
    model = chain(home)
    results["layer by layer"] = {**model.state_dict()}, recalibrate(model, DATA[rank], layer_by_layer=True)
    model = chain(home)
    recalibrate(model, DATA[rank] if rank == 0 else [])
    results["one without data"] = model.state_dict()
    wrapped = DistributedDataParallel(chain(home))
    recalibrate(wrapped, DATA[rank] if rank else [])
    results["wrapped"] = wrapped.module.state_dict()
    model = nn.SyncBatchNorm.convert_sync_batchnorm(chain(nn))
    recalibrate(model, DATA[rank])
    results["synchronized"] = model.state_dict()
    model = chain(home)
    before = copy.deepcopy(model.state_dict())
    results["errors"] = [
        error_of(lambda: recalibrate(model, failing(rank))),
        error_of(lambda: recalibrate(model, [])),
        error_of(lambda: recalibrate(model, DATA[0] if rank else [DATA[0][0] * torch.inf])),
    ]
    results["unchanged"] = all(value.equal(before[name]) for name, value in model.state_dict().items())
    return results


def trained(rank: int, home: Any, deferring: bool) -> dict[str, Tensor]:
    """A step of two forwards and one backward pass, as of a discriminator."""
    model = chain(home)[:-1]
    parallel = DistributedDataParallel(model)
    for x in DATA[rank][:1]:
        if deferring:
            with deferred_stats(parallel):
                loss = parallel(x).square().sum() - parallel(x + 1).tanh().sum()
                loss.backward()
        else:
            (parallel(x).square().sum() - parallel(x + 1).tanh().sum()).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()} | dict(model.named_buffers())


def synchronized(rank: int) -> dict[str, Tensor]:
    """Two commits of the same layer: of both processes' data, and of one's where the other's is empty."""
    layer = SyncOnCpu(4, momentum=1.0)
    with deferred_stats(layer) as tx:
        layer(DATA[rank][0])
        layer(DATA[1 - rank][0])
        tx.commit()
        var = layer.running_var.clone()
        layer(DATA[0][0] if rank else torch.zeros(0, 4))
        return {"running_var": var, "counts": torch.tensor(tx.counts[""])}


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    results = {
        name: (recalibrated(rank, home), trained(rank, home, True), trained(rank, home, False))
        for name, home in HOMES.items()
    }
    results["synchronized"] = synchronized(rank)
    torch.save(results, f"{folder}/{rank}.pt")
    # a rank that leaves first closes connections the other may still read from
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(worker, (str(folder),), nprocs=WORLD)
    return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]


homes = pytest.mark.parametrize("home", HOMES)


@homes
@pytest.mark.parametrize("estimator", ["pooled", "paper"])
def test_all_processes_get_the_statistics_of_all_data(ranks: list[Any], home: str, estimator: str):
    model = chain(HOMES[home])
    alone = recalibrate(model, [*DATA[0], *DATA[1]], estimator=estimator)
    for rank in ranks:
        state, done = rank[home][0][estimator]
        torch.testing.assert_close(state, dict(model.state_dict()))
        assert done.counts == alone.counts == {"1": 23, "3": 23, "4": 23}
        assert done.standard_errors == pytest.approx(alone.standard_errors)
        assert (done.batches, done.samples) == (4, 23)
    same = [rank[home][0][estimator][0] for rank in ranks]
    torch.testing.assert_close(*same, rtol=0, atol=0)


@homes
def test_layer_by_layer_all_processes_go_from_layer_to_layer_together(ranks: list[Any], home: str):
    model = chain(HOMES[home])
    recalibrate(model, [*DATA[0], *DATA[1]], layer_by_layer=True)
    for rank in ranks:
        state, done = rank[home][0]["layer by layer"]
        torch.testing.assert_close(state, dict(model.state_dict()))
        assert list(done.counts) == ["1", "3", "4"]


@homes
def test_a_process_without_data_gets_the_statistics_of_the_others(ranks: list[Any], home: str):
    model = chain(HOMES[home])
    recalibrate(model, DATA[0])
    for rank in ranks:
        torch.testing.assert_close(rank[home][0]["one without data"], model.state_dict())


@homes
def test_a_wrapped_model_does_not_wait_for_a_process_without_data(ranks: list[Any], home: str):
    """The wrapper broadcasts the buffers of process 0, in the forward."""
    model = chain(HOMES[home])
    recalibrate(model, DATA[1])
    for rank in ranks:
        torch.testing.assert_close(rank[home][0]["wrapped"], model.state_dict())


@homes
def test_synchronized_layers_are_measured_by_the_data_of_each_process_once(ranks: list[Any], home: str):
    """Uneven numbers of batches, on the CPU."""
    for rank in ranks:
        torch.testing.assert_close(dict(rank[home][0]["synchronized"]), rank["torch"][0]["pooled"][0])


def test_a_synchronized_layer_commits_the_values_of_all_processes(ranks: list[Any]):
    whole = torch.cat([DATA[0][0], DATA[1][0]] * 2)
    for rank in ranks:
        torch.testing.assert_close(rank["synchronized"]["running_var"], whole.var(0))
        # of the process whose own batch was empty too
        assert rank["synchronized"]["counts"] == len(DATA[0][0])


@homes
def test_an_error_of_one_process_is_an_error_of_all_and_changes_nothing(ranks: list[Any], home: str):
    empty = "ValueError: the loader yielded nothing, so the running statistics stay as they were"
    inf = "ValueError: layer '1' received inf or NaN, so the running statistics stay as they were"
    assert ranks[0][home][0]["errors"] == [
        "RuntimeError: nothing was changed: process 1 failed, see its message",
        empty,
        inf,
    ]
    assert ranks[1][home][0]["errors"] == ["ConnectionError: the disk of process 1", empty, inf]
    assert all(rank[home][0]["unchanged"] for rank in ranks)


@homes
def test_two_forwards_before_a_backward_have_the_gradients_of_data_parallel_training(ranks: list[Any], home: str):
    """In some versions of torch the broadcast of the buffers between them was an error (pytorch/pytorch#175024)."""
    for rank in ranks:
        _, deferred, updating = rank[home]
        for name, value in deferred.items():
            if "weight" in name or "bias" in name:
                torch.testing.assert_close(value, updating[name])
            if "tracked" in name:
                assert (value, updating[name]) == (1, 2)
