"""# BN303: weight-decay

## What it finds
An optimizer whose weight decay acts on the weight and bias (gamma and beta) of batch normalization layers.

## Why it is bad
It need not be. Decay pulls gamma to 0, which shrinks what a layer hands on, and beta to 0; it does not limit the
function as decay of a convolution's weight is meant to, since the next layer's weights can make up for it. In networks
with residual branches it weakens branches. Recipes that train fastest leave gamma and beta out; many good ones do not.

## How it arises
`SGD(model.parameters(), weight_decay=...)`, and AdamW, whose weight decay is 0.01 by default.

## Evidence
No threshold: parameters are matched by identity with those of the optimizer's groups. Parameters that require no
gradient do not count: optimizers pass them over, as they have none.

## Remedy
Two groups of parameters: those of batch normalization layers, and biases, with `weight_decay=0`. It changes training,
not the model as it is.

## False positives
Weight decay on gamma and beta that was chosen. It is info in any case.

## References
Goyal et al. 2017 (arXiv:1706.02677), section 5.1, and He et al. 2018 (arXiv:1812.01187), section 3.1, leave them out;
pytorch/pytorch#1402.
"""

from collections.abc import Iterator

from batchnorm.doctor.finding import Finding, Severity
from batchnorm.doctor.rule import Needs, Rule, Subject
from batchnorm.doctor.rules.values import plain


def check(subject: Subject) -> Iterator[Finding]:
    """One finding for the model: what is to be changed is the optimizer."""
    from batchnorm.doctor.live_data import norms

    assert subject.model is not None
    assert subject.optimizer is not None
    decays: dict[int, float] = {}
    for group in subject.optimizer.param_groups:
        decay = float(group.get("weight_decay") or 0.0)
        decays |= {id(parameter): decay for parameter in group["params"] if decay and parameter.requires_grad}
    layers = norms(subject.model)
    decayed = {
        name: max(found)
        for name, layer in layers.items()
        if (found := [decays[id(one)] for one in layer.parameters(recurse=False) if id(one) in decays])
    }
    if decayed:
        names = list(decayed)
        some = ", ".join(name or "(the model)" for name in names[:3]) + ", ..." * (len(names) > 3)
        yield Finding(
            RULE.code,
            RULE.name,
            Severity.INFO,
            "",
            f"Weight decay ({max(decayed.values()):g}) pulls gamma and beta of {len(names)} of {len(layers)} batch "
            f"normalization layers to 0: {some}.",
            measured={"weight_decay": plain(max(decayed.values())), "layers": names},
            threshold={"weight_decay": 0.0},
            remedy="Put their parameters into a group of the optimizer with weight_decay=0.",
            safe=None,
        )


RULE = Rule(
    "BN303",
    "weight-decay",
    Severity.INFO,
    frozenset({Needs.MODEL, Needs.OPTIMIZER}),
    "weight decay acts on gamma and beta",
    check,
    preview=True,
)
