"""What a repair is told, and what it returns."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchnorm.doctor.changes import Comparison
from batchnorm.doctor.checkpoint import Checkpoint, StoredTensor
from batchnorm.doctor.examine import Examination
from batchnorm.doctor.finding import Finding
from batchnorm.doctor.fixes.outcome import Action, Outcome, fixed, left, refused
from batchnorm.doctor.fixes.statistics import Measured

if TYPE_CHECKING:
    from torch import Tensor, nn

    Call = Callable[[nn.Module, Any], Any]

# whose remedy is new statistics
MEASURED = ("BN100", "BN101", "BN102", "BN108")
UNSAFE = "it changes the evaluation output, and that is for you to allow: unsafe=True, --unsafe-fixes"
UNMEASURED = "new statistics need a model and data, or statistics that you measured"


@dataclass(frozen=True)
class Options:
    """What :func:`repair` was told."""

    loader: Iterable[Any] | None
    call: "Call | None"
    statistics: Mapping[str, Any] | None
    unsafe: bool
    select: str | Iterable[str]
    ignore: str | Iterable[str]
    wanted: Callable[[Finding], bool] | None
    eps_from: float | None
    eps_to: float | None
    counts: Mapping[str, int]
    batches: int | None


@dataclass(frozen=True)
class Repair:
    """What :func:`repair` did.

    Attributes:
        source: the path, or the class of the model.
        format: of the source, such as "torch" or "tensorflow"; "model" for a live one.
        outcomes: what became of each finding.
        comparison: each tensor's SHA-256 before and after, and how far it moved.
        tensors: all tensors, repaired, by their names in the source.
        checkpoint: the repaired file in its normal form; None for a live model.
        model: the repaired copy of a live model; None for a file.
        left: the examination of what is repaired.
        proof: what shows that the safe repairs leave the evaluation output as it is; empty where there are none.
    """

    source: str
    format: str
    outcomes: list[Outcome]
    comparison: Comparison
    tensors: dict[str, StoredTensor]
    checkpoint: Checkpoint | None
    model: "nn.Module | None"
    left: Examination
    proof: str

    def state_dict(self) -> "dict[str, Tensor]":
        """The tensors for ``load_state_dict``: of a file with one model the names that it has there."""
        from batchnorm.doctor.fixes.save import of_the_model
        from batchnorm.doctor.write.torch import as_torch

        if self.model is not None:
            return self.model.state_dict()
        assert self.checkpoint is not None
        return {name: as_torch(tensor) for name, tensor in of_the_model(self.checkpoint).items()}

    def save(self, path: str | Path, *, force: bool = False) -> list[Path]:
        """Write the repaired file; the source stays as it is.

        Args:
            path: ``NAME.safetensors``; any other name is in the format of the source: what ``torch.load`` reads, with
                everything else that the source holds, or the prefix of a TensorFlow checkpoint.
            force: replace a file that exists; never the source, and never a TensorFlow checkpoint.

        Returns:
            The files that were written, whole; after an error there are none.

        Raises:
            DataError: the path is the source, or of a format that cannot be written; a value cannot be read.
            FileExistsError: there is such a file.
            OSError: the disk is full or the folder cannot be written.
        """
        from batchnorm.doctor.fixes.save import save

        return save(self, Path(path), force=force)

    def __str__(self) -> str:
        from batchnorm.doctor.output.repair import render

        return render(self, "text").rstrip("\n")


def wanted_by_code(found: Examination, options: Options) -> dict[str, list[Finding]]:
    """The findings to repair."""
    by_code: dict[str, list[Finding]] = defaultdict(list)
    for finding in found.findings:
        if options.wanted is None or options.wanted(finding):
            by_code[finding.code].append(finding)
    return by_code


def lost_parameters(finding: Finding) -> list[str]:
    """Weight and bias, if they are missing."""
    missing = finding.measured.get("missing", [])
    return [name for name in missing if name in ("weight", "bias", "gamma", "beta")]


def outcome_of(finding: Finding, measured: Measured | None, why: str) -> Outcome:
    """Of a finding whose remedy is new statistics."""
    if not finding.layer:
        return left(finding)
    if lost := lost_parameters(finding):
        return refused(finding, f"{' and '.join(lost)} cannot be measured: take another checkpoint")
    if measured is None or finding.layer in measured.problems:
        return refused(finding, why if measured is None else measured.problems[finding.layer])
    return fixed(finding, measured.how[finding.layer], safe=False)


def settled(outcomes: list[Outcome], before: Examination, after: Examination) -> list[Outcome]:
    """In the order of the findings; what is still found is not called fixed, and what is gone is not called left."""
    still = {(finding.code, finding.layer) for finding in after.findings}
    places = {(finding.code, finding.layer): index for index, finding in enumerate(before.findings)}
    checked = []
    for each in outcomes:
        found = (each.code, each.layer) in still
        if each.action is Action.FIXED and found:
            each = replace(each, action=Action.REFUSED, what=f"{each.what}, but it is still found")
        elif each.action is Action.LEFT and not found:
            each = replace(each, action=Action.FIXED, what="gone with the other repairs")
        checked.append(each)
    return sorted(checked, key=lambda each: places.get((each.code, each.layer), len(places)))
