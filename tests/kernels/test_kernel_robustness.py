"""Kernels where something is broken, forbidden or going on at the same time: right answers, at most one warning."""

import json
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

import batchnorm.nn
from batchnorm import functional
from commands import run_command

SETUP = """
import json, os, signal, sys, threading, time, warnings
import torch
torch.set_num_threads(1)
log = warnings.catch_warnings(record=True).__enter__()
warnings.simplefilter("always")
import batchnorm.nn
from batchnorm import functional

def results(layer, x):
    leaf = x.clone().requires_grad_()
    output = layer(leaf)
    output.pow(3).sum().backward()
    return [output.detach(), leaf.grad, layer.weight.grad, layer.bias.grad, layer.running_mean, layer.running_var]

def is_right(x):
    ours, theirs = results(batchnorm.nn.BatchNorm1d(x.shape[1]), x), results(torch.nn.BatchNorm1d(x.shape[1]), x)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    return True

def reap(pid, seconds=20):
    # the exit status, or "hangs"
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "hangs"

def report(**values):
    values["warnings"] = [str(w.message) for w in log if issubclass(w.category, RuntimeWarning)]
    print(json.dumps(values))

x = torch.randn(33, 5)
"""
FORWARD_ONLY = """
with torch.no_grad():
    y = functional.batch_norm_train(x, implementation="kernel").output
torch.testing.assert_close(y, torch.nn.functional.batch_norm(x, None, None, training=True))
"""

COUNTED = """
from numba.core.ccallback import CFunc
compiled, whole = [], CFunc._compile_uncached
def counted(self):
    compiled.append(1)
    return whole(self)
CFunc._compile_uncached = counted
"""
DONE = "report(compiled=len(compiled))"


def fresh(program: str, **environment: str) -> dict:
    """What a program, run after :data:`SETUP` in a process of its own, reports last."""
    run = run_command([sys.executable, "-c", SETUP + program], environment=environment)
    assert run.returncode == 0, run.stdout + run.stderr
    return json.loads(run.stdout.splitlines()[-1])


# Numba that does not work

BROKEN = {
    "absent": ('sys.modules["numba"] = None', "ModuleNotFoundError"),
    "raises_at_import": ('sys.path.insert(0, os.environ["BROKEN"])', "broken build"),
    "cannot_compile": (
        "from numba.core.ccallback import CFunc\n"
        "def compile(self): raise RuntimeError('no such target')\n"
        "CFunc.compile = compile",
        "no such target",
    ),
}
USE = """
served = [is_right(x), is_right(x)]
layer = batchnorm.nn.BatchNorm1d(5)
choice = batchnorm.nn.explain(layer, x)
try:
    batchnorm.nn.BatchNorm1d(5, implementation="kernel")(x)
except Exception as error:
    from batchnorm.errors import BatchNormError
    report(choice=choice, error=type(error).__name__, ours=isinstance(error, BatchNormError), message=str(error))
"""


@pytest.mark.parametrize("how", BROKEN)
def test_without_working_numba_torch_serves_and_one_warning_says_why(how, tmp_path):
    (tmp_path / "numba.py").write_text("raise SystemError('broken build')\n")
    statement, reason = BROKEN[how]
    seen = fresh(statement + USE, BROKEN=str(tmp_path))
    assert seen["choice"][0] == "aten"
    assert reason in seen["choice"][1]
    assert seen["error"] == "ImplementationError"
    assert seen["ours"]
    assert reason in seen["message"]
    assert len(seen["warnings"]) == 1
    assert reason in seen["warnings"][0]


LATE_FAILURE = """
from batchnorm._ops import kernel
a = torch.randn(33, 5, requires_grad=True)
before = batchnorm.nn.BatchNorm1d(5)(a)
whole = kernel.Kernels.launch.kernel
def broken(direction, *key):
    if direction == os.environ["DIRECTION"] and key not in served:
        raise RuntimeError("no such target")
    return whole(direction, *key)
served = [("columns", "float32", None, False, False)] if os.environ["DIRECTION"] == "forward" else []
kernel.Kernels.launch.kernel = broken
after = batchnorm.nn.BatchNorm1d(5, activation="silu")(before)
after.pow(3).sum().backward()
b = a.detach().clone().requires_grad_()
torch.nn.functional.silu(torch.nn.BatchNorm1d(5)(torch.nn.BatchNorm1d(5)(b))).pow(3).sum().backward()
torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)
report()
"""


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_kernel_that_fails_late_leaves_no_graph_without_its_backward(direction):
    assert len(fresh(LATE_FAILURE, DIRECTION=direction)["warnings"]) <= 1


