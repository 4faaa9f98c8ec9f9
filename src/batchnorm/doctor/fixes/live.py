"""Repairs a live model, in a copy."""

import copy
import dataclasses

from torch import nn

from batchnorm.doctor.changes import compare
from batchnorm.doctor.examine import examine
from batchnorm.doctor.finding import Finding
from batchnorm.doctor.fixes.model import SAFE, TURNING, difference
from batchnorm.doctor.fixes.outcome import Action, Outcome, left, refused
from batchnorm.doctor.fixes.result import (
    MEASURED,
    UNMEASURED,
    UNSAFE,
    Options,
    Repair,
    outcome_of,
    settled,
    wanted_by_code,
)
from batchnorm.doctor.fixes.statistics import Loaded, measure
from batchnorm.doctor.live_layers import tensors_of


def repair_model(model: nn.Module, options: Options) -> Repair:
    """A live model; every change is done to a copy."""
    found = examine(model, options.loader, call=options.call, select=options.select, ignore=options.ignore)
    by_code = wanted_by_code(found, options)
    work, outcomes, proof = copy.deepcopy(model), [], ""
    for code, fix in SAFE.items():
        if findings := by_code.pop(code, []):
            outcomes += fix(work, findings, options.batches)
    if outcomes:
        work, outcomes, proof = proved(model, work, outcomes, options)
    for code, fix in TURNING.items():
        if findings := by_code.pop(code, []):
            unsafe = options.unsafe
            outcomes += fix(work, findings, options.batches) if unsafe else [refused(each, UNSAFE) for each in findings]
    wanted = [finding for code in MEASURED for finding in by_code.pop(code, [])]
    outcomes += measured_in(work, wanted, options)
    outcomes += [left(finding) for findings in by_code.values() for finding in findings]
    after = examine(work, options.loader, call=options.call, select=options.select, ignore=options.ignore)
    tensors = tensors_of(work)
    return Repair(
        type(model).__name__, "model", settled(outcomes, found, after), compare(tensors_of(model), tensors),
        tensors, None, work, after, proof,
    )  # fmt: skip


def proved(
    model: nn.Module, work: nn.Module, outcomes: list[Outcome], options: Options
) -> tuple[nn.Module, list[Outcome], str]:
    """The copy if it computes what the model does; else another copy, without the safe repairs."""
    if options.loader is None:
        return work, outcomes, "by arithmetic; with a loader both are run and compared"
    found = difference(model, work, options.loader, options.call)
    if found.worst <= found.bound:
        return work, outcomes, str(found)
    why = f"undone: it changed the evaluation output by up to {found.worst:.2g}"
    undone = [dataclasses.replace(each, action=Action.REFUSED, what=why, safe=None) for each in outcomes]
    return copy.deepcopy(model), undone, ""


def measured_in(work: nn.Module, findings: list[Finding], options: Options) -> list[Outcome]:
    """New statistics in the copy, for the layers that need them."""
    paths = sorted({finding.layer for finding in findings if finding.layer})
    if not paths or not options.unsafe or options.loader is None:
        why = UNMEASURED if options.unsafe else UNSAFE
        return [outcome_of(finding, None, why) for finding in findings]
    measured = measure(Loaded(work, ""), paths, options.loader, options.call)
    return [outcome_of(finding, measured, "") for finding in findings]
