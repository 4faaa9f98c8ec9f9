"""# BN005: unfit-names

## What it finds
Names of tensors or members have characters that do not print (control characters, escape sequences of terminals,
marks that turn the direction of text, halves of surrogate pairs), markup such as `<script`, or an unusual length.

## Why it is bad
Names of layers are printed by training logs, dashboards and model cards. A name with an escape sequence rewrites the
terminal, a name with markup runs in a page that does not escape it, and a name of megabytes fills logs. A name above
1024 characters is not listed at all: that is an error, the others are warnings.

## How it is found
By `str.isprintable`, by a few patterns of HTML and Markdown, and by a length above 256.

## Evidence
State dicts accept any string as a key, and `torch.nn.ModuleDict` any without a dot.

## Remedy
Rename the keys and save the file again: values stay as they are. The doctor escapes names wherever it shows them.

## False positives
Names with spaces of other scripts than Latin count as not printable, and so does a name of a lambda, `<lambda>`, as
markup: harmless, but nothing that a module can be called in code.

## References
CWE-150 (escape sequences), CWE-79 (markup in pages).
"""

from collections.abc import Iterator

from batchnorm.doctor.finding import Finding, Severity
from batchnorm.doctor.rule import Needs, Rule, Subject
from batchnorm.doctor.rules.container import report


def check(subject: Subject) -> Iterator[Finding]:
    """One finding for each name."""
    yield from report(
        subject,
        RULE.code,
        RULE.name,
        follows="Programs that show it as it is can be misled.",
        remedy="Rename the key and save the file again.",
    )


RULE = Rule(
    "BN005",
    "unfit-names",
    Severity.ERROR,
    frozenset({Needs.FILE}),
    "a name has characters that do not print, markup, or an unusual length",
    check,
    container=True,
)
