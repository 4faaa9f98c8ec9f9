"""What a folded model looks like to torch.export and ONNX: no batch normalization is left."""

import io

import onnx
import onnxruntime
import pytest
import torch
from folded import with_statistics
from torch import nn

import batchnorm
import batchnorm.nn

X = torch.randn(2, 3, 8, 8)


def model() -> nn.Module:
    return with_statistics(
        nn.Sequential(
            nn.BatchNorm2d(3),
            nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect", bias=False),
            batchnorm.nn.BatchNorm2d(8, activation="silu"),
            nn.ConvTranspose2d(8, 6, 3, stride=2, groups=2),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(6, 4),
            nn.BatchNorm1d(4),
        )
    )


def operations(module: nn.Module) -> set[str]:
    program = torch.export.export(module, (X,))
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


def test_exported_program_of_a_folded_model_has_no_batch_norm():
    unfolded = model()
    folded, changes = batchnorm.fold(unfolded, X)
    assert all(change.what.startswith("folded") for change in changes)
    assert any("batch_norm" in name for name in operations(unfolded))
    assert not any("batch_norm" in name for name in operations(folded))
    exported = torch.export.export(folded, (X,)).module()
    assert torch.equal(exported(X), folded(X))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:Constant folding")
@pytest.mark.parametrize("dynamo", [True, False])
def test_folded_model_through_onnx_is_the_same(dynamo):
    unfolded = model()
    folded, _ = batchnorm.fold(unfolded, X)
    graphs = {name: onnx.load_from_string(export(m, dynamo)) for name, m in (("no", unfolded), ("yes", folded))}
    kinds = {name: [node.op_type for node in graph.graph.node] for name, graph in graphs.items()}
    assert "BatchNormalization" in kinds["no"]
    assert "BatchNormalization" not in kinds["yes"]
    session = onnxruntime.InferenceSession(graphs["yes"].SerializeToString(), providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: X.numpy()})
    exact = unfolded.double()(X.double()).detach()
    torch.testing.assert_close(torch.from_numpy(output).double(), exact, rtol=1e-5, atol=1e-5)


def export(module: nn.Module, dynamo: bool) -> bytes:
    """Without the optimizer of the newer exporter, which folds some layers itself, as the older one always does."""
    if dynamo:
        program = torch.onnx.export(module, (X,), dynamo=True, optimize=False, verbose=False)
        assert program is not None
        return program.model_proto.SerializeToString()
    file = io.BytesIO()
    torch.onnx.export(module, (X,), file, dynamo=False)
    return file.getvalue()
