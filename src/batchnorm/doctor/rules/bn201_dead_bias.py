"""# BN201: dead-bias

## What it finds
A linear or convolution layer with a bias whose output goes to a batch normalization layer and nowhere else.

## Why it is bad
Training subtracts the mean of the batch, and with it any constant that was added to a channel: the bias has no effect
on the output and its gradient is zero up to rounding. It costs memory and an addition, is moved by weight decay and
rounding alone, and hides in the running mean what a reader takes for part of the convolution. Beta is the bias that
works.

## How it arises
`bias=True` is the default of `torch.nn.Conv2d` and `torch.nn.Linear`; the paper leaves the bias out.

## Evidence
No threshold: the rule follows the data flow as `batchnorm.fold` does and reports what it proves for training and
evaluation: one use of the value, no dropout or other operation between, the same axis, no forward that asks for its
mode. After `torch.nn.Linear` the axis depends on the shape of the input, so a loader is needed there. Not reported
where the layer is frozen: it subtracts a constant then, and the bias learns.

## Remedy
Take the bias out, `bias=False`, and subtract it from the running mean: `running_mean - bias` gives the same evaluation
output up to rounding, and training is as before. That is safe.

## False positives
None known. A bias that is read elsewhere, by code outside of `forward`, is not seen.

## References
Ioffe and Szegedy 2015, section 3.2: "the bias b can be ignored".
"""

from collections.abc import Iterator

from batchnorm.doctor.finding import Finding, Severity
from batchnorm.doctor.rule import Needs, Rule, Subject
from batchnorm.doctor.rules.values import plain


def check(subject: Subject) -> Iterator[Finding]:
    """One finding for each layer."""
    from batchnorm.doctor.live_data import follows_its_mode
    from batchnorm.doctor.live_flow import flow_of

    assert subject.model is not None
    for dead in flow_of(subject).dead:
        if follows_its_mode(subject.model.get_submodule(dead.layer)):
            yield Finding(
                RULE.code,
                RULE.name,
                Severity.INFO,
                dead.layer,
                f"The bias of {dead.owner or 'the model'!r} before it is dead weight: training subtracts it with the "
                f"mean of the batch, so it gets no gradient (largest value {dead.largest:.3g}).",
                measured={"module": dead.owner, "largest_bias": plain(dead.largest)},
                remedy=f"Build {dead.owner or 'the model'!r} with bias=False and subtract the bias from running_mean.",
                safe=True,
            )


RULE = Rule(
    "BN201",
    "dead-bias",
    Severity.INFO,
    frozenset({Needs.MODEL}),
    "the bias before a layer is subtracted again with the mean",
    check,
    preview=True,
)
