"""Ghost batch normalization: parts of a batch are normalized alone, statistics are those of the whole batch."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import batchnorm.nn
from against_oracle import STEPS, assert_follows
from batchnorm._ops import choice
from batchnorm.nn import GhostBatchNorm1d, GhostBatchNorm2d, GhostBatchNorm3d
from batchnorm.reference import TrainOutput
from batchnorm.relatives.ghost import ghost_batch_norm_train, ghost_sizes
from layouts import LAYOUTS, tensor_in

IMPLEMENTATIONS = pytest.mark.parametrize("implementation", choice.IMPLEMENTATIONS)
CLASSES = {2: GhostBatchNorm1d, 3: GhostBatchNorm1d, 4: GhostBatchNorm2d, 5: GhostBatchNorm3d}


def formulas(x, step, running_mean, running_var, weight, bias) -> TrainOutput:
    return ghost_batch_norm_train(x, 2, weight, bias)


def by_aten(x, step, running_mean, running_var, weight, bias) -> TrainOutput:
    parts = x.split(ghost_sizes(len(x), 2))
    output = torch.cat([F.batch_norm(part, None, None, weight, bias, True) for part in parts])
    return ghost_batch_norm_train(x, 2)._replace(output=output)


@IMPLEMENTATIONS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_follows_the_formulas(layout, dtype, implementation):
    x = tensor_in(layout, dtype)
    layer = CLASSES[x.dim()](x.shape[1], ghost_batch_size=2, implementation=implementation)
    assert_follows(layer, formulas, by_aten, [x])


@IMPLEMENTATIONS
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("steps", STEPS)
def test_statistics_and_evaluation_after_k_steps(steps, offset, momentum, implementation):
    batches = [torch.randn(4 + step % 3, 31, 5) * 2 + offset for step in range(steps)]
    layer = GhostBatchNorm1d(31, momentum=momentum, ghost_batch_size=2, implementation=implementation)
    assert_follows(layer, formulas, by_aten, batches)
    assert layer.num_batches_tracked == steps


@pytest.mark.parametrize(
    ("batch_size", "ghost_batch_size", "sizes"),
    [(8, 4, [4, 4]), (9, 4, [5, 4]), (7, 4, [7]), (3, 2, [3]), (11, 3, [4, 4, 3]), (1, 4, [1]), (5, 1, [1] * 5)],
)
def test_parts_differ_by_at_most_one_sample_and_are_not_smaller_than_asked(batch_size, ghost_batch_size, sizes):
    assert ghost_sizes(batch_size, ghost_batch_size) == sizes
    x = torch.randn(batch_size, 3, 5).double()
    layer = GhostBatchNorm1d(3, ghost_batch_size=ghost_batch_size, dtype=torch.float64)
    parts = [nn.BatchNorm1d(3).double()(part) for part in x.split(sizes)]
    torch.testing.assert_close(layer(x), torch.cat(parts))


def test_no_dense_batch_of_two_and_more_is_refused_where_parts_are_of_two_and_more():
    for batch_size in range(2, 30):
        for ghost_batch_size in range(2, 12):
            GhostBatchNorm1d(2, ghost_batch_size=ghost_batch_size)(torch.randn(batch_size, 2))


def test_running_statistics_are_batch_norms_of_the_whole_batch():
    plain, ghost = nn.BatchNorm2d(3).double(), GhostBatchNorm2d(3, ghost_batch_size=3, dtype=torch.float64)
    for _ in range(3):
        x = torch.randn(8, 3, 2, 5).double() + 3
        plain(x)
        ghost(x)
    torch.testing.assert_close(dict(ghost.state_dict()), dict(plain.state_dict()))


def test_evaluation_does_not_know_of_parts():
    layer = GhostBatchNorm1d(3, ghost_batch_size=4)
    layer(torch.randn(8, 3))
    plain = batchnorm.nn.BatchNorm1d(3).eval()
    plain.load_state_dict(layer.state_dict())
    for size in (1, 3, 8):
        x = torch.randn(size, 3)
        assert torch.equal(layer.eval()(x), plain(x))
    untracked = GhostBatchNorm1d(3, ghost_batch_size=4, track_running_stats=False).eval()
    x = torch.randn(8, 3)
    assert torch.equal(untracked(x), batchnorm.nn.BatchNorm1d(3)(x))


def test_parts_take_residual_and_activation():
    x, residual = torch.randn(2, 8, 3, 4).double()
    layer = GhostBatchNorm1d(3, ghost_batch_size=4, activation="relu", dtype=torch.float64)
    expected = (ghost_batch_norm_train(x, 4).output + residual).relu()
    torch.testing.assert_close(layer(x, residual), expected)


def test_parts_of_one_value_per_channel_are_refused_untouched():
    layer = GhostBatchNorm1d(3, ghost_batch_size=1)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"more than 1 value.*ghost_batch_size=1 for an input of size \(4, 3\): use at"
    ):
        layer(torch.randn(4, 3))
    torch.testing.assert_close(dict(layer.state_dict()), before)
    assert layer(torch.randn(4, 3, 2)).isfinite().all()


@pytest.mark.parametrize("ghost_batch_size", [0, -3])
def test_a_size_without_samples_is_refused(ghost_batch_size):
    with pytest.raises(ValueError, match=f"at least 1 sample, got {ghost_batch_size}"):
        GhostBatchNorm2d(3, ghost_batch_size=ghost_batch_size)


def test_inf_in_one_part_leaves_the_output_of_others():
    x = torch.randn(8, 2)
    x[1, 0] = float("inf")
    output = GhostBatchNorm1d(2, ghost_batch_size=4)(x)
    assert output[:4, 0].isnan().all()
    assert output[4:].isfinite().all()
    assert output[:, 1].isfinite().all()


def test_gradients_are_those_of_finite_differences():
    layer = GhostBatchNorm1d(2, ghost_batch_size=2, dtype=torch.float64, track_running_stats=False)
    x = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)
    assert torch.autograd.gradgradcheck(layer, x)


def test_a_gradient_is_concatenated_once_and_not_padded_per_part():
    x = torch.randn(8, 2, requires_grad=True)
    output = GhostBatchNorm1d(2, ghost_batch_size=2)(x)
    nodes, seen = [output.grad_fn], set()
    while nodes:
        node = nodes.pop()
        seen.add(type(node).__name__)
        nodes += [inner for inner, _ in node.next_functions if inner is not None]
    assert not {name for name in seen if "Slice" in name}
