"""The memory report counts what autograd keeps, once and where it belongs, and leaves the model as it was."""

import copy
import random
import weakref
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import batchnorm
import batchnorm.nn
from batchnorm.insight import MemoryReport, ModuleMemory, memory_report

FLOAT = 4


class Calls(nn.Module):
    """A module whose forward is a function of the module and its arguments."""

    def __init__(self, function: Any, **children: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


def row(report: MemoryReport, name: str) -> ModuleMemory:
    return next(row for row in report.rows if row.name == name)


def inner(*shape: int) -> Tensor:
    """An input as a layer inside a network sees it: it needs a gradient."""
    return torch.randn(*shape).requires_grad_()


def hooks_of(model: nn.Module) -> list[list[object]]:
    names = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_always_called", "_backward_hooks")
    return [[*getattr(module, name).items()] for module in model.modules() for name in names]


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(4, 2, 1))


def test_every_layer_of_a_network_by_hand():
    report = memory_report(network(), torch.randn(2, 3, 8, 8))
    full = 2 * 4 * 6 * 6 * FLOAT
    mask = row(report, "3").alone
    assert mask in (full, full // FLOAT)
    image = 2 * 3 * 8 * 8 * FLOAT
    assert set(report.rows) == {
        ModuleMemory("0", "Conv2d", 1, image, 0),
        ModuleMemory("1", "BatchNorm2d", 3, full + 2 * 4 * FLOAT, full + 2 * 4 * FLOAT),
        ModuleMemory("2", "ReLU", 1, full, full),
        ModuleMemory("3", "Dropout", 1, mask, mask),
        ModuleMemory("4", "Conv2d", 1, full, full),
        ModuleMemory("", "Sequential", 0, 0, 0),
    }
    assert report.inputs == image
    assert report.shared == 0
    assert report.own == (4 * 3 * 9 + 4 + 4 + 4 + 2 * 4) * FLOAT
    assert report.kept == image + 3 * full + mask + 2 * 4 * FLOAT
    kept = [row.kept for row in report.rows]
    assert kept == sorted(kept, reverse=True)


def test_a_tensor_that_two_modules_save_is_shared_and_counts_once():
    report = memory_report(nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)), torch.randn(7, 3))
    assert row(report, "1") == ModuleMemory("1", "ReLU", 1, 7 * 5 * FLOAT, 0)
    assert row(report, "2") == ModuleMemory("2", "Linear", 1, 7 * 5 * FLOAT, 0)
    assert (report.inputs, report.shared, report.alone) == (7 * 3 * FLOAT, 7 * 5 * FLOAT, 0)


def test_a_module_that_saves_a_tensor_twice_keeps_it_once():
    report = memory_report(Calls(lambda _, x: (x.exp() * 1.0).pow(2)), inner(4, 3))
    assert report.rows == (ModuleMemory("", "Calls", 2, 2 * 12 * FLOAT, 2 * 12 * FLOAT),)
    report = memory_report(Calls(lambda _, x: x * x), inner(4, 3))
    assert report.rows == (ModuleMemory("", "Calls", 2, 12 * FLOAT, 0),)
    assert report.inputs == 12 * FLOAT


def test_a_view_keeps_all_of_its_storage():
    report = memory_report(Calls(lambda _, x: (x + 1)[:1].sigmoid() * (x + 1)[1, 0].sin()), inner(10, 3))
    small, whole = 3 * FLOAT, 30 * FLOAT
    # the sigmoid's output, the sine's output, and the sine's input with all that is behind it
    assert report.kept == small + FLOAT + whole
    report = memory_report(Calls(lambda _, x: x.flatten()[3:6].sin()), inner(10, 3))
    assert (report.kept, report.inputs) == (whole, whole)


def test_zero_size_tensors_and_empty_batches_keep_nothing():
    assert memory_report(Calls(lambda _, x: x.exp().sin()), inner(0, 3)).rows[0].tensors == 0
    assert memory_report(batchnorm.nn.BatchNorm1d(3).eval(), inner(0, 3)).alone == 0


def test_masks_count_their_bytes():
    report = memory_report(Calls(lambda _, x: torch.where(x > 0, x, 0.0)), inner(6, 5))
    assert report.rows == (ModuleMemory("", "Calls", 1, 30, 30),)


