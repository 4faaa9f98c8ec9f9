"""A fused block in use: whatever is no longer as it was found runs the block's own forward."""

import copy
import inspect
import pickle
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from equivalence import assert_same_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import batchnorm
from batchnorm.surgery import fused

C = 3


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(C, C, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(C)
        self.act = nn.LeakyReLU()
        self.last = nn.Sequential(nn.Conv2d(C, C, 1, bias=False), nn.BatchNorm2d(C))
        self.gain = 1.0

    def forward(self, x: Tensor, scale: float = 1.0, mask: Tensor | None = None) -> Tensor:
        out = self.last(self.act(self.bn(self.conv(x))))
        out = self.act(out + x) * (scale * self.gain)
        return out if mask is None else out * mask


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, C, 5, 5)


@pytest.fixture
def pair() -> tuple[Block, Block]:
    original = Block()
    model = copy.deepcopy(original)
    _, changes = batchnorm.convert(model)
    assert [c.what for c in changes] == ["absorbed leaky_relu", "absorbed add + leaky_relu"]
    return original, model


@pytest.fixture
def runs(monkeypatch) -> list:
    """Layers that run fused."""
    calls, view = [], fused.with_activation
    monkeypatch.setattr(fused, "with_activation", lambda layer, name: calls.append(layer) or view(layer, name))
    return calls


def add_hook_to_layer(model):
    model.bn.register_forward_hook(lambda module, args, output: output * 2)


def add_hook_to_activation(model):
    model.act.register_forward_pre_hook(lambda module, args: (args[0] + 1,))


def add_hook_to_container(model):
    model.last.register_forward_hook(lambda module, args, output: output - 1)


def add_backward_hook(model):
    model.bn.register_full_backward_hook(lambda module, grad_input, grad_output: (grad_input[0] * 3,))


def change_slope(model):
    model.act.negative_slope = 0.5


def change_attribute(model):
    model.gain = 3.0


def replace_activation(model):
    model.act = nn.Tanh()


def replace_layer(model):
    model.bn = nn.Identity()


def replace_forward_of_layer(model):
    model.bn.forward = lambda x: x * 2


def make_layer_anothers(model):
    model.bn.__class__ = nn.BatchNorm2d


def append_module(model):
    model.last.append(nn.Tanh())


def replace_forward_of_container(model):
    model.last.forward = lambda x: x * 2


CHANGES = [
    replace_forward_of_layer,
    make_layer_anothers,
    *(add_hook_to_layer, add_hook_to_activation, add_hook_to_container, add_backward_hook, change_slope),
    *(
        change_attribute,
        replace_activation,
        replace_layer,
        append_module,
        replace_forward_of_layer,
        make_layer_anothers,
        replace_forward_of_container,
    ),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: m])
def test_what_changes_later_has_its_effect(pair, x, change, how, runs):
    original, model = pair
    model = how(model)
    change(original)
    change(model)
    assert_same_model(original, model, x)
    assert runs == []


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: m])
def test_copies_run_fused_with_their_own_parameters(pair, x, how, runs):
    original, model = pair
    again = how(model)
    assert_same_model(original, again, x)
    assert len(runs) == 6
    assert set(runs) == {again.bn, again.last[1]}


@pytest.mark.parametrize("part", ["bn", "last", "last.1", ""])
def test_modes_may_differ(pair, x, part):
    original, model = pair
    for m in (original, model):
        m.train()
        m.get_submodule(part).eval()
    torch.testing.assert_close(model(x), original(x))
    torch.testing.assert_close(dict(model.state_dict()), dict(original.state_dict()))


@pytest.mark.parametrize(
    ("args", "kwargs", "number"),
    [((), {}, 2), ((1.0,), {}, 2), ((2.0,), {}, 0), ((), {"scale": 3.0}, 0), ((), {"mask": torch.zeros(5)}, 0)],
)
def test_other_arguments_have_their_effect(pair, x, runs, args, kwargs, number):
    original, model = pair
    torch.testing.assert_close(model(x, *args, **kwargs), original(x, *args, **kwargs))
    assert len(runs) == number
    torch.testing.assert_close(model(x=x, **kwargs), original(x=x, **kwargs))


def test_wrong_arguments_raise_what_they_raised(pair, x):
    for args, kwargs in (((), {}), ((x, 1.0, None, 3), {}), ((x,), {"x": x}), ((x,), {"other": 1})):
        messages = []
        for model in pair:
            with pytest.raises(TypeError) as error:
                model(*args, **kwargs)
            messages.append(str(error.value))
        assert messages[0] == messages[1]


