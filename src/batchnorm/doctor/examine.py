"""Runs the rules of the catalogue on a file, a state dict or a live model."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchnorm.doctor.catalogue import RULES
from batchnorm.doctor.checkpoint import Layer
from batchnorm.doctor.finding import Finding
from batchnorm.doctor.read.open import read
from batchnorm.doctor.rule import Rule, Subject

if TYPE_CHECKING:
    from torch import nn, optim


@dataclass(frozen=True)
class NotRun:
    """A rule that could not run.

    Attributes:
        code: of the rule.
        name: of the rule.
        needs: what was not given: "file", "model", "data", "optimizer", "ranks".
    """

    code: str
    name: str
    needs: list[str]


@dataclass(frozen=True)
class Examination:
    """What the rules found.

    Attributes:
        source: the path, or the class of the model.
        layers: BN layers in the order of the file or model.
        findings: the gravest first, then by code, then in the order of the layers.
        not_run: rules that need something which was not given, by code.
    """

    source: str
    layers: list[Layer]
    findings: list[Finding]
    not_run: list[NotRun]


def examine(
    target: "str | Path | nn.Module | Mapping[str, Any]",
    loader: Iterable[Any] | None = None,
    optimizer: "optim.Optimizer | None" = None,
    *,
    call: "Callable[[nn.Module, Any], Any] | None" = None,
    select: str | Iterable[str] = (),
    ignore: str | Iterable[str] = (),
) -> Examination:
    """Find what is wrong with the batch normalization layers of a checkpoint or a model.

    Nothing of a file is executed. A live model is as before afterwards. What can be found grows with what is given:
    rules that need more are listed as not run.

    Args:
        target: path of a checkpoint, a state dict, or a model.
        loader: for a model: yields inputs, or tuples whose first element is the input, or whatever ``call`` takes.
        optimizer: that trains the model.
        call: runs the model on an item, where it takes more than an input.
        select: codes or beginnings of codes, such as "BN1"; only these rules run.
        ignore: codes or beginnings of codes that do not run.

    Returns:
        :class:`Examination`.

    Raises:
        DataError: the file cannot be read; the message says what it is and what to try.
        MissingExtraError: the file's format needs an optional dependency.
        TypeError: the target is none of these; a loader or optimizer without a model.
        ValueError: no rule's code begins so; a loader that can be iterated only once; a layer without values.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        >>> state = {name: value for name, value in model.state_dict().items() if "running" not in name}
        >>> for finding in examine(state).findings:
        ...     print(finding.code, finding.severity, finding.layer)
        BN100 error 1
    """
    rules = chosen_rules(select, ignore)
    subject = subject_of(target)
    if subject.model is None and (loader is not None or optimizer is not None):
        raise TypeError(f"a loader or an optimizer needs a model, but the target is a {type(target).__name__}")
    # iter(loader) is loader would draw a random number of a DataLoader
    if isinstance(loader, Iterator):
        raise ValueError("the loader can be iterated only once, but rules iterate it several times: pass a list")
    subject.loader, subject.optimizer, subject.call = loader, optimizer, call
    return examine_subject(subject, rules)


def examine_subject(subject: Subject, rules: Iterable[Rule]) -> Examination:
    """What these rules find."""
    findings: list[Finding] = []
    not_run = []
    for rule in rules:
        if lacking := lacking_for(rule, subject):
            not_run.append(NotRun(rule.code, rule.name, lacking))
        else:
            findings.extend(rule.check(subject))
    return Examination(subject.source, subject.layers, in_order(findings, subject.layers), not_run)


def chosen_rules(select: str | Iterable[str], ignore: str | Iterable[str]) -> list[Rule]:
    """Rules whose code begins with something selected, if anything is, and with nothing ignored.

    Raises:
        ValueError: a selection that no code begins with.
    """
    wanted, unwanted = ([part] if isinstance(part, str) else list(part) for part in (select, ignore))
    for prefix in (*wanted, *unwanted):
        if not prefix or not any(rule.code.startswith(prefix) for rule in RULES):
            raise ValueError(f"no rule's code begins with {prefix!r}; codes are {RULES[0].code} to {RULES[-1].code}")
    return [
        rule
        for rule in RULES
        if (not wanted or rule.code.startswith(tuple(wanted))) and not rule.code.startswith(tuple(unwanted))
    ]


def subject_of(target: Any) -> Subject:
    """What rules look at, without a loader yet; torch is imported only for what lives in memory."""
    if isinstance(target, str | os.PathLike):
        checkpoint = read(Path(target))
        return Subject(str(target), checkpoint.layers, checkpoint)
    from torch import nn

    from batchnorm.doctor.live_layers import live_layers, read_state

    # what torch.export made, by name: to import torch.export takes long
    if type(target).__name__ == "ExportedProgram":
        target = target.module()
    if isinstance(target, nn.Module):
        return Subject(type(target).__name__, live_layers(target), model=target)
    if isinstance(target, Mapping):
        checkpoint = read_state(target)
        return Subject(checkpoint.source, checkpoint.layers, checkpoint)
    raise TypeError(f"expected a path, a model or a state dict, got {type(target).__name__}")


def lacking_for(rule: Rule, subject: Subject) -> list[str]:
    """What the rule needs and the subject has not, sorted."""
    lacking = {need.value for need in rule.needs - subject.given}
    if rule.container and (subject.checkpoint is None or subject.checkpoint.format == "state dict"):
        lacking.add("file")
    return sorted(lacking)


def in_order(findings: Iterable[Finding], layers: list[Layer]) -> list[Finding]:
    """By severity, code and layer: first what concerns everything, last what is no BN layer; else as rules found it."""
    places = {"": -1, **{layer.path: index for index, layer in enumerate(layers)}}
    return sorted(
        findings, key=lambda finding: (finding.severity.rank, finding.code, places.get(finding.layer, len(places)))
    )
