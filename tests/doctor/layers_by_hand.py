"""Layers in the normal form from arrays, and what a rule says about them."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import numpy as np

from batchnorm.doctor.catalogue import RULES
from batchnorm.doctor.checkpoint import ROLES, Checkpoint, Layer, StoredTensor
from batchnorm.doctor.finding import Finding
from batchnorm.doctor.rule import Subject


def stored(name: str, values: Any, dtype: str) -> StoredTensor:
    array = np.asarray(values)
    return StoredTensor(name, array.shape, dtype, lambda: array)


def make_layer(
    path: str = "bn",
    *,
    framework: str = "torch",
    dtype: str = "float32",
    expected: Iterable[str] = ("running_mean", "running_var"),
    sure: bool = True,
    eps: float | None = None,
    momentum: float | None = None,
    **roles: Any,
) -> Layer:
    """Arrays by role; a role that is None is absent, the others are those of a trained layer of two channels."""
    given = {
        "weight": [0.9, 1.1],
        "bias": [0.1, -0.2],
        "running_mean": [0.5, -1.5],
        "running_var": [0.25, 4.0],
        "num_batches_tracked": 100,
        **roles,
    }
    values = {role: given[role] for role in ROLES if given[role] is not None}
    tensors = {role: stored(f"{path}.{role}", value, dtype) for role, value in values.items()}
    features = next((len(values[role]) for role in ROLES[:-1] if role in values), 2)
    return Layer(path, framework, tensors, frozenset(expected), features, eps, momentum, sure)


def findings_of(code: str, *layers: Layer, checkpoint: Checkpoint | None = None) -> list[Finding]:
    """What one rule says; all of it is plain JSON."""
    rule = next(rule for rule in RULES if rule.code == code)
    found = list(rule.check(Subject("by hand", list(layers), checkpoint)))
    for finding in found:
        json.dumps(asdict(finding), allow_nan=False)
        assert (finding.code, finding.name) == (rule.code, rule.name)
        assert finding.severity.rank >= rule.severity.rank
    return found
