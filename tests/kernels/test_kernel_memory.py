"""What the kernels keep for the backward pass, and the memory that large outputs lie in and leave behind."""

import copy
import io
import os
import pickle

import pytest
import torch
from torch import Tensor

import batchnorm
import batchnorm.nn
from batchnorm import functional, reference
from batchnorm._ops import memory

SHAPE = (6, 5, 12, 12)
COUNT = 6 * 5 * 12 * 12


def saved_by(call) -> list[Tensor]:
    """The distinct tensors that autograd keeps for a call."""
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return list(kept.values())


def sizes(kept: list[Tensor]) -> tuple[int, int]:
    """How many tensors of full size are kept, and the bytes of all others."""
    full = [t for t in kept if t.numel() * t.element_size() >= COUNT * 4]
    return len(full), sum(t.numel() * t.element_size() for t in kept) - sum(t.numel() * 4 for t in full)


def frozen(activation: str | None) -> batchnorm.nn.BatchNorm2d:
    layer = batchnorm.nn.BatchNorm2d(5, activation=activation, implementation="kernel")
    with torch.no_grad():
        for tensor in (layer.weight, layer.bias, layer.running_mean):
            tensor.normal_()
        layer.running_var.uniform_(0.5, 2)
    return layer.eval().requires_grad_(False)


