"""Batch normalization layers among the tensors of a torch file, from names and shapes.

With running statistics a layer is certain: no other layer of torch has them, apart from instance normalization with
``track_running_stats=True``, whose tensors are the same ones. Without them, weight and bias of shape (C,) belong to
layer, group, RMS and instance normalization as well. They are taken for batch normalization only where the file itself
says so: by a name such as ``bn1``; by layers with statistics in the same place of other blocks; or after a convolution
without bias, in a file with such layers.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from batchnorm.doctor.checkpoint import ROLES, STATISTICS, Layer, StoredTensor
from batchnorm.doctor.read.dtypes import REAL, SIZES

LONGEST_NAME = 1024
# real networks have up to 10^4 channels in a layer and 10^6 in all
MOST_FEATURES = 1 << 20
LARGEST_LAYERS = 64 << 20
# of batch and instance normalization in torch, since num_batches_tracked exists; of other layers it is 1
NORM_VERSION = 2
WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
OTHER_NORMS = {"ln", "gn", "in", "rms", "instance"}
OTHER_NAMES = ("layernorm", "groupnorm", "rmsnorm", "instancenorm")
# what stands before a normalization in the same block, by what the latter is called
NORM_WORDS, CONVOLUTION_WORDS = ("normalization", "norm"), ("convolution", "conv", "0")
AFFINE = frozenset({"weight", "bias"})
KNOWN = frozenset(ROLES) | {"schedule_step"}

Group = dict[str, StoredTensor]


class ModuleState(NamedTuple):
    """What a model that was saved whole says about one of its normalization layers."""

    kind: str
    eps: float | None
    momentum: float | None
    training: bool
    tracked: bool


@dataclass
class Found:
    """Layers, and by path why others were left out and which are relatives of batch normalization."""

    layers: list[Layer] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    relatives: dict[str, str] = field(default_factory=dict)
    bytes: int = 0


def recognise(
    tensors: Mapping[str, StoredTensor],
    unreadable: frozenset[str] = frozenset(),
    versions: Mapping[str, int] | None = None,
    modules: Mapping[str, ModuleState] | None = None,
) -> Found:
    """Layers in the order of the file; all of their tensors can be read, and have shape (C,), the counter ().

    Args:
        tensors: by name.
        unreadable: names of tensors whose values cannot be had: their layers are left out.
        versions: of modules, from torch's ``_metadata``, by path.
        modules: what is known about them otherwise.
    """
    versions, modules, found = versions or {}, modules or {}, Found()
    groups = by_path(tensors)
    evidence = Evidence(groups)
    for path, group in groups.items():
        module = modules.get(path)
        if "running_cov" in group:
            found.relatives[path] = "whitening"
        elif module is not None and "instancenorm" in module.kind.lower():
            found.relatives[path] = "instance normalization"
        elif has_statistics(group) or is_known(group, module):
            add(found, path, group, unreadable, module, versions.get(path))
        elif is_affine(group) and evidence.suggests(path, group, versions.get(path), module):
            add(found, path, group, unreadable, module, versions.get(path), sure=False)
    return found


def by_path(tensors: Mapping[str, StoredTensor]) -> dict[str, Group]:
    groups: dict[str, Group] = {}
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        groups.setdefault(path, {})[leaf] = tensor
    return groups


def has_statistics(group: Group) -> bool:
    return any(role in group for role in (*STATISTICS, "num_batches_tracked"))


def is_known(group: Group, module: ModuleState | None) -> bool:
    """Whether the class says what the tensors do not: a layer of torch without running statistics."""
    return module is not None and "batchnorm" in module.kind.lower() and is_affine(group)


def is_affine(group: Group) -> bool:
    return group.keys() == AFFINE and group["weight"].shape == group["bias"].shape and len(group["weight"].shape) == 1


def add(
    found: Found,
    path: str,
    group: Group,
    unreadable: frozenset[str],
    module: ModuleState | None,
    version: int | None,
    *,
    sure: bool = True,
) -> None:
    """Make a layer of the group, or note why it is none."""
    tensors = {role: group[role] for role in ROLES if role in group}
    if any(len(tensors[role].shape) == 2 for role in AFFINE & tensors.keys()):
        # one weight for each class: the statistics are those of any layer
        found.relatives[path] = "conditional"
        tensors = {role: tensor for role, tensor in tensors.items() if role not in AFFINE}
    elif "schedule_step" in group:
        found.relatives[path] = "batch renormalization"
    size = sum(math.prod(tensor.shape) * SIZES.get(tensor.dtype, 8) for tensor in tensors.values())
    problem = unfitness(tensors, unreadable) or ("too many channels" if found.bytes + size > LARGEST_LAYERS else "")
    if problem:
        found.left_out[path] = problem
        return
    found.bytes += size
    if "num_batches_tracked" in tensors:
        tensors["num_batches_tracked"] = scalar(tensors["num_batches_tracked"])
    expected = set(tensors)
    if module is None or module.tracked or has_statistics(group):
        expected.update(STATISTICS)
        if version is not None and version >= NORM_VERSION and sure:
            expected.add("num_batches_tracked")
    features = next(tensor.shape[0] for role, tensor in tensors.items() if role != "num_batches_tracked")
    found.layers.append(
        Layer(
            path,
            "torch",
            tensors,
            frozenset(expected),
            features,
            eps=module.eps if module else None,
            momentum=module.momentum if module else None,
            sure=sure and not group.keys() - KNOWN,
        )
    )


def scalar(tensor: StoredTensor) -> StoredTensor:
    """The same counter with shape (), also where a converter gave it shape (1,)."""
    return StoredTensor(tensor.name, (), tensor.dtype, lambda: tensor.load().reshape(()))


def unfitness(tensors: Group, unreadable: frozenset[str]) -> str:
    """Why the tensors are not those of a layer whose values can be read."""
    vectors = {role: tensor for role, tensor in tensors.items() if role != "num_batches_tracked"}
    shapes = {tensor.shape for tensor in vectors.values()}
    if not vectors:
        return "has a counter of batches alone"
    if len(shapes) > 1 or len(next(iter(shapes))) != 1:
        return f"has tensors of shapes {', '.join(map(str, sorted(shapes)))}"
    if next(iter(shapes))[0] > MOST_FEATURES:
        return f"has {next(iter(shapes))[0]} channels"
    if "num_batches_tracked" in tensors and math.prod(tensors["num_batches_tracked"].shape) != 1:
        return "has more than one counter of batches"
    if lost := [tensor.name for tensor in tensors.values() if tensor.name in unreadable]:
        return f"{len(lost)} of its tensors cannot be read"
    if odd := [tensor.dtype for tensor in tensors.values() if tensor.dtype not in REAL]:
        return f"has values of type {odd[0]}"
    return ""


class Evidence:
    """What a file says about layers of which only weight and bias are there."""

    def __init__(self, groups: dict[str, Group]) -> None:
        self.groups = groups
        tracked = [path for path, group in groups.items() if has_statistics(group) and "running_cov" not in group]
        self.places = {place(path) for path in tracked}
        self.any = bool(tracked) or any(named(path) == "bn" and is_affine(group) for path, group in groups.items())

    def suggests(self, path: str, group: Group, version: int | None, module: ModuleState | None) -> bool:
        """Whether this is batch normalization that lost its statistics."""
        name = named(path)
        if module is not None or name == "other" or (version is not None and version != NORM_VERSION):
            return False
        if name == "bn" or place(path) in self.places:
            return True
        follows = self.follows_convolution(path, group["weight"].shape[0])
        return follows and (self.any or words(path)[-1:] == ["normalization"])

    def follows_convolution(self, path: str, features: int) -> bool:
        """Whether the module before this one in the same parent is a convolution of as many channels without bias."""
        parent, _, last = path.rpartition(".")
        if last.isdecimal():
            names = [str(int(last[:9]) - 1)]
        else:
            names = [last.replace(word, other) for word in NORM_WORDS if word in last for other in CONVOLUTION_WORDS]
        for name in names:
            before = self.groups.get(f"{parent}.{name}" if parent else name, {})
            weight = before.get("weight")
            if weight is not None and "bias" not in before and len(weight.shape) > 2 and weight.shape[0] == features:
                return True
        return False


def words(path: str) -> list[str]:
    """Of the last part of a path that is not only a number, in lower case: "conv1_bn" has "conv" and "bn"."""
    parts = [part for part in path.split(".") if not part.isdecimal()]
    return [word.lower() for word in WORD.findall(parts[-1])] if parts else []


def named(path: str) -> str:
    """Which normalization the name says this is: "bn", "other", or "" if it does not say."""
    parts = words(path)
    whole = "".join(parts)
    if "batchnorm" in whole or any(word.startswith("bn") or word.endswith("bn") for word in parts):
        return "bn"
    return "other" if OTHER_NORMS & {*parts} or any(name in whole for name in OTHER_NAMES) else ""


def place(path: str) -> str:
    """The path without the numbers of blocks; a number at its end is kept: it counts the parts of a block."""
    parent, dot, last = path.rpartition(".")
    return re.sub(r"\d+", "#", parent) + dot + last
