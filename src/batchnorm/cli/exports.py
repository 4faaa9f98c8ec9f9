"""Models and their tensors as files that need neither this package nor the code of the model."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping

import safetensors.torch
import torch
from torch import Tensor, nn

PROGRAM, ONNX = ".pt2", ".onnx"


def safetensors_bytes(state: Mapping[str, Tensor]) -> bytes:
    """A state_dict as safetensors, where tensors that share memory are written once for each name."""
    layout = torch.contiguous_format
    return safetensors.torch.save({name: value.detach().clone(memory_format=layout) for name, value in state.items()})


def program_bytes(model: nn.Module, input: Tensor) -> bytes:
    """A program of ``torch.export``."""
    args, shapes = traced_with(input)
    buffer = io.BytesIO()
    with quiet():
        torch.export.save(torch.export.export(model, args, dynamic_shapes=shapes), buffer)
    return buffer.getvalue()


def onnx_bytes(model: nn.Module, input: Tensor) -> bytes:
    """A program of ONNX; weights lie in the file itself."""
    args, shapes = traced_with(input)
    with quiet():
        program = torch.onnx.export(model, args, dynamic_shapes=shapes, dynamo=True, verbose=False)
    assert program is not None
    return program.model_proto.SerializeToString()


def traced_with(input: Tensor) -> tuple[tuple[Tensor], tuple[dict[int, object]]]:
    """Arguments for tracing, and that the batch size is free if the model allows it; 1 would count as a constant."""
    batch = torch.cat([input, input]) if len(input) == 1 else input
    return (batch,), ({0: torch.export.Dim.AUTO},)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what exporters print, log and warn about: graphs, packages that are not installed, their own code."""
    logger, printed = logging.getLogger("torch"), io.StringIO()
    level = logger.level
    outputs = contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed)
    with warnings.catch_warnings(), outputs[0], outputs[1]:
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)