def test_importing_the_layers_neither_imports_numba_nor_touches_the_cache(tmp_path):
    program = 'report(loaded=[name for name in ("numba", "llvmlite") if name in sys.modules])'
    seen = fresh(program, BATCHNORM_CACHE_DIR=str(tmp_path / "cache"))
    assert seen["loaded"] == []
    assert not (tmp_path / "cache").exists()


# The folder of compiled kernels


def kernel_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.kernel"))


def test_without_a_usable_cache_kernels_are_compiled_silently(tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("")
    seen = fresh(FORWARD_ONLY + "report()", HOME="/proc/nowhere", XDG_CACHE_HOME=str(blocker), BATCHNORM_CACHE_DIR="")
    assert seen["warnings"] == []


@pytest.fixture(scope="module")
def filled_cache(tmp_path_factory) -> Path:
    """A cache with the one kernel of :data:`FORWARD_ONLY`."""
    cache = tmp_path_factory.mktemp("cache")
    assert fresh(COUNTED + FORWARD_ONLY + DONE, BATCHNORM_CACHE_DIR=str(cache)) == {"compiled": 1, "warnings": []}
    return cache


@pytest.fixture
def cache(filled_cache, tmp_path) -> Path:
    return Path(shutil.copytree(filled_cache, tmp_path / "cache"))


NO_COMPILER = """
from numba.core.ccallback import CFunc
def refuse(self): raise RuntimeError("asked to compile")
CFunc._compile_uncached = refuse
is_right(x)
report()
"""


def is_loaded_from(cache: Path) -> bool:
    """Whether kernels come from a cache instead of being compiled, which torch serves instead of here."""
    warned = fresh(NO_COMPILER, BATCHNORM_CACHE_DIR=str(cache))["warnings"]
    assert all("asked to compile" in message for message in warned)
    assert len(warned) <= 1
    return not warned


def test_compiled_kernels_are_used_again(cache):
    assert fresh(COUNTED + FORWARD_ONLY + DONE, BATCHNORM_CACHE_DIR=str(cache))["compiled"] == 0
    assert len(kernel_files(cache)) == 1


def test_cache_is_used_where_the_umask_lets_the_group_write(tmp_path):
    program = "os.umask(0o002)" + FORWARD_ONLY + "report()"
    assert fresh(program, XDG_CACHE_HOME=str(tmp_path), BATCHNORM_CACHE_DIR="")["warnings"] == []
    assert len(kernel_files(tmp_path)) == 1


@pytest.mark.parametrize("which", ["outer", "inner"])
def test_folder_that_others_may_write_to_is_not_used(which, cache, tmp_path):
    (file,) = kernel_files(cache)
    marker = tmp_path / "marker"
    # a pickle that writes the marker when it is loaded
    statement = f"import pathlib; pathlib.Path({str(marker)!r}).write_text('loaded')"
    planted = b"cbuiltins\nexec\n(V" + statement.encode() + b"\ntR."
    file.write_bytes(planted)
    (cache if which == "outer" else file.parent).chmod(0o777)
    assert not is_loaded_from(cache)
    assert not marker.exists()
    assert file.read_bytes() == planted


def spoiled(content: bytes, how: str) -> bytes:
    if how == "empty":
        return b""
    if how == "truncated":
        return content[: len(content) // 2]
    if how == "other_pickle":
        return b"\x80\x04K\x01."
    # the table after the ELF header of the machine code; zeros are what a crash of the system may leave
    start = content.index(b"\x7fELF") + 64
    return content[:start] + bytes(200) + content[start + 200 :]


KINDS_OF_DAMAGE = [
    "empty",
    "truncated",
    "other_pickle",
    "zeros_in_the_code",
]


@pytest.mark.parametrize("how", KINDS_OF_DAMAGE)
def test_spoiled_file_in_the_cache_is_not_used(how, cache):
    (file,) = kernel_files(cache)
    file.write_bytes(spoiled(file.read_bytes(), how))
    assert not is_loaded_from(cache)


def test_spoiled_file_in_the_cache_is_replaced_by_a_good_one(cache):
    (file,) = kernel_files(cache)
    file.write_bytes(spoiled(file.read_bytes(), "truncated"))
    program = COUNTED + FORWARD_ONLY + DONE
    assert [fresh(program, BATCHNORM_CACHE_DIR=str(cache))["compiled"] for _ in range(2)] == [1, 0]


# Forked processes

FORK = """
torch.set_num_threads(3)
# enough for threads of the kernels, not for those of torch, which hang in a child
large = torch.randn(64, 16, 5, 5)
def both():
    leaf = large.clone().requires_grad_()
    y = functional.batch_norm_train(leaf, implementation="kernel").output
    return [y.detach(), *torch.autograd.grad(y.pow(3).sum(), leaf)]
expected = both()
def equal():
    return all(torch.equal(a, b) for a, b in zip(both(), expected))
assert equal()
pid = os.fork()
if pid == 0:
    os._exit(0 if equal() else 3)
forked = reap(pid)

import multiprocessing
pool = multiprocessing.get_context("fork").Pool(2)
pooled = [pool.apply_async(equal) for _ in range(4)]
pooled = [result.get(timeout=30) for result in pooled]
pool.terminate()

class Batches(torch.utils.data.Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, i):
        return functional.batch_norm_train(large, implementation="kernel").output

options = {"batch_size": None, "num_workers": 2, "multiprocessing_context": "fork", "timeout": 30}
loaded = [torch.equal(batch, expected[0]) for batch in torch.utils.data.DataLoader(Batches(), **options)]
report(forked=forked, pooled=pooled, loaded=loaded, parent=equal())
"""


def test_forked_children_neither_hang_nor_differ_after_the_parent_used_threads():
    seen = fresh(FORK)
    assert seen == {"forked": 0, "pooled": [True] * 4, "loaded": [True] * 4, "parent": True, "warnings": []}


FORK_WHILE_COMPILING = """
is_right(x)
from batchnorm._ops import kernel
held = threading.Event()
def hold():
    with kernel.Kernels.launch.COMPILING:
        held.set()
        time.sleep(0.5)
threading.Thread(target=hold).start()
held.wait()
pid = os.fork()
if pid == 0:
    with torch.no_grad():
        functional.batch_norm_train(x, activation="relu")
    os._exit(0)
report(forked=reap(pid, 6))
"""


def test_child_forked_while_another_thread_compiles_does_not_hang():
    assert fresh(FORK_WHILE_COMPILING)["forked"] == 0


# Several threads


@pytest.fixture
def any_number_of_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def both_passes(x: Tensor, residual: Tensor, grad_output: Tensor) -> list[Tensor]:
    leaves = [x.clone().requires_grad_(), residual.clone().requires_grad_()]
    output = functional.batch_norm_train(leaves[0], residual=leaves[1], activation="relu", implementation="kernel")[0]
    return [output.detach(), *torch.autograd.grad(output, leaves, grad_output)]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


SHAPES = [(64, 16, 8, 8), (600, 50), (4, 8, 30, 30), (9, 3, 5), (33, 700), (2, 4, 12, 12), (5000, 6), (16, 16, 10, 10)]


def test_eight_threads_at_once_get_the_serial_results(any_number_of_threads):
    problems = [tuple(torch.randn(3, *shape)) for shape in SHAPES]
    serial = [both_passes(*problem) for problem in problems]
    torch.set_num_threads(2)
    start, failures = threading.Barrier(len(SHAPES)), []

    def work(i: int) -> None:
        start.wait()
        for k in range(10):
            j = (i + k) % len(SHAPES)
            if not same(both_passes(*problems[j]), serial[j]):
                failures.append(SHAPES[j])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(SHAPES))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert failures == []


def test_kernels_in_a_pool_and_torch_operations_do_not_disturb_each_other(any_number_of_threads):
    problem = tuple(torch.randn(3, 64, 16, 8, 8))
    a = torch.randn(200, 200)
    torch.set_num_threads(2)
    expected, product = both_passes(*problem), a @ a
    with ThreadPoolExecutor(3) as pool:
        ours = [pool.submit(both_passes, *problem) for _ in range(20)]
        theirs = [pool.submit(torch.matmul, a, a) for _ in range(20)]
        for _ in range(20):
            torch.testing.assert_close(a @ a, product)
        assert all(same(result.result(60), expected) for result in ours)
        assert all(torch.allclose(result.result(60), product, atol=1e-4) for result in theirs)


def test_number_of_threads_may_change_between_forward_and_backward(any_number_of_threads):
    x, residual, grad_output = torch.randn(3, 64, 16, 8, 8)
    expected = both_passes(x, residual, grad_output)
    for before, after in [(1, 3), (3, 1), (2, 5), (5, 2)]:
        torch.set_num_threads(before)
        leaves = [x.clone().requires_grad_(), residual.clone().requires_grad_()]
        output, *_ = functional.batch_norm_train(
            leaves[0], residual=leaves[1], activation="relu", implementation="kernel"
        )
        torch.set_num_threads(after)
        assert same([output.detach(), *torch.autograd.grad(output, leaves, grad_output)], expected)


def test_backward_may_run_in_another_thread_than_forward(any_number_of_threads):
    torch.set_num_threads(2)
    x = torch.randn(64, 16, 8, 8)
    leaf, other = (x.clone().requires_grad_() for _ in range(2))
    output, expected = (batchnorm.nn.BatchNorm2d(16)(t).pow(3).sum() for t in (leaf, other))
    thread = threading.Thread(target=output.backward)
    thread.start()
    thread.join(60)
    expected.backward()
    assert torch.equal(leaf.grad, other.grad)


# Tensors that are not what they seem


def negated(x: Tensor) -> Tensor:
    """A view that says by a bit that its values are to be read with the other sign."""
    return torch._neg_view(x)


def test_tensors_with_a_negative_bit_are_read_with_their_sign():
    x, residual, grad_output = torch.randn(3, 8, 3)
    weight = torch.rand(3) + 0.5
    results = []
    for flip in (negated, torch.neg):
        leaf = x.clone().requires_grad_()
        output, mean, *_ = functional.batch_norm_train(
            flip(leaf), flip(weight), residual=flip(residual), implementation="kernel"
        )
        results.append([output.detach(), mean, *torch.autograd.grad(output, leaf, flip(grad_output))])
    torch.testing.assert_close(*results)


def test_gradients_of_a_batch_of_gradients():
    x = torch.randn(4, 3, requires_grad=True)
    many = torch.randn(5, 4, 3)
    ours, theirs = batchnorm.nn.BatchNorm1d(3)(x), torch.nn.BatchNorm1d(3)(x)
    torch.testing.assert_close(
        *(torch.autograd.grad(y, x, many, is_grads_batched=True) for y in (ours, theirs)), rtol=1e-4, atol=1e-5
    )


SUBCLASS = """
from torch.testing._internal.two_tensor import TwoTensor
layer, a = batchnorm.nn.BatchNorm1d(5), torch.randn(33, 5)
kind = os.environ["KIND"]
if kind == "residual":
    y, expected = layer(x, TwoTensor(a, a.clone())), layer(x) + a
else:
    w = torch.rand(5) + 1
    setattr(layer, kind, torch.nn.Parameter(TwoTensor(w, w.clone())))
    expected = torch.nn.functional.batch_norm(x, None, None, **{"weight": None, kind: w}, training=True)
    y = layer(x)
torch.testing.assert_close(y.a if isinstance(y, TwoTensor) else y, expected, rtol=1e-4, atol=1e-4)
report()
"""


@pytest.mark.parametrize("kind", ["weight", "residual"])
def test_subclass_as_another_argument_than_input_is_not_read_by_its_address(kind):
    fresh(SUBCLASS, KIND=kind)


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32], ids=str)
def test_counter_of_another_dtype_counts_and_its_neighbour_stays(dtype):
    memory = torch.tensor([-1, 7], dtype=dtype)
    layer = batchnorm.nn.BatchNorm1d(3)
    layer.num_batches_tracked = memory[0]
    layer(torch.randn(8, 3))
    assert memory.tolist() == [0, 7]


def test_default_device_elsewhere_does_not_move_what_the_kernels_allocate():
    x, layer = torch.randn(6, 3, requires_grad=True), batchnorm.nn.BatchNorm1d(3, activation="relu")
    expected = torch.autograd.grad(layer(x).sum(), [x, layer.weight])
    with torch.device("meta"):
        assert batchnorm.nn.explain(layer, x).implementation == "kernel"
        results = torch.autograd.grad(layer(x).sum(), [x, layer.weight])
    torch.testing.assert_close(results, expected)


def test_tensor_that_a_transform_left_behind_is_read_as_what_it_wraps():
    left = []

    def loss(x: torch.Tensor) -> torch.Tensor:
        left.append(x * 2)
        return x.sum()

    x, layer = torch.randn(6, 3), batchnorm.nn.BatchNorm1d(3)
    torch.func.grad(loss)(x)
    torch.testing.assert_close(layer(left[0]), layer(x * 2))
