"""What a rule says about a layer."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Severity(StrEnum):
    """In falling order: evaluation is wrong; it may be; worth knowing."""

    ERROR = "error"
    WARNING = "warning"
    INFO = "info"

    @property
    def rank(self) -> int:
        """0 is the gravest."""
        return list(Severity).index(self)


@dataclass(frozen=True)
class Finding:
    """A fault that was found.

    Attributes:
        code: of the rule, such as "BN101".
        name: of the rule, in kebab case.
        severity: how grave it is here; a rule may find graver and lighter cases.
        layer: path of the layer; "" for the whole file or model.
        message: what was measured and what follows from it, in one or two sentences.
        measured: the numbers by name; plain JSON values, None for NaN and infinity.
        threshold: what they are held against, by the same names.
        remedy: what to do.
        safe: whether the remedy leaves the evaluation output as it is; None if there is none to apply.
        confidence: how sure the rule is: "certain", "likely" or "possible".
    """

    code: str
    name: str
    severity: Severity
    layer: str
    message: str
    measured: dict[str, Any] = field(default_factory=dict)
    threshold: dict[str, Any] = field(default_factory=dict)
    remedy: str = ""
    safe: bool | None = None
    confidence: str = "certain"