def test_storages_freed_and_reused_during_the_forward_are_not_mixed_up():
    def chain(_: nn.Module, x: Tensor) -> Tensor:
        for _ in range(20):
            x = (x.detach().requires_grad_() + 1).exp() + x.mean()
        return x

    size = 4096 * FLOAT
    report = memory_report(Calls(chain), inner(4096))
    # the graph of every round but for its mean is gone with the round; each exp's output lives while its graph does
    assert report.kept == 20 * size


def test_what_the_output_does_not_depend_on_is_not_kept():
    def forward(_: nn.Module, x: Tensor) -> Tensor:
        x.exp().sum().item()
        return x * 2

    assert memory_report(Calls(forward), inner(8)).kept == 0


def test_a_module_called_several_times_has_one_row():
    shared = Calls(lambda self, x: self.act(self.act(x + 1)), act=nn.Sigmoid())
    report = memory_report(shared, inner(5))
    assert row(report, "act") == ModuleMemory("act", "Sigmoid", 2, 10 * FLOAT, 10 * FLOAT)
    twice = nn.Sequential(act := nn.Sigmoid(), nn.Linear(5, 5), act)
    assert [row.name for row in memory_report(twice, inner(5)).rows].count("0") == 1


def test_what_follows_a_child_belongs_to_the_parent():
    model = Calls(lambda self, x: self.act(x.exp()).sin(), act=nn.Tanh())
    report = memory_report(model, inner(5))
    assert row(report, "").tensors == 2
    assert row(report, "act") == ModuleMemory("act", "Tanh", 1, 5 * FLOAT, 0)
    assert report.shared == 5 * FLOAT


def test_a_child_that_fails_and_is_caught_leaves_the_attribution_right():
    def fail(*_: Any) -> None:
        raise RuntimeError("no")

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        for child in (self.bad, self.worse):
            with pytest.raises(RuntimeError, match="no"):
                child(x)
        return x.exp()

    worse = nn.ReLU()
    worse.register_forward_pre_hook(fail)
    report = memory_report(Calls(forward, bad=Calls(fail), worse=worse), inner(5))
    assert [(row.name, row.kept) for row in report.rows] == [("", 5 * FLOAT), ("bad", 0), ("worse", 0)]


@pytest.mark.parametrize(
    ("example", "result"),
    [
        ((inner(2), inner(2)), lambda a, b: (a.exp(), b)),
        ({"a": inner(2), "b": inner(2)}, lambda a, b: {"y": a.exp(), "z": [b]}),
        (([inner(2)], {"b": inner(2)}), lambda a, b: {"y": a[0].exp()}),
    ],
)
def test_arguments_and_results_may_be_nested(example: Any, result: Any):
    report = memory_report(Calls(lambda _, *args, **kwargs: result(*args, **kwargs)), example)
    assert (report.kept, report.inputs) == (2 * FLOAT, 0)
    squared = Calls(lambda _, a, b: (a[0] if isinstance(a, list) else a) ** 2)
    assert memory_report(squared, example).inputs == 2 * FLOAT


def test_no_grad_keeps_nothing():
    model = network()
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert memory_report(model, x).kept == 0
    report = memory_report(Calls(torch.no_grad()(lambda self, x: self.inside(x)), inside=model), x)
    assert (report.kept, report.own) == (0, 0)
    assert "total" in str(report)
    assert memory_report(model.requires_grad_(False), x).kept == 0


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_keeps_the_inputs_only(use_reentrant: bool):
    block = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh())
    plain = memory_report(Calls(lambda self, x: self.block(x + 1), block=block), inner(5, 4))
    model = Calls(lambda self, x: checkpoint(self.block, x + 1, use_reentrant=use_reentrant), block=block)
    report = memory_report(model, inner(5, 4))
    # x + 1, and both tanh's outputs
    assert plain.kept == 3 * 20 * FLOAT
    assert report.kept == row(report, "").alone == 20 * FLOAT


def test_the_models_own_hooks_nest():
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        with saved_tensors_hooks(lambda t: t.half(), lambda t: t.float()):
            x = x.exp()
        return x.sin()

    assert memory_report(Calls(forward), inner(5)).kept == 5 * FLOAT


