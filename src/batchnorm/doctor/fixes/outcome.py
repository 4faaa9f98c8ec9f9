"""What became of a finding, and new values of layers in a checkpoint."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import numpy as np

from batchnorm.doctor.checkpoint import Checkpoint, Layer
from batchnorm.doctor.finding import Finding
from batchnorm.doctor.write.raw import new_tensor

# layer -> role -> values
Values = Mapping[str, Mapping[str, np.ndarray]]


class Action(StrEnum):
    """Repaired; not repaired, though there is a way; nothing to repair, or not by this."""

    FIXED = "fixed"
    REFUSED = "refused"
    LEFT = "left"


@dataclass(frozen=True)
class Outcome:
    """What became of a finding.

    Attributes:
        code: of the rule.
        name: of the rule.
        layer: path; "" for the whole file or model.
        action: what was done.
        what: how, or why not.
        safe: whether the evaluation output stays as it is; None if nothing was done.
    """

    code: str
    name: str
    layer: str
    action: Action
    what: str
    safe: bool | None = None


class Result(NamedTuple):
    """Of a fix: new values, and what became of each finding."""

    values: Values
    outcomes: list[Outcome]


def fixed(finding: Finding, what: str, *, safe: bool) -> Outcome:
    return Outcome(finding.code, finding.name, finding.layer, Action.FIXED, what, safe)


def refused(finding: Finding, why: str) -> Outcome:
    return Outcome(finding.code, finding.name, finding.layer, Action.REFUSED, why)


def left(finding: Finding) -> Outcome:
    """For a finding that no repair of this package is for."""
    what = finding.remedy or "nothing to repair"
    return Outcome(finding.code, finding.name, finding.layer, Action.LEFT, what)


def with_values(checkpoint: Checkpoint, values: Values) -> Checkpoint:
    """The same with these tensors; the one that is given stays as it is."""
    tensors, layers = dict(checkpoint.tensors), []
    for layer in checkpoint.layers:
        own = dict(layer.tensors)
        for role, array in values.get(layer.path, {}).items():
            name = own[role].name if role in own else name_of(layer, role, checkpoint.layers)
            earlier = tensors.get(name)
            # a counter of shape (1,) stays one
            tensors[name] = new_tensor(name, array if earlier is None else array.reshape(earlier.shape))
            own[role] = new_tensor(name, array)
        layers.append(dataclasses.replace(layer, tensors=own))
    return dataclasses.replace(checkpoint, tensors=tensors, layers=layers)


def name_of(layer: Layer, role: str, layers: list[Layer]) -> str:
    """Of a tensor that is not there: as the framework calls it, or in TensorFlow as it is called in another layer."""
    if layer.framework == "torch":
        return f"{layer.path}.{role}" if layer.path else role
    if layer.framework == "tensorflow":
        for other in layers:
            tensor = other.tensors.get(role)
            if tensor is not None and other.path and tensor.name.startswith(f"{other.path}/"):
                return f"{layer.path}{tensor.name[len(other.path) :]}".lstrip("/")
    theirs = {"running_mean": "moving_mean", "running_var": "moving_variance"}[role]
    return f"{layer.path}/{theirs}" if layer.path else theirs
