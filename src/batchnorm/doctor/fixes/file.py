"""Repairs a checkpoint or a state dict: new values for its tensors."""

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING

from batchnorm.doctor.changes import compare
from batchnorm.doctor.checkpoint import Checkpoint
from batchnorm.doctor.examine import Examination, chosen_rules, examine, examine_subject, in_order
from batchnorm.doctor.finding import Finding
from batchnorm.doctor.fixes.outcome import Action, Outcome, Values, left, with_values
from batchnorm.doctor.fixes.result import (
    MEASURED,
    UNMEASURED,
    UNSAFE,
    Options,
    Repair,
    lost_parameters,
    outcome_of,
    settled,
    wanted_by_code,
)
from batchnorm.doctor.fixes.statistics import given, load_into, measure, with_layers_of
from batchnorm.doctor.fixes.tensors import convert_eps, count, upcast
from batchnorm.doctor.rule import Subject

if TYPE_CHECKING:
    from torch import nn

OF_TORCH = ("torch", "safetensors", "state dict")


def repair_checkpoint(source: Checkpoint, model: "nn.Module | None", options: Options) -> Repair:
    """A file or a state dict."""
    if options.loader is not None and model is None:
        raise TypeError("a loader needs a model= that it is the input of")
    if model is not None and source.format in OF_TORCH:
        source = with_layers_of(model, source)
    found = examined(source, model, broken_in(findings_of(source)), options)
    by_code = wanted_by_code(found, options)
    broken = broken_in([finding for code in MEASURED for finding in by_code[code]])
    outcomes: list[Outcome] = []
    work, proof = source, ""
    narrow = upcast(source.layers, [finding for finding in by_code.pop("BN107", []) if finding.layer])
    counters = count(source.layers, by_code.pop("BN105", []), options.batches)
    for result in (narrow, counters):
        work = with_values(work, result.values)
        outcomes += result.outcomes
    if narrow.values or counters.values:
        proof = shown_by_running(source, work, model, broken, options)
    if options.eps_to is not None or options.counts:
        work, converted = with_conventions(work, broken, options)
        outcomes += converted
    wanted = [finding for code in MEASURED for finding in by_code.pop(code, [])]
    values, measured = new_statistics(work, wanted, model, options)
    work = with_values(work, values)
    outcomes += measured + [left(finding) for findings in by_code.values() for finding in findings]
    after = examined(work, model, broken - values.keys(), options)
    return Repair(
        source.source, source.format, settled(outcomes, found, after), compare(source.tensors, work.tensors),
        work.tensors, work, None, after, proof,
    )  # fmt: skip


def findings_of(source: Checkpoint) -> list[Finding]:
    """Of the file alone, about statistics, whatever was selected: what is broken cannot be loaded as it is."""
    rules = [rule for rule in chosen_rules((), ()) if rule.code in MEASURED]
    return examine_subject(Subject(source.source, source.layers, source), rules).findings


def broken_in(findings: Iterable[Finding]) -> set[str]:
    """Layers whose statistics cannot be used."""
    return {finding.layer for finding in findings if finding.code in MEASURED and finding.layer}


def examined(source: Checkpoint, model: "nn.Module | None", broken: set[str], options: Options) -> Examination:
    """With a model, rules that need one look at a copy with the state of the file."""
    rules = chosen_rules(options.select, options.ignore)
    found = examine_subject(Subject(source.source, source.layers, source), rules)
    if model is None or not found.not_run or source.format not in OF_TORCH:
        return found
    loaded = load_into(model, source, broken)
    waiting = [rule.code for rule in found.not_run]
    more = examine(loaded.model, options.loader, call=options.call, select=waiting)
    theirs = [dataclasses.replace(each, layer=f"{loaded.prefix}{each.layer}") for each in more.findings if each.layer]
    theirs += [each for each in more.findings if not each.layer]
    # what has no statistics of its own says nothing about them
    theirs = [each for each in theirs if not (each.code in MEASURED and each.layer in broken)]
    findings = in_order([*found.findings, *theirs], found.layers)
    return dataclasses.replace(found, findings=findings, not_run=more.not_run)


def shown_by_running(
    before: Checkpoint, after: Checkpoint, model: "nn.Module | None", broken: set[str], options: Options
) -> str:
    """Why the safe repairs leave the evaluation output as it is.

    Raises:
        RuntimeError: they do not.
    """
    if model is None or options.loader is None or before.format not in OF_TORCH:
        return "by arithmetic: the statistics have the same values, and evaluation does not use counters"
    from batchnorm.doctor.fixes.model import difference

    models = [load_into(model, each, broken).model for each in (before, after)]
    found = difference(models[0], models[1], options.loader, options.call)
    if found.worst > found.bound:
        raise RuntimeError(f"safe repairs changed the evaluation output by {found.worst:.2g}: please report this")
    return str(found)


def with_conventions(work: Checkpoint, broken: set[str], options: Options) -> tuple[Checkpoint, list[Outcome]]:
    """Variances for another eps, in layers that are not measured anew."""
    layers = [layer for layer in work.layers if layer.path not in broken]
    values, outcomes = convert_eps(layers, options.eps_from, options.eps_to, options.counts)
    if not options.unsafe:
        return work, [
            dataclasses.replace(each, action=Action.REFUSED, what=UNSAFE, safe=None)
            if each.action is Action.FIXED
            else each
            for each in outcomes
        ]
    work = with_values(work, values)
    if options.eps_to is not None:
        told = {path: {"eps": options.eps_to} for path in values}
        layers = [dataclasses.replace(layer, **told.get(layer.path, {})) for layer in work.layers]
        work = dataclasses.replace(work, layers=layers)
    return work, outcomes


def new_statistics(
    work: Checkpoint, findings: list[Finding], model: "nn.Module | None", options: Options
) -> tuple[Values, list[Outcome]]:
    """For layers whose statistics are broken."""
    able = {finding.layer for finding in findings if finding.layer and not lost_parameters(finding)}
    if not able or not options.unsafe:
        return {}, [outcome_of(finding, None, UNSAFE) for finding in findings]
    if options.statistics is not None:
        measured = given(work.layers, sorted(able), options.statistics)
    elif model is None or options.loader is None:
        return {}, [outcome_of(finding, None, UNMEASURED) for finding in findings]
    elif work.format not in OF_TORCH:
        why = f"a {work.format} file does not fit a model of torch; {UNMEASURED}"
        return {}, [outcome_of(finding, None, why) for finding in findings]
    else:
        measured = measure(load_into(model, work, able), order(work, able), options.loader, options.call)
    return measured.values, [outcome_of(finding, measured, "") for finding in findings]


def order(work: Checkpoint, paths: set[str]) -> list[str]:
    return [layer.path for layer in work.layers if layer.path in paths]
