"""Which variables are batch normalization, told by a graph or a configuration, or guessed from names.

TensorFlow and Keras call the four gamma, beta, moving_mean and moving_variance; a layer is the variables of one scope.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from batchnorm.doctor.checkpoint import STATISTICS, Layer, StoredTensor
from batchnorm.doctor.read.layers import MOST_FEATURES, Found

# the last part of a variable's name -> role; gamma/Adam, moving_mean/biased and renorm_mean have none
ROLE_NAMES = {
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
    # tensorpack's
    "mean/EMA": "running_mean",
    "variance/EMA": "running_var",
}
FLOATS = frozenset({"float16", "bfloat16", "float32", "float64"})
# scopes that only batch normalization is called by: batch_normalization_3, BatchNorm, bn2a_branch1, conv1_bn, bnorm
CLEAR = re.compile(r"(batch_?norm(alization)?|(^|_)bn(orm)?)(?![a-z])|^bn\d", re.I)
# scopes that may be: norm1, conv_norm
VAGUE = re.compile(r"norm", re.I)
# gamma and beta that belong to something else
OTHER = re.compile(r"(layer|group|instance|rms|weight|spectral|local)_?(response_?)?norm|^[lgi]n\d*$", re.I)
# what optimizers keep per variable, in scopes of their own: Adam/m/batch_normalization/gamma
OPTIMIZERS = re.compile(r"(^|/)(ada\w*|sgd|rmsprop|nadam|ftrl|lamb|lars|lion|momentum|optimizer)(_\d+)?/", re.I)


@dataclass(frozen=True)
class Declared:
    """What a graph or a configuration says about a layer.

    Attributes:
        expected: roles that it has.
        num_features: C, if it says so.
        eps: if it says so.
        momentum: weight of the new batch, if it says so.
    """

    expected: frozenset[str]
    num_features: int | None = None
    eps: float | None = None
    momentum: float | None = None


def split_role(name: str) -> tuple[str, str] | None:
    """Scope and role of a variable's name, if it ends in one.

    Example:
        >>> split_role("encoder/batch_normalization/gamma"), split_role("encoder/batch_normalization/gamma/Adam")
        (('encoder/batch_normalization', 'weight'), None)
    """
    for ending, role in ROLE_NAMES.items():
        if name == ending or name.endswith(f"/{ending}"):
            return name[: -len(ending) - 1], role
    return None


def by_scope(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Scope -> role -> name, of the names that end in a role, in their order."""
    scopes: dict[str, dict[str, str]] = {}
    for name in names:
        if found := split_role(name):
            scopes.setdefault(found[0], {}).setdefault(found[1], name)
    return scopes


def find_layers(
    found: Found,
    variables: Mapping[str, StoredTensor],
    framework: str,
    *,
    declared: Mapping[str, Declared],
    described: Collection[str] = (),
    unreadable: Collection[str] = (),
) -> None:
    """Add the BN layers among variables that are called by their names, then declared ones without any variable.

    Args:
        found: what they are added to.
        variables: by name.
        framework: "tensorflow" or "keras".
        declared: scopes that are known to be BN, with what is known about them.
        described: scopes that a graph knows: those of them that it does not declare are something else.
        unreadable: names of tensors whose values cannot be had.
    """
    scopes = by_scope(variables)
    for scope, names in scopes.items():
        tensors = {role: variables[name] for role, name in names.items()}
        known = declared.get(scope)
        if known is None and scope not in described:
            known = guessed(scope, tensors)
        if known is not None:
            sure = scope in declared or not tensors.keys().isdisjoint(STATISTICS) or is_clear(scope)
            add_layer(found, scope, framework, tensors, known, sure=sure, unreadable=unreadable)
    for scope, known in declared.items():
        if scope not in scopes and known.num_features:
            add_layer(found, scope, framework, {}, known)


def guessed(scope: str, tensors: Mapping[str, StoredTensor]) -> Declared | None:
    """What the names of a scope suggest: every BN layer has statistics, not every one has gamma and beta."""
    last = scope.rpartition("/")[2]
    vague = VAGUE.search(last) and not OTHER.search(last) and {"weight", "bias"} <= tensors.keys()
    called = (is_clear(scope) or vague) and not OPTIMIZERS.search(scope)
    if called or not tensors.keys().isdisjoint(STATISTICS):
        return Declared(frozenset(STATISTICS) | tensors.keys())
    return None


def is_clear(scope: str) -> bool:
    """Whether the last part of a scope says batch normalization and nothing else.

    Example:
        >>> [is_clear(scope) for scope in ("a/batch_normalization_1", "Conv/BatchNorm", "bn2a_branch1", "layer_norm")]
        [True, True, True, False]
    """
    last = scope.rpartition("/")[2]
    return bool(CLEAR.search(last)) and not OTHER.search(last)


def add_layer(
    found: Found,
    path: str,
    framework: str,
    tensors: dict[str, StoredTensor],
    known: Declared,
    *,
    sure: bool = True,
    unreadable: Collection[str] = (),
) -> None:
    """Add a layer, or note why it is none whose values can be read: rules count on vectors of one length."""
    shapes = {tensor.shape for tensor in tensors.values()}
    types = {tensor.dtype for tensor in tensors.values()}
    features = next(iter(shapes), (known.num_features or 0,))
    problem = ""
    if len(shapes) > 1 or len(features) != 1:
        problem = f"has tensors of shapes {', '.join(map(str, sorted(shapes)))}"
    elif features[0] > MOST_FEATURES:
        problem = f"has {features[0]} channels"
    elif types - FLOATS:
        problem = f"has values of type {min(types - FLOATS)}"
    elif lost := sum(tensor.name in unreadable for tensor in tensors.values()):
        problem = f"{lost} of its tensors cannot be read"
    if problem:
        found.left_out[path] = problem
    else:
        layer = Layer(path, framework, tensors, known.expected, features[0], known.eps, known.momentum, sure)
        found.layers.append(layer)