# mean and 1 / std in float64, weight and bias: far less than a bit per element here
PER_CHANNEL_BYTES = 5 * (2 * 8 + 2 * 4)
# every row of a strip begins with a word of its own
MASK_BYTES = 6 * 5 * 4 * -(-144 // 32)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
def test_addition_and_activation_keep_the_input_and_one_bit_per_element(activation):
    x, residual = (torch.randn(SHAPE, requires_grad=True) for _ in range(2))
    layer = batchnorm.nn.BatchNorm2d(5, activation=activation, implementation="kernel")
    kept = saved_by(lambda: layer(x, residual))
    full, rest = sizes(kept)
    assert full == 1
    assert x.data_ptr() in [t.data_ptr() for t in kept]
    assert residual.data_ptr() not in [t.data_ptr() for t in kept]
    assert rest == PER_CHANNEL_BYTES + MASK_BYTES


@pytest.mark.parametrize("activation", [None, "relu"])
def test_without_addition_only_the_input_is_kept(activation):
    x = torch.randn(SHAPE, requires_grad=True)
    layer = batchnorm.nn.BatchNorm2d(5, activation=activation, implementation="kernel")
    full, rest = sizes(saved_by(lambda: layer(x)))
    assert (full, rest) == (1, PER_CHANNEL_BYTES)


def test_memory_report_sees_one_input_and_a_mask():
    x, residual = (torch.randn(SHAPE, requires_grad=True) for _ in range(2))
    report = batchnorm.memory_report(batchnorm.nn.BatchNorm2d(5, activation="relu"), (x, residual))
    assert report.inputs == COUNT * 4
    assert report.alone == 5 * 2 * 8 + MASK_BYTES


FROZEN = {
    "plain": (None, False),
    "add": (None, True),
    "relu": ("relu", False),
    "add_relu": ("relu", True),
    "relu6": ("relu6", False),
    "leaky_relu": ("leaky_relu", False),
}


@pytest.mark.parametrize(("activation", "with_residual"), FROZEN.values(), ids=FROZEN)
def test_frozen_layer_keeps_nothing_of_full_size_and_its_gradients_are_right(activation, with_residual):
    layer = frozen(activation)
    x, residual = (torch.randn(SHAPE).mul_(3).requires_grad_() for _ in range(2))
    inputs = (x, residual) if with_residual else (x,)
    kept = saved_by(lambda: layer(*inputs))
    assert sizes(kept) == (0, PER_CHANNEL_BYTES + (0 if activation is None else MASK_BYTES))
    leaves = [t.detach().double().requires_grad_() for t in inputs]
    statistics = (layer.running_mean.double(), layer.running_var.double())
    exact = reference.batch_norm_inference(
        leaves[0], *statistics, layer.weight.double(), layer.bias.double(),
        residual=leaves[1] if with_residual else None, activation=activation, eps=layer.eps,
    )  # fmt: skip
    grad_output = torch.randn(SHAPE)
    expected = torch.autograd.grad(exact, leaves, grad_output.double())
    output = layer(*inputs)
    torch.testing.assert_close(output.double(), exact.detach(), rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(torch.autograd.grad(output, inputs, grad_output), expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)


def test_smooth_activation_of_a_frozen_layer_keeps_its_input():
    x = torch.randn(SHAPE, requires_grad=True)
    assert sizes(saved_by(lambda: frozen("silu")(x)))[0] == 1


def test_evaluation_without_gradients_keeps_nothing():
    layer = frozen("relu")
    x = torch.randn(SHAPE, requires_grad=True)

    def evaluate() -> None:
        with torch.no_grad():
            assert not layer(x).requires_grad

    assert saved_by(evaluate) == []


# Large outputs lie in memory that is used again

LARGE_SHAPE = (9, 8, 192, 192)  # 10.6 MB
assert memory.LARGE_BYTES < 9 * 8 * 192 * 192 * 4
large_memory = pytest.mark.skipif(not memory.AVAILABLE, reason="memory is used again on linux only")


@pytest.fixture
def large_input():
    return torch.randn(LARGE_SHAPE)


def normalized(x: Tensor) -> Tensor:
    with torch.no_grad():
        return functional.batch_norm_train(x, implementation="kernel").output


@large_memory
def test_memory_is_used_again_only_after_the_last_view_is_gone(large_input):
    y = normalized(large_input)
    address, expected = y.data_ptr(), y.clone()
    part = y[3].view(-1)[5:]
    content = part.clone()
    del y
    others = [normalized(large_input + k) for k in range(3)]
    assert address not in [other.data_ptr() for other in others]
    assert torch.equal(part, content)
    del part
    again = normalized(large_input)
    assert again.data_ptr() == address
    assert torch.equal(again, expected)


@large_memory
def test_saved_output_and_numpy_and_dlpack_keep_the_memory(large_input):
    for hold in (lambda y: y.numpy(), lambda y: torch.from_dlpack(y), lambda y: y.untyped_storage()):
        y = normalized(large_input)
        address, held = y.data_ptr(), hold(y)
        del y
        assert normalized(large_input).data_ptr() != address
        del held


@large_memory
def test_gradients_in_large_memory_accumulate(large_input):
    x = large_input.requires_grad_()
    for _ in range(2):
        output = functional.batch_norm_train(x, implementation="kernel").output
        output.backward(torch.ones_like(output) * x.detach())
    once = torch.autograd.grad(functional.batch_norm_train(x, implementation="aten").output, x, x.detach())[0]
    torch.testing.assert_close(x.grad, 2 * once, rtol=1e-3, atol=1e-4)


@large_memory
def test_large_output_can_be_changed_copied_pickled_saved_and_shared(large_input):
    y = normalized(large_input)
    expected = y.clone()
    assert torch.equal(copy.deepcopy(y), expected)
    assert torch.equal(pickle.loads(pickle.dumps(y)), expected)
    file = io.BytesIO()
    torch.save(y[:2], file)
    file.seek(0)
    assert torch.equal(torch.load(file), expected[:2])
    assert (y.numpy() == expected.numpy()).all()
    assert torch.equal(torch.from_dlpack(y), expected)
    assert torch.equal(y.view(torch.int32).view(torch.float32), expected)
    y.mul_(2).relu_()
    assert torch.equal(y, (expected * 2).relu())
    y.transpose_(0, 1)
    assert torch.equal(y.transpose(0, 1), (expected * 2).relu())
    shared = normalized(large_input).share_memory_()
    assert shared.is_shared()
    assert torch.equal(shared, expected)


@large_memory
def test_large_output_cannot_be_resized_in_place_as_documented(large_input):
    y = normalized(large_input)
    with pytest.raises(RuntimeError, match="not resizable"):
        y.resize_(2 * y.shape[0], *y.shape[1:])


@large_memory
def test_large_channels_last_output_has_the_strides_of_its_input(large_input):
    x = large_input.to(memory_format=torch.channels_last)
    y = normalized(x)
    assert y.stride() == x.stride()
    torch.testing.assert_close(y, normalized(large_input), rtol=1e-4, atol=1e-5)


@large_memory
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_forked_child_and_parent_do_not_see_what_the_other_writes(large_input):
    y = normalized(large_input)
    expected = y.clone()
    waiting = normalized(large_input + 1)
    del waiting
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        # into the tensor, and into a region that waits in both processes
        y.fill_(7.0)
        normalized(large_input * 2)
        os.write(write, b"x")
        os._exit(0)
    os.read(read, 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert torch.equal(y, expected)
    assert torch.equal(normalized(large_input), expected)
    os.close(read)
    os.close(write)
