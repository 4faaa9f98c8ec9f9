"""# BN002: checksum-mismatch

## What it finds
The bytes of a member of an archive, or of a tensor of a TensorFlow checkpoint, do not have the checksum (CRC-32,
CRC-32C) that was stored when they were written.

## Why it is bad
Bits changed since then: on a disk, in memory or in transit. `torch.load` does not compare checksums and loads the
changed values without a word; one changed bit in an exponent makes a weight or a variance 10^38 times as large.

## How it is found
The smallest members are summed first, up to 1 GB of them, so running statistics are always among them; `checksums` in
the facts of the file says how many were left. Files that were written without checksums
(`torch.serialization.set_crc32_options(False)`) have zeros in their place and are not compared.

## Evidence
A checkpoint with one flipped bit in `running_var` loads with `torch.load` in torch 2.13 without an error or a
warning; a test of this rule does that.

## Remedy
Fetch the file again, or restore it from its source. There is nothing to repair: the old values are unknown.

## False positives
None known. A program that changes an archive in place without writing the new checksums is one, and should not do
that.

## References
PKWARE, .ZIP File Format Specification, section 4.4.7.
"""

from collections.abc import Iterator

from batchnorm.doctor.finding import Finding, Severity
from batchnorm.doctor.rule import Needs, Rule, Subject
from batchnorm.doctor.rules.container import report


def check(subject: Subject) -> Iterator[Finding]:
    """One finding for each member."""
    is_torch = subject.checkpoint is not None and subject.checkpoint.format == "torch"
    yield from report(
        subject,
        RULE.code,
        RULE.name,
        follows=f"Its bytes changed since it was written{', and torch.load does not notice' if is_torch else ''}.",
        remedy="Fetch the file again from its source.",
    )


RULE = Rule(
    "BN002",
    "checksum-mismatch",
    Severity.ERROR,
    frozenset({Needs.FILE}),
    "a member of the file differs from its checksum, which torch.load does not compare",
    check,
    container=True,
)
