"""# BN100: missing-statistics

## What it finds
A batch normalization layer whose weight and bias (gamma and beta) are in the file, while its running mean, its running
variance or both are not. Where the graph or the configuration of the file says what a layer should have, everything
that is not there counts.

## Why it is bad
Evaluation subtracts the running mean and divides by the running standard deviation. A program that loads such a file
leniently keeps what a new layer has, mean 0 and variance 1, and then the layer does not normalize: its output is its
raw input times weight plus bias. Nothing fails; predictions are wrong. Accuracy in training mode, by the statistics of
batches, stays as it was, which makes the fault hard to see.

## How it arises
- TensorFlow: `tf.train.Saver(var_list=tf.trainable_variables())`: moving averages are variables, but none that train.
- PyTorch: saving `dict(model.named_parameters())`, or the parameters of an optimizer or of a moving average; running
  statistics are buffers. Then `load_state_dict(..., strict=False)`, which does not complain.
- A layer with `track_running_stats=False` has no running statistics and needs none.

## Evidence
No threshold. A tensor with statistics' names, a graph or a configuration makes a layer certain: error. Where only
names and shapes suggest batch normalization, it is an error with confidence "likely" if no layer of the file has
statistics, and a warning with confidence "possible" if others have them, or if the metadata that `state_dict()` leaves
in a file name the layer: then it may have been built without statistics.

## Remedy
Save again from the program that trained the model: `model.state_dict()`, or `tf.train.Saver()` without `var_list`. If
it is gone, the statistics can be measured on training data with the weights as they are:
`batchnorm.recalibrate(model, loader)`, or for the file `batchnorm doctor FILE --fix --unsafe-fixes`, which takes those
of TensorFlow and Keras from a function of yours. That is not safe in the sense of leaving outputs as they are: it is
meant to change them.

## False positives
A model that was built with `track_running_stats=False` (MAML, adaptation at test time), if its names say batch
normalization: nothing in a plain dict or in safetensors tells the two apart. Names such as `bn1` for a layer that is
none.

## References
Ioffe and Szegedy 2015, algorithm 2 (evaluation uses population statistics). Threads where people met it:
zhengyang-wang/Deeplab-v2--ResNet-101--Tensorflow#46, tensorflow/models#6313, pytorch/pytorch#12528.
"""

from collections.abc import Iterator

from batchnorm.doctor.checkpoint import ROLES, Layer
from batchnorm.doctor.finding import Finding, Severity
from batchnorm.doctor.rule import Needs, Rule, Subject
from batchnorm.doctor.rules.values import MEASURING, called, gamma_of, listed, span, together

REMEDIES = {
    "torch": "Save model.state_dict() again where the model was trained",
    "tensorflow": "Save again with tf.train.Saver() without var_list where the model was trained",
    "keras": "Save the whole model again where it was trained",
}
NEW = {"weight": 1, "bias": 0, "running_mean": 0, "running_var": 1}


def check(subject: Subject) -> Iterator[Finding]:
    """One finding for each layer."""
    versions = subject.checkpoint.facts.get("versions", {}) if subject.checkpoint is not None else {}
    for layers in together(subject):
        none_has = all(missing(layer) for layer in layers)
        for layer in layers:
            if roles := missing(layer):
                # torch wrote down all that the layer has, or its statistics were taken out later
                likely = none_has and layer.path not in versions
                severity = Severity.ERROR if layer.sure or likely else Severity.WARNING
                confidence = "certain" if layer.sure else "likely" if likely else "possible"
                yield finding(layer, roles, severity, confidence)


def missing(layer: Layer) -> list[str]:
    """Roles that should be there; a missing counter is BN105's."""
    return [role for role in ROLES[:-1] if role in layer.expected and not layer.has(role)]


def finding(layer: Layer, roles: list[str], severity: Severity, confidence: str) -> Finding:
    names = [called(layer, role) for role in roles]
    verb = "are" if len(names) > 1 else "is"
    if confidence == "certain":
        opening = f"{listed(names)} {verb} missing"
    else:
        opening = f"By its name and shape this is batch normalization, but {listed(names)} {verb} missing"
    return Finding(
        RULE.code,
        RULE.name,
        severity,
        layer.path,
        f"{opening}. {consequence(layer, roles)}",
        measured={"missing": names, "num_features": layer.num_features},
        remedy=f"{REMEDIES[layer.framework]}, or measure them on training data with {MEASURING[layer.framework]}.",
        safe=False,
        confidence=confidence,
    )


def consequence(layer: Layer, roles: list[str]) -> str:
    if not {"running_mean", "running_var"} <= {*roles} or not layer.has("weight"):
        kept = listed(f"{called(layer, role)} {NEW[role]}" for role in roles)
        return f"Loaded leniently, the layer keeps what a new one has: {kept}."
    return (
        f"Loaded without them, it evaluates with mean 0 and variance 1: it does not normalize, but multiplies "
        f"its raw input by {called(layer, 'weight')} ({span(gamma_of(layer))})."
    )


RULE = Rule(
    "BN100",
    "missing-statistics",
    Severity.ERROR,
    frozenset({Needs.FILE}),
    "weight and bias are there, but the running statistics that evaluation needs are not",
    check,
)
