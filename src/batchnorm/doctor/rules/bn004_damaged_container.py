"""# BN004: damaged-container

## What it finds
The file is cut off, a part of it is missing, or it is in a format that torch has left behind: a row of pickles
(before torch 1.6; a warning, all tensors are read), the tar archive of the first versions of torch or a pickle of
something else (errors: their tensors are not listed).

## Why it is bad
A file that was cut off does not load at all, with messages such as "PytorchStreamReader failed reading zip archive:
failed finding central directory". Old formats need a full unpickler to be loaded, as `weights_only=True` does not
serve all of them, and have no checksums.

## How it is found
By the missing end of the archive, the missing files of an index, or the first bytes of the file. From an archive
without its end, the tensors whose bytes are whole are still read.

## Evidence
Each of these is produced in the tests: by cutting a file of `torch.save`, and by `torch.save(...,
_use_new_zipfile_serialization=False)`.

## Remedy
Cut off: fetch the file again and compare its size. Old format: load it once and save it with `torch.save` or
`safetensors`; that changes no value, so evaluation stays as it is.

## False positives
None known.

## References
<https://docs.pytorch.org/docs/stable/generated/torch.save.html>
"""

from collections.abc import Iterator

from batchnorm.doctor.finding import Finding, Severity
from batchnorm.doctor.rule import Needs, Rule, Subject
from batchnorm.doctor.rules.container import report


def check(subject: Subject) -> Iterator[Finding]:
    """One finding for each part."""
    yield from report(
        subject,
        RULE.code,
        RULE.name,
        follows="Only what can still be listed was examined.",
        remedy="If it is cut off, fetch it again; if it is old, load it and save it with torch.save or safetensors.",
    )


RULE = Rule(
    "BN004",
    "damaged-container",
    Severity.ERROR,
    frozenset({Needs.FILE}),
    "the file is cut off, a part is missing, or its format is one that torch has left behind",
    check,
    container=True,
)
