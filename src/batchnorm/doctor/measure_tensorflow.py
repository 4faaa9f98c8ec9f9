"""Moments of the inputs of batch normalization layers in a graph of TensorFlow, in the user's own session."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from batchnorm.doctor.checkpoint import ROLES
from batchnorm.doctor.read.graph import PASSING, VARIABLES
from batchnorm.doctor.read.variables import split_role

FUSED = "FusedBatchNorm"
BRANCHING = ("Switch", "RefSwitch")
# steps from an operation to a variable: real graphs need fewer than ten
LONGEST_WAY = 64


def measure_tensorflow(
    session: Any, feeds: Iterable[Mapping[Any, Any]], inputs: Mapping[str, Any] | None = None
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Measure the moments that evaluation of a TensorFlow graph needs, for a checkpoint that lost them.

    All values of a channel count as one population (law of total variance), merged in float64. Nothing is changed.

    Args:
        session: a ``tf.compat.v1.Session`` whose variables have the weights of the checkpoint. The layers have to
            normalize by their batches, as in training: a graph that was built so, or a placeholder in the feeds.
        feeds: of ``session.run``, such as ``{"images:0": batch}``, one for each batch.
        inputs: tensors that go into the layers, by layer, with channels last. None for those of all fused operations
            (``tf.nn.fused_batch_norm``, which ``tf.layers`` and slim use by default) outside of functions.

    Returns:
        Mean and unbiased variance, shape (C,), by layer, as :func:`batchnorm.repair` takes them for ``statistics``.

    Raises:
        ValueError: no layer is found; no feeds; inf or NaN; one value per channel.

    Example:
        >>> from types import SimpleNamespace
        >>> played = SimpleNamespace(run=lambda fetches, feed: {"bn": feed["images:0"]})  # a tf.compat.v1.Session
        >>> feeds = [{"images:0": np.array([[0.0], [2.0]])}, {"images:0": np.array([[10.0], [12.0]])}]
        >>> measure_tensorflow(played, feeds, inputs={"bn": "images:0"})
        {'bn': (array([6.]), array([34.66666667]))}
    """
    found = fused_inputs(session.graph) if inputs is None else {path: (x, False) for path, x in inputs.items()}
    if not found:
        raise ValueError("the graph has no fused batch normalization: name the layers' inputs, as inputs={layer: x}")
    moments: dict[str, tuple[float, np.ndarray, np.ndarray]] = {}
    for feed in feeds:
        values = session.run({path: x for path, (x, _) in found.items()}, dict(feed))
        for path, x in values.items():
            moments[path] = joined(moments.get(path), np.moveaxis(x, 1, -1) if found[path][1] else x)
    if not moments:
        raise ValueError("there are no feeds to measure on")
    for path, (count, mean, squares) in moments.items():
        if count < 2 or not (np.isfinite(mean).all() and np.isfinite(squares).all()):
            raise ValueError(f"layer {path!r} received {'inf or NaN' if count > 1 else 'one value per channel'}")
    return {path: (mean, squares / (count - 1)) for path, (count, mean, squares) in moments.items()}


def joined(before: tuple[float, np.ndarray, np.ndarray] | None, x: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """Count, mean and sum of squared deviations with the values of another batch, channels last."""
    flat = np.asarray(x, np.float64).reshape(-1, x.shape[-1])
    with np.errstate(all="ignore"):
        mean = flat.mean(0)
        part = float(len(flat)), mean, ((flat - mean) ** 2).sum(0)
        if before is None:
            return part
        total, apart = before[0] + part[0], part[1] - before[1]
        squares = before[2] + part[2] + apart**2 * (before[0] * part[0] / total)
        return total, before[1] + apart * (part[0] / total), squares


def fused_inputs(graph: Any) -> dict[str, tuple[Any, bool]]:
    """By layer the tensor that goes into its fused operation, and whether channels come second."""
    found = {}
    for op in graph.get_operations():
        if op.type.startswith(FUSED) and "Grad" not in op.type:
            paths = [path for path in map(layer_of, op.inputs[1:5]) if path is not None]
            if paths and paths[0] not in found:
                x = op.inputs[0]
                while x.op.type in BRANCHING:
                    # what lies inside of a condition cannot be fetched
                    x = x.op.inputs[0]
                found[paths[0]] = x, op.get_attr("data_format").startswith(b"NC")
    return found


def layer_of(tensor: Any) -> str | None:
    """Scope of the variable that a tensor reads, if it is one of a layer."""
    op = tensor.op
    for _ in range(LONGEST_WAY):
        if op.type in VARIABLES:
            split = split_role(op.name)
            return split[0] if split is not None and split[1] in ROLES else None
        if op.type not in PASSING or not op.inputs:
            return None
        op = op.inputs[0].op
    return None
