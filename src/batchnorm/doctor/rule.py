"""What a rule is, and what it is given to look at."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from batchnorm.doctor.checkpoint import Checkpoint, Layer
from batchnorm.doctor.finding import Finding, Severity

if TYPE_CHECKING:
    from torch import nn, optim


class Needs(StrEnum):
    """What must be given for a rule to run."""

    FILE = "file"
    MODEL = "model"
    DATA = "data"
    OPTIMIZER = "optimizer"
    RANKS = "ranks"


@dataclass
class Subject:
    """What is examined. A model has layers too: file rules read them as they read those of a file.

    Attributes:
        source: a path, or the class of the model.
        layers: BN layers in the order of the file or model.
        checkpoint: the file or state dict, if it is one.
        model: the live model, if there is one.
        loader: yields inputs, or tuples that begin with one; iterated as often as rules need it.
        optimizer: that trains the model.
        call: runs the model on an item of the loader.
        kept: what one rule measured and others read, by name.
    """

    source: str
    layers: list[Layer]
    checkpoint: Checkpoint | None = None
    model: "nn.Module | None" = None
    loader: Iterable[Any] | None = None
    optimizer: "optim.Optimizer | None" = None
    call: "Callable[[nn.Module, Any], Any] | None" = None
    kept: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def given(self) -> set[Needs]:
        """What the rules can count on; layers are there in any case."""
        parts = {Needs.MODEL: self.model, Needs.DATA: self.loader, Needs.OPTIMIZER: self.optimizer}
        found = {Needs.FILE, *(need for need, part in parts.items() if part is not None)}
        return found | {Needs.RANKS} if self.model is not None and has_ranks() else found


def has_ranks() -> bool:
    """Whether this is one of several processes of torch.distributed."""
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@dataclass(frozen=True)
class Rule:
    """A rule of the catalogue.

    Attributes:
        code: never used again for another fault.
        name: in kebab case.
        severity: of its gravest finding.
        needs: what must be given.
        summary: the fault in one line.
        check: yields findings.
        container: whether it looks at the file itself instead of its layers, and so needs a file.
        preview: new; not yet tried on many models.
    """

    code: str
    name: str
    severity: Severity
    needs: frozenset[Needs]
    summary: str
    check: Callable[[Subject], Iterable[Finding]] = field(repr=False)
    container: bool = False
    preview: bool = False
