"""Which implementation serves a call."""

from typing import NamedTuple

from batchnorm._ops.batch_norm import seen_through


class Choice(NamedTuple):
    """Which implementation serves a call, and why."""

    implementation: str
    reason: str


REQUESTED = {
    "aten": Choice("aten", "implementation='aten' was asked for"),
    "reference": Choice("reference", "implementation='reference' was asked for"),
}
SEEN_THROUGH = Choice("reference", "a compiler, an exporter or torch.func must see plain operations")
DEFAULT = Choice("aten", "torch's own kernel serves every device")
IMPLEMENTATIONS = ("auto", *REQUESTED)


def choose(implementation: str, training: bool) -> Choice:
    """Choose the implementation of a call. A request by name never falls back to another."""
    if implementation != "auto":
        return REQUESTED[check_implementation(implementation)]
    # torch.batch_norm in evaluation mode is one operation that every exporter and transform knows
    return SEEN_THROUGH if training and seen_through() else DEFAULT


def check_implementation(implementation: str) -> str:
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"unknown implementation {implementation!r}: expected one of {', '.join(IMPLEMENTATIONS)}")
    return implementation
