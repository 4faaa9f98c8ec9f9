"""What the doctor is measured on: something that is made, and what it should be found to be."""

from collections.abc import Callable
from typing import Any, NamedTuple


class Case(NamedTuple):
    """Something to examine.

    Attributes:
        make: its contents; each corpus says what that is.
        codes: of all findings that it should lead to.
        missed: those of them that it does not lead to.
    """

    make: Callable[..., Any]
    codes: frozenset[str]
    missed: frozenset[str] = frozenset()


def fault(make: Callable[..., Any], *codes: str) -> Case:
    return Case(make, frozenset(codes))


def missed(make: Callable[..., Any], *codes: str, found: tuple[str, ...] = ()) -> Case:
    """A fault that rules should find and do not; others may find something."""
    return Case(make, frozenset((*codes, *found)), frozenset(codes))


def healthy(make: Callable[..., Any], *codes: str) -> Case:
    """``codes``: of what is only information, and right."""
    return Case(make, frozenset(codes))
