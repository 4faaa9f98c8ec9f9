"""# BN105: odd-counters

## What it finds
In files of torch, `num_batches_tracked` that is absent, impossible (negative, NaN, a fraction), zero although the
running statistics have moved, or unlike that of the other layers.

## Why it is bad
Evaluation does not use the counter. Training with `momentum=None` does: the next batch gets the weight
1 / (counter + 1), so that with a counter of 0 the first batch replaces good statistics. And counters tell what
happened: layers that counted other batches than the rest have statistics of other data.

## How it arises
- Absent: checkpoints of torch before 0.4.1, of frozen layers of other libraries, or converted ones. If the file's own
  metadata says that the layer has a counter, `load_state_dict` fails: that is a warning.
- Zero: a checkpoint without counters was loaded and saved again, or statistics were converted or computed elsewhere.
- A fraction: counters were averaged, as by moving averages of whole state dicts.
- Unequal: lower in layers that were frozen for a while, added later, or skipped in some steps (stochastic depth, a
  head that is not always used); a multiple of the others' in layers that are called several times per step. Exactly
  twice is BN106's.

## Evidence
No threshold. The reference is the counter that more than half of the layers of a state dict have; without one, a
single finding gives the range.

## Remedy
A missing counter can be added, with the number of training steps if it is known: safe, since evaluation does not use
it. Unequal counters need no repair; they say where to look.

## False positives
All of the causes above can be intended: information, unless the file contradicts itself.

## References
pytorch/pytorch#8430 and #12528 (keys that are missing or unexpected); the documentation of
`torch.nn.BatchNorm2d` on `momentum=None`.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence

from batchnorm.doctor.checkpoint import STATISTICS, Layer
from batchnorm.doctor.finding import Finding, Severity
from batchnorm.doctor.rule import Needs, Rule, Subject
from batchnorm.doctor.rules.bn106_doubled_counter import doubled
from batchnorm.doctor.rules.values import are_initial, counts_of, plain, statistics_of, together

REMEDY = "Add num_batches_tracked, with the number of training steps if it is known; evaluation does not use it."
REPLACED = "With momentum=None the first batch of further training replaces the statistics."


def check(subject: Subject) -> Iterator[Finding]:
    """One finding for each layer, or one for the file if it is the same in all of them."""
    for group in together(subject):
        layers = [layer for layer in group if layer.framework == "torch" and layer.has(*STATISTICS)]
        counts = counts_of(layers)
        if subject.model is None:
            yield from absent([layer for layer in layers if layer.path not in counts], len(layers))
        yield from impossible(counts)
        yield from zero([layer for layer in layers if counts.get(layer.path) == 0], len(layers))
        twice = doubled(layers)
        yield from unequal({path: count for path, count in counts.items() if is_count(count) and path not in twice})


def absent(layers: Sequence[Layer], of: int) -> Iterator[Finding]:
    """Where the metadata of the file promise a counter, loading fails."""
    promised = [layer for layer in layers if "num_batches_tracked" in layer.expected]
    for layer in promised:
        message = "num_batches_tracked is absent, although the file's metadata have its version of the layer: "
        yield note(layer.path, Severity.WARNING, f"{message}load_state_dict fails with strict=True.", safe=True)
    rest = [layer for layer in layers if "num_batches_tracked" not in layer.expected]
    yield from for_all(rest, of, "num_batches_tracked is absent", f"{REPLACED} Frozen layers have none, either.")


def zero(layers: Sequence[Layer], of: int) -> Iterator[Finding]:
    """No batch was counted, but something moved the statistics."""
    moved = [layer for layer in layers if (found := statistics_of(layer)) and not are_initial(*found)]
    yield from for_all(moved, of, "num_batches_tracked is 0, but the statistics have moved", REPLACED)


def for_all(layers: Sequence[Layer], of: int, what: str, follows: str) -> Iterator[Finding]:
    if len(layers) == of > 1:
        yield note("", Severity.INFO, f"In all {of} layers {what}. {follows}", {"layers": of}, safe=True)
    else:
        for layer in layers:
            yield note(layer.path, Severity.INFO, f"{what}. {follows}", safe=True)


def impossible(counts: dict[str, float]) -> Iterator[Finding]:
    for path, count in counts.items():
        if not math.isfinite(count) or count < 0:
            message = f"num_batches_tracked is {count:g}, which no count can be."
            yield note(path, Severity.WARNING, message, {"num_batches_tracked": plain(count)}, safe=True)
        elif count % 1:
            message = f"num_batches_tracked is {count:g}: counters were averaged, and perhaps the statistics with them."
            yield note(path, Severity.INFO, message, {"num_batches_tracked": plain(count)}, safe=True)


def is_count(count: float) -> bool:
    return count > 0 and count % 1 == 0


def unequal(counts: dict[str, float]) -> Iterator[Finding]:
    """Against the count that most layers have."""
    if len(set(counts.values())) < 2:
        return
    usual, layers = Counter(counts.values()).most_common(1)[0]
    if 2 * layers <= len(counts):
        least, most = min(counts.values()), max(counts.values())
        message = f"Counters of {len(counts)} layers range from {least:,.0f} to {most:,.0f} without a usual one: "
        measured = {"least": plain(least), "most": plain(most)}
        yield note("", Severity.INFO, f"{message}their statistics are of different batches.", measured)
        return
    for path, count in counts.items():
        if count != usual:
            message = f"{count:,.0f} batches were counted, in {layers} other layers {usual:,.0f}: {why(count, usual)}."
            measured = {"num_batches_tracked": plain(count), "of_most_layers": plain(usual)}
            yield note(path, Severity.INFO, message, measured)


def why(count: float, usual: float) -> str:
    if count < usual:
        return f"{100 * (1 - count / usual):.3g}% less; frozen for a while, added later, or skipped in some steps"
    if count % usual == 0:
        return f"{count / usual:g} times as many; called so often per step, its statistics are a mix of its inputs"
    return f"{100 * (count / usual - 1):.3g}% more; trained before, or called more often than the others"


def note(
    path: str, severity: Severity, message: str, measured: dict[str, float | None] | None = None, *, safe: bool = False
) -> Finding:
    remedy = REMEDY if safe else "None needed; see whether the cause is intended."
    return Finding(RULE.code, RULE.name, severity, path, message, measured or {}, {}, remedy, safe or None)


RULE = Rule(
    "BN105",
    "odd-counters",
    Severity.WARNING,
    frozenset({Needs.FILE}),
    "num_batches_tracked is absent, impossible, 0 with statistics that moved, or unlike that of other layers",
    check,
)
