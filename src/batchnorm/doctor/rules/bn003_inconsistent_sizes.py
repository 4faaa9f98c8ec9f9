"""# BN003: inconsistent-sizes

## What it finds
The container contradicts itself: a tensor's bytes are not as many as its shape and type need, or lie outside the file
or in another tensor; a name stands twice; a member is compressed, encrypted, or has a path that leads out of the
archive. A compressed member is a warning, everything else an error.

## Why it is bad
Programs disagree on what such a file holds: one loads the first of two members of the same name, another the last. A
compressed member of 66 KB can fill 64 MB, and a claimed shape can ask for any amount of memory.

## How it is found
The directory of the archive or the header of the safetensors file is compared with itself, with the size of the file
and with the tensors; values are not needed.

## Evidence
`torch.save` stores members uncompressed and each once, with exactly the bytes of one storage; the safetensors format
requires ranges that cover the data without gaps and overlaps.

## Remedy
Fetch the file again, or ask its author for one written by `torch.save` or `safetensors`. A compressed archive that
you trust: load it and save it again. Values that contradict their shape are never read; layers that need them are
left out.

## False positives
Files that were unpacked and packed again with a zip program are compressed: harmless, and therefore a warning.
TorchScript compresses its source code; that is not reported.

## References
<https://huggingface.co/docs/safetensors/index>; David Fifield, "A better zip bomb", USENIX WOOT 2019.
"""

from collections.abc import Iterator

from batchnorm.doctor.finding import Finding, Severity
from batchnorm.doctor.rule import Needs, Rule, Subject
from batchnorm.doctor.rules.container import report


def check(subject: Subject) -> Iterator[Finding]:
    """One finding for each contradiction."""
    yield from report(
        subject,
        RULE.code,
        RULE.name,
        follows="What is loaded from it depends on the program that loads it.",
        remedy="Fetch the file again, or have it written by torch.save or safetensors.",
    )


RULE = Rule(
    "BN003",
    "inconsistent-sizes",
    Severity.ERROR,
    frozenset({Needs.FILE}),
    "sizes, ranges or names in the container contradict each other, or a member is compressed",
    check,
    container=True,
)
