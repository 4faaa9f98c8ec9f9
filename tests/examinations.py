"""Examinations made by hand, one of them of a file whose names attack whatever shows them."""

from typing import Any

import numpy as np

from batchnorm.doctor.checkpoint import ROLES, Layer, StoredTensor
from batchnorm.doctor.examine import Examination, NotRun
from batchnorm.doctor.finding import Finding, Severity

BLOCKS = [f"layer{i}.{j}.bn{k}" for i in (1, 2) for j in range(3) for k in (1, 2)]
HOSTILE = [
    "<img src=x onerror=\"document.title='owned'\">",
    "</script><script>document.title='owned'</script>",
    "</style></title><svg onload=\"document.title='owned'\">",
    "{{ 7 * 7 }}{% raw %}",
    "a\x1b[2J\x1b]0;owned\x07b",
    "gnp.\u202eexe\u2066",
    "nul\0byte",
    "two\nlines\r\n::error::owned\u2028three",
    "::add-mask::token",
    "##[add-mask]##vso[task.setvariable]##teamcity[x]",
    "%0A::warning::owned",
    "`code` ``more`` | cell \\| \\",
    "[link](javascript:alert(1)) ![i](https://example.com/x.png) <https://example.com> www.example.com",
    "@everybody _em_ *strong* ~~gone~~ &lt;b&gt; $x$ # head",
    "half \ud800 of a pair",
    "[bold red]rich[/bold red] :smile:",
    "n" * 100_000,
    " ",
]


def layer(path: str, *roles: str, features: int = 4) -> Layer:
    """A layer with these tensors; all of them if none is named."""
    tensors = {
        role: StoredTensor(f"{path}.{role}", (features,), "float32", lambda: np.ones(features))
        for role in roles or ROLES
    }
    return Layer(path, "torch", tensors, frozenset(tensors), features)


def finding(code: str, path: str, severity: Severity = Severity.ERROR, **others: Any) -> Finding:
    names = {"BN100": "missing-statistics", "BN101": "initial-statistics", "BN107": "narrow-statistics"}
    texts = {"message": "Evaluation is wrong.", "remedy": "Measure them again.", "safe": False}
    return Finding(code, names.get(code, "some-rule"), severity, path, **{**texts, **others})


def usual() -> Examination:
    """A network of which all blocks lost their statistics, one layer is narrow, and two rules could not run."""
    findings = [
        *(finding("BN100", path, measured={"missing": ["running_mean", "running_var"]}) for path in BLOCKS),
        finding("BN107", "bn1", Severity.WARNING, message="0.1 % off.", remedy="Upcast.", safe=True),
        finding("BN104", "bn1", Severity.INFO, message="Constant.", remedy="", safe=None, confidence="likely"),
    ]
    layers = [layer("bn1"), *(layer(path, "weight", "bias") for path in BLOCKS)]
    not_run = [NotRun("BN201", "dead-bias", ["model"]), NotRun("BN207", "gap", ["data", "model"])]
    return Examination("models/net.pt", layers, findings, not_run)


def healthy() -> Examination:
    return Examination("net.pt", [layer("bn1")], [], [])


def numbers() -> Examination:
    """Measured values that JSON has no words for, and findings that differ from layer to layer."""
    strange = {
        "share": float("nan"),
        "limits": [float("-inf"), 1e300, 3],
        "trained": True,
        "none": None,
        "count": 12345,
    }
    findings = [
        finding("BN101", "", message="All of it.", measured=strange, threshold={"share": 0.5}),
        *(finding("BN101", f"bn{i}", message=f"{i} sd off.") for i in range(30)),
    ]
    return Examination("net.pt", [], findings, [])


def hostile() -> Examination:
    """Every hostile text as source, as name, in messages and among what was measured."""
    findings = [
        finding("BN100", name, message=f"In {name!s} it is wrong: {name}", remedy=name, measured={name: [name]})
        for name in HOSTILE
    ]
    layers = [layer(name, features=2) for name in HOSTILE]
    return Examination("".join(name[:200] for name in HOSTILE), layers, findings, [])


def whole_file(name: str) -> Examination:
    return Examination(name, [], [finding("BN001", "", message=f"The file needs {name}.", remedy=name)], [])