def test_signature_is_the_blocks(pair):
    assert inspect.signature(pair[1].forward) == inspect.signature(pair[0].forward)


def test_layer_attributes_are_read_at_every_call(pair, x, runs):
    for model in pair:
        model.bn.momentum, model.bn.eps = None, 0.5
        model.last[1].track_running_stats = False
        model.last[1].requires_grad_(False)
    assert_same_model(*pair, x)
    assert len(runs) == 6


def test_modules_keep_their_own_meaning(pair, x):
    original, model = pair
    torch.testing.assert_close(model.bn(x), original.bn(x))
    torch.testing.assert_close(model.act(x.clone()), original.act(x.clone()))
    torch.testing.assert_close(model.last(x), original.last(x))


def test_repr_says_what_served_the_last_call(pair, x):
    pair[1](x)
    assert "last call" in repr(pair[1].bn)


def test_hooks_of_the_block_and_of_called_modules_run_fused(pair, x, runs):
    seen = []
    for model in pair:
        model.register_forward_hook(lambda *_: seen.append("block"))
        model.conv.register_forward_hook(lambda *_: seen.append("conv"))
        model(x)
    assert seen == ["conv", "block"] * 2
    assert len(runs) == 2


def test_threads_do_not_see_each_other(pair, x):
    original, model = (m.eval() for m in pair)
    expected, plain, failures = original(x).detach(), original.bn(x).detach(), []

    def work(call, result):
        with torch.no_grad():
            failures.extend(1 for _ in range(200) if not torch.allclose(call(x), result, atol=1e-5))

    threads = [threading.Thread(target=work, args=a) for a in ((model, expected), (model.bn, plain)) * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_autocast(pair, x):
    results = []
    for model in pair:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            results.append(model(x))
    assert results[0].dtype == results[1].dtype
    torch.testing.assert_close(*results, atol=0.05, rtol=0.05)


def test_channels_last(pair, x):
    assert_same_model(*pair, x.to(memory_format=torch.channels_last))


def test_other_dtype(pair, x):
    torch.testing.assert_close(*(model.double()(x.double()) for model in pair))


def test_activation_checkpointing(pair, x):
    results = []
    for model in pair:
        leaf = x.clone().requires_grad_()
        # otherwise how much of the last operation runs again depends on what it keeps for its backward pass
        with set_checkpoint_early_stop(False):
            checkpoint(model, leaf, use_reentrant=False).square().sum().backward()
        results.append((leaf.grad, dict(model.named_buffers())))
    torch.testing.assert_close(*results)


def test_compile_and_export_see_the_original(pair, x):
    original, model = pair
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), original(x))
    exported = torch.export.export(model.eval(), (x,)).module()
    torch.testing.assert_close(exported(x), original.eval()(x))


def test_functional_call_and_transforms(pair, x):
    results = []
    for model in (m.eval() for m in pair):
        parameters = {name: p.detach() for name, p in model.named_parameters()}
        loss = lambda ps, m=model: torch.func.functional_call(m, ps, (x,)).square().sum()  # noqa: E731
        results.append(torch.func.grad(loss)(parameters))
    torch.testing.assert_close(*results)


def test_replicas_of_data_parallel_have_their_own_forward(pair):
    replica = pair[1]._replicate_for_data_parallel()
    assert "forward" not in vars(replica)
    assert type(replica) is Block


def test_state_dict_loads_both_ways(pair, x):
    original, model = pair
    model(x)
    original.load_state_dict(model.state_dict(), strict=True)
    model.load_state_dict(original.state_dict(), strict=True)
    assert_same_model(original, model, x)


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(0)
    original = Block()
    results = []
    for model in (original, batchnorm.convert(copy.deepcopy(original))[0]):
        parallel = nn.parallel.DistributedDataParallel(model)
        for step in range(2):
            x = torch.randn(4, C, 5, 5, generator=torch.Generator().manual_seed(2 * step + rank))
            model.zero_grad()
            parallel(x).square().sum().backward()
        results.append({**{n: p.grad for n, p in model.named_parameters()}, **dict(model.named_buffers())})
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_data_parallel_training(tmp_path: Path):
    torch.multiprocessing.spawn(worker, (str(tmp_path),), nprocs=2)
    for rank in range(2):
        torch.testing.assert_close(*torch.load(tmp_path / f"{rank}.pt"))
