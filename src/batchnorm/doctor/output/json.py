"""The ``json`` format: everything, for programs."""

import json
from typing import Any

from batchnorm.doctor.checkpoint import Layer
from batchnorm.doctor.examine import Examination
from batchnorm.doctor.finding import Finding
from batchnorm.files import finite

SCHEMA_VERSION = 1


def render(examination: Examination) -> str:
    """One object in ASCII, in a stable order, with null for NaN and infinity; names are as they are in the file."""
    record = {
        "schema_version": SCHEMA_VERSION,
        "source": examination.source,
        "layers": [layer_record(layer) for layer in examination.layers],
        "findings": [finding_record(finding) for finding in examination.findings],
        "not_run": [{"code": rule.code, "name": rule.name, "needs": list(rule.needs)} for rule in examination.not_run],
    }
    return json.dumps(finite(record), indent=1, allow_nan=False) + "\n"


def layer_record(layer: Layer) -> dict[str, Any]:
    tensors = {
        role: {"name": tensor.name, "shape": list(tensor.shape), "dtype": tensor.dtype}
        for role, tensor in layer.tensors.items()
    }
    return {
        "path": layer.path,
        "framework": layer.framework,
        "num_features": layer.num_features,
        "eps": layer.eps,
        "momentum": layer.momentum,
        "sure": layer.sure,
        "tensors": tensors,
    }


def finding_record(finding: Finding) -> dict[str, Any]:
    return {
        "code": finding.code,
        "name": finding.name,
        "severity": finding.severity.value,
        "layer": finding.layer,
        "message": finding.message,
        "measured": finding.measured,
        "threshold": finding.threshold,
        "remedy": finding.remedy,
        "safe": finding.safe,
        "confidence": finding.confidence,
    }
