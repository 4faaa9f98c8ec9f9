"""torch.compile, torch.export and torch.jit.trace see through the layers and give the numbers of eager."""

import copy

import pytest
import torch
from torch import Tensor

from batchnorm.nn import BatchNorm1d, BatchNorm2d

TRAINING = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def step(call, layer: torch.nn.Module, x: Tensor, residual: Tensor | None) -> tuple:
    """Output and every gradient of one call."""
    x = x.clone().requires_grad_()
    residual = None if residual is None else residual.clone().requires_grad_()
    output = call(x) if residual is None else call(x, residual)
    leaves = [t for t in (x, residual, *layer.parameters()) if t is not None]
    return output.detach(), torch.autograd.grad(output.pow(2).sum(), leaves)


@TRAINING
@pytest.mark.parametrize("momentum", [0.1, None, 0.0])
@pytest.mark.parametrize(("activation", "with_residual"), [(None, False), ("gelu", True), ("relu", False)])
def test_compiled_layer_equals_eager_without_graph_break(activation, with_residual, momentum, training):
    eager = BatchNorm2d(3, momentum=momentum, activation=activation, dtype=torch.float64).train(training)
    layer = copy.deepcopy(eager)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        x = torch.randn(4, 3, 2, 2, dtype=torch.float64)
        residual = torch.randn_like(x) if with_residual else None
        torch.testing.assert_close(step(compiled, layer, x, residual), step(eager, eager, x, residual))
        torch.testing.assert_close(dict(layer.state_dict()), dict(eager.state_dict()))
    assert layer.num_batches_tracked == (2 if training else 0)


def test_cumulative_average_compiles_in_one_graph_though_torchs_does_not():
    x = torch.randn(4, 3)
    torchs = torch.compile(torch.nn.BatchNorm1d(3, momentum=None), fullgraph=True, backend="eager")
    with pytest.raises(torch._dynamo.exc.UserError, match="data-dependent"):
        torchs(x)
    layer = BatchNorm1d(3, momentum=None)
    torch.compile(layer, fullgraph=True, backend="eager")(x)
    torch.testing.assert_close(layer.running_mean, x.mean(0))


@TRAINING
def test_compiled_layer_takes_any_batch_size_in_one_graph(training):
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    eager = BatchNorm1d(3, activation="silu").train(training)
    layer = copy.deepcopy(eager)
    compiled = torch.compile(layer, fullgraph=True, backend=count, dynamic=True)
    for size in (4, 7, 30):
        x = torch.randn(size, 3)
        torch.testing.assert_close(compiled(x), eager(x))
    torch.testing.assert_close(dict(layer.state_dict()), dict(eager.state_dict()))
    assert len(graphs) == 1


def test_compiled_layer_switches_between_training_and_evaluation():
    eager = BatchNorm1d(3)
    layer = copy.deepcopy(eager)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for training in (True, False, True):
        x = torch.randn(4, 3)
        torch.testing.assert_close(compiled.train(training)(x), eager.train(training)(x))
    torch.testing.assert_close(layer.running_var, eager.running_var)


def test_compiled_half_precision_equals_eager_up_to_a_rounding():
    eager = BatchNorm2d(3, activation="relu")
    layer = copy.deepcopy(eager)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 3, 2, 2).bfloat16()
    torch.testing.assert_close(compiled(x), eager(x), rtol=torch.finfo(torch.bfloat16).eps, atol=1e-6)
    torch.testing.assert_close(layer.running_mean, eager.running_mean)


@pytest.mark.parametrize("implementation", ["aten", "reference"])
def test_compiled_layer_keeps_the_implementation_that_was_asked_for(implementation):
    eager = BatchNorm1d(3, activation="tanh", implementation=implementation)
    layer = copy.deepcopy(eager)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, residual = torch.randn(2, 4, 3)
    torch.testing.assert_close(step(compiled, layer, x, residual), step(eager, eager, x, residual))
    torch.testing.assert_close(dict(layer.state_dict()), dict(eager.state_dict()))


def operations(program: torch.export.ExportedProgram) -> list:
    return [node.target for node in program.graph.nodes if node.op == "call_function"]


def test_exported_evaluation_is_one_batch_norm_operation():
    layer = BatchNorm2d(3, activation="relu").eval()
    x = torch.randn(4, 3, 2, 2)
    program = torch.export.export(layer, (x,))
    assert operations(program) == [torch.ops.aten.batch_norm.default, torch.ops.aten.relu.default]
    torch.testing.assert_close(program.module()(x), layer(x))


@TRAINING
@pytest.mark.parametrize("momentum", [0.1, None])
def test_exported_layer_gives_eager_numbers_for_other_batch_sizes(momentum, training):
    eager = BatchNorm2d(3, momentum=momentum, activation="hardswish").train(training)
    dynamic = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(copy.deepcopy(eager), (torch.randn(4, 3, 2, 2),), dynamic_shapes=dynamic)
    module = program.module()
    for size in (4, 9):
        x = torch.randn(size, 3, 2, 2)
        torch.testing.assert_close(module(x), eager(x))
        torch.testing.assert_close(dict(module.named_buffers()), dict(eager.named_buffers()))


def test_exported_training_consists_of_plain_operations():
    program = torch.export.export(BatchNorm1d(3), (torch.randn(4, 3),))
    assert all(target.namespace == "aten" for target in operations(program) if hasattr(target, "namespace"))


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning")
@pytest.mark.parametrize("activation", [None, "silu"])
def test_traced_evaluation_equals_eager(activation):
    layer = BatchNorm2d(3, activation=activation).eval()
    layer.running_mean.normal_()
    x = torch.randn(4, 3, 2, 2)
    traced = torch.jit.trace(layer, (x,))
    assert "aten::batch_norm" in str(traced.graph)
    other = torch.randn(7, 3, 5, 4)
    torch.testing.assert_close(traced(other), layer(other))
