"""The ``concise`` format: one line for each finding, as compilers write them."""

from batchnorm.doctor.examine import Examination
from batchnorm.doctor.finding import Finding
from batchnorm.doctor.output.names import layer_name, shown


def render(examination: Examination) -> str:
    """``source: layer: BN101 error message``, without the layer where the whole file or model is meant."""
    return "".join(f"{shown(examination.source)}: {line(finding)}\n" for finding in examination.findings)


def line(finding: Finding) -> str:
    layer = f"{layer_name(finding.layer)}: " if finding.layer else ""
    return f"{layer}{finding.code} {finding.severity} {shown(finding.message)}"