@pytest.mark.parametrize("way", ["compile", "in place", "part", "function"])
def test_a_compiled_module_counts_as_one(way: str):
    block = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh())
    expected = memory_report(block, torch.randn(5, 4))
    model: Any = block
    if way == "compile":
        model = torch.compile(block, backend="aot_eager")
    elif way == "in place":
        block.compile(backend="aot_eager")
    elif way == "part":
        model = nn.Sequential(torch.compile(block, backend="aot_eager"))
    else:
        compiled = torch.compile(lambda x: block(x), backend="aot_eager", fullgraph=True)
        model = Calls(lambda _, x: compiled(x), block=block)
    before = hooks_of(model)
    report = memory_report(model, torch.randn(5, 4))
    assert (report.kept, report.inputs) == (expected.kept, expected.inputs)
    assert hooks_of(model) == before
    owners = {row.name for row in report.rows if row.tensors}
    assert owners == ({"0"} if way == "part" else {""})


@pytest.mark.filterwarnings("ignore:`torch.jit.*is deprecated")
@pytest.mark.parametrize("whole", [False, True])
def test_a_scripted_module_counts_to_its_caller(whole: bool):
    block = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh())
    expected = memory_report(block, torch.randn(5, 4))
    scripted = torch.jit.script(block)
    model = scripted if whole else nn.Sequential(scripted)
    before = copy.deepcopy(model.state_dict())
    report = memory_report(model, torch.randn(5, 4))
    assert (report.kept, report.inputs) == (expected.kept, expected.inputs)
    assert [row.name for row in report.rows if row.tensors] == [""]
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta state")
@pytest.mark.parametrize("layout", ["coo", "csr"])
def test_sparse_tensors_count_indices_and_values(layout: str):
    sparse = torch.eye(4).to_sparse()
    if layout == "csr":
        sparse = torch.sparse_csr_tensor(torch.arange(5), torch.arange(4), torch.ones(4), (4, 4), check_invariants=True)
    report = memory_report(Calls(lambda _, x: torch.sparse.mm(sparse, x)), inner(4, 2))
    indices = 2 * 4 if layout == "coo" else 5 + 4
    assert report.kept == indices * 8 + 4 * FLOAT


def test_meta_tensors_count_the_bytes_they_stand_for():
    with torch.device("meta"):
        report = memory_report(network(), torch.randn(2, 3, 8, 8))
    assert report.inputs == 2 * 3 * 8 * 8 * FLOAT
    assert row(report, "1").tensors == 3


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("residual", [False, True])
def test_a_fused_block_keeps_no_more_than_its_parts(activation: str | None, residual: bool):
    act = {None: nn.Identity(), "relu": nn.ReLU(), "silu": nn.SiLU()}[activation]

    def block(bn: nn.Module, fused: bool) -> nn.Module:
        def forward(self: nn.Module, x: Tensor) -> Tensor:
            shortcut = self.pool(x) if residual else None
            if fused:
                return self.last(self.bn(self.conv(x), shortcut))
            y = self.bn(self.conv(x))
            return self.last(self.act(y if shortcut is None else y + shortcut))

        parts = {"conv": nn.Conv2d(4, 4, 1), "pool": nn.AvgPool2d(3, 1, 1), "last": nn.Conv2d(4, 4, 1)}
        return Calls(forward, bn=bn, act=act, **parts)

    apart = memory_report(block(nn.BatchNorm2d(4), False), torch.randn(2, 4, 6, 6))
    ours = batchnorm.nn.BatchNorm2d(4, activation=activation)
    fused = memory_report(block(ours, True), torch.randn(2, 4, 6, 6))
    # statistics in float64 instead of float32, and one bit per element with a residual
    statistics, mask = 4 * 2 * 4, 2 * 4 * 36 // 8 + 8
    assert fused.kept <= apart.kept + statistics + mask


def test_report_leaves_the_model_as_it_was():
    model = network()
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    model[1].running_mean[0] = torch.nan
    model[0].eval()
    before = copy.deepcopy(model.state_dict())
    buffers, grads, modes = list(model.buffers()), [p.grad for p in model.parameters()], [m.training for m in model]
    values = [grad.clone() for grad in grads]
    random_numbers, python = torch.get_rng_state(), random.getstate()
    hooks = hooks_of(model)
    memory_report(model, torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)))
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)
    assert all(now is then for now, then in zip(model.buffers(), buffers, strict=True))
    for parameter, grad, value in zip(model.parameters(), grads, values, strict=True):
        assert parameter.grad is grad
        assert torch.equal(grad, value)
    assert [m.training for m in model] == modes
    assert torch.equal(torch.get_rng_state(), random_numbers)
    assert random.getstate() == python
    assert hooks_of(model) == hooks


