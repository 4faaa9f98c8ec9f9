"""# BN001: unsafe-globals

## What it finds
The pickle in the file names classes or functions that `torch.load(path, weights_only=True)` refuses. The finding
lists them. It is an error if one of them is known from attacks (`os.system`, `builtins.eval`, `subprocess.Popen`,
...), else a warning.

## Why it is bad
To read such a file one must turn `weights_only` off, and then reading the file runs whatever code it names.
`weights_only=True` has been the default since torch 2.6, so everybody who loads the file meets an error first.

## How it is found
The pickle is read, not run: nothing is imported and nothing called. Names are compared with those that torch 2.13
accepts.

## Evidence
Python's documentation warns that unpickling data of unknown origin can run arbitrary code, and torch's documentation
of `torch.load` says the same of files loaded with `weights_only=False`.

## Remedy
Ask the author for a state dict: `torch.save(model.state_dict(), path)` or a `.safetensors` file. If you trust the
file, load it once and save the state dict yourself. Tensors and BN layers are listed and examined all the same. There
is no fix that could be applied to the file itself.

## False positives
None: the names are in the file. A model that was saved whole by an honest author has them too: that is a warning. A
name that is known from attacks can be harmless in rare cases (a hyperparameter that holds a function).

## References
<https://docs.python.org/3/library/pickle.html>, <https://docs.pytorch.org/docs/stable/notes/serialization.html>
"""

from collections.abc import Iterator

from batchnorm.doctor.finding import Finding, Severity
from batchnorm.doctor.read.source import shown
from batchnorm.doctor.rule import Needs, Rule, Subject
from batchnorm.doctor.rules.container import faults_of

LISTED = 5


def check(subject: Subject) -> Iterator[Finding]:
    """One finding for all names of the file, those known from attacks first."""
    faults = sorted(faults_of(subject, "BN001"), key=lambda fault: not fault["grave"])
    if not faults:
        return
    names = [fault["where"] for fault in faults]
    count = len(names) + faults[-1].get("more", 0)
    running = sum(fault["grave"] for fault in faults)
    listed = ", ".join(shown(name) for name in names[:LISTED]) + (", ..." if count > LISTED else "")
    attack = f"; {running} of them are known from attacks" if running else ""
    yield Finding(
        RULE.code,
        RULE.name,
        Severity.ERROR if running else Severity.WARNING,
        "",
        f"The file needs {count} names that torch.load(weights_only=True) refuses{attack}: {listed}. "
        "Loading it without weights_only runs code that the file chooses.",
        measured={"globals": names, "count": count, "known_from_attacks": running},
        threshold={"count": 0},
        remedy="Ask for a state dict or a .safetensors file; load this one only if you trust its author.",
    )


RULE = Rule(
    "BN001",
    "unsafe-globals",
    Severity.ERROR,
    frozenset({Needs.FILE}),
    "the file names classes or functions that torch.load(weights_only=True) refuses",
    check,
    container=True,
)