def test_an_earlier_graph_can_still_run_backward():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3).eval(), batchnorm.nn.BatchNorm1d(3))
    loss = model(torch.randn(4, 3)).sum()
    memory_report(model, torch.randn(4, 3))
    loss.backward()


@pytest.mark.parametrize("fails", [False, True])
def test_whatever_the_forward_does_is_undone(fails: bool):
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        y = self.bn(self.linear(x))
        y.sum().backward(retain_graph=True)
        self.total = self.total + torch.rand(1)
        self.register_buffer("late", torch.zeros(1))
        self.bn.eval()
        if fails:
            raise ArithmeticError("in the middle")
        return y.exp()

    model = Calls(forward, linear=nn.Linear(3, 3), bn=batchnorm.nn.BatchNorm1d(3))
    model.register_buffer("total", torch.zeros(1))
    model.register_buffer("nothing", None)
    x = inner(4, 3)
    x.grad = torch.ones(4, 3)
    model.linear.weight.grad = torch.ones(3, 3)
    before, hooks, random_numbers = copy.deepcopy(model.state_dict()), hooks_of(model), torch.get_rng_state()
    if fails:
        with pytest.raises(ArithmeticError, match="in the middle"):
            memory_report(model, x)
    else:
        # the batch norm's input and the exponential's output, x itself, and the two statistics in float64
        assert memory_report(model, x).kept == 3 * 12 * FLOAT + 2 * 3 * 8
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert model.bn.training
    assert torch.equal(x.grad, torch.ones(4, 3))
    assert torch.equal(model.linear.weight.grad, torch.ones(3, 3))
    assert model.linear.bias.grad is None
    assert hooks_of(model) == hooks
    assert torch.equal(torch.get_rng_state(), random_numbers)
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None


def test_a_gradient_inside_the_forward_is_right():
    found = []

    def forward(_: nn.Module, x: Tensor) -> Tensor:
        (grad,) = torch.autograd.grad((x**3).sum(), x, create_graph=True)
        found.append(torch.autograd.grad(grad.sum(), x, create_graph=True)[0])
        return grad

    x = torch.tensor([2.0], requires_grad=True)
    memory_report(Calls(forward), x)
    assert found[0].item() == 12.0


def test_memory_of_the_report_is_free_when_it_returns():
    alive = []

    def forward(_: nn.Module, x: Tensor) -> Tensor:
        y = x.exp()
        alive.append(weakref.ref(y))
        return y.sin()

    memory_report(Calls(forward), inner(5))
    assert alive[0]() is None


def test_wrong_arguments_are_named():
    class Pair(NamedTuple):
        a: Tensor
        b: Tensor

    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, not function"):
        memory_report(hooks_of, torch.randn(1))
    for example in ([torch.randn(1)], Pair(torch.randn(1), torch.randn(1))):
        with pytest.raises(TypeError, match=rf"not {type(example).__name__}; for any other single argument"):
            memory_report(nn.ReLU(), example)
    with pytest.raises(ValueError, match="uninitialized parameters"):
        memory_report(nn.LazyLinear(3), torch.randn(2, 3))


def test_table_fits_the_terminal_and_names_cannot_steer_it():
    name = "red\x1b[31m\r\n\N{RIGHT-TO-LEFT OVERRIDE}\ud800" + "x" * 200
    odd = type("Odd\x1b[2J" + "y" * 100, (nn.Tanh,), {})
    model = nn.Sequential()
    model.add_module(name, odd())
    model.add_module("short\x07", odd())
    text = str(memory_report(model, inner(500, 3)))
    assert all(len(line) <= 100 for line in text.splitlines())
    assert all(character == "\n" or " " <= character <= "~" for character in text)
    assert r"short\x07" in text
    assert f"...{'x' * 39}" in text
    assert len(text.splitlines()) == 7


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1536, "1.5 KiB"), (3 << 20, "3.0 MiB"), (5 << 50, "5120.0 TiB")],
)
def test_units(size: int, text: str):
    report = MemoryReport((ModuleMemory("a", "Tanh", 1, size, size),), 0, 0, 0)
    assert str(report).splitlines()[1].split("  ")[-1].strip() == text


def test_totals_are_the_sum_of_their_parts():
    report = batchnorm.memory_report(network(), torch.randn(2, 3, 8, 8))
    assert report.kept == report.inputs + report.shared + sum(row.alone for row in report.rows)
