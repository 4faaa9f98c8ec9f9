"""Keras files: ``.keras`` archives, ``.weights.h5``, and the ``.h5`` of Keras 2 and before."""

import re
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from batchnorm.doctor.checkpoint import STATISTICS, Checkpoint, StoredTensor
from batchnorm.doctor.read.faults import Faults
from batchnorm.doctor.read.hdf5 import Hdf5, read_hdf5
from batchnorm.doctor.read.keras_config import Configured, read_config
from batchnorm.doctor.read.layers import Found
from batchnorm.doctor.read.source import Source, shown
from batchnorm.doctor.read.table import Table
from batchnorm.doctor.read.variables import Declared, add_layer, find_layers, is_clear
from batchnorm.doctor.read.zip_directory import STORED, Member, read_directory, read_member

WEIGHTS, CONFIG, METADATA = "model.weights.h5", "config.json", "metadata.json"
LARGEST_TEXT = 1 << 25
# where models keep their layers: Keras 3, and the archives of Keras 2.12 to 2.15
FOLDERS = ("layers", "_layer_checkpoint_dependencies")
OPTIMIZER = re.compile(r"(^|/)(optimizer|optimizer_weights)(/|$)")
# positions of a BN layer's variables, which have numbers only; batch renormalization has three more behind them
ORDER = ("weight", "bias", "running_mean", "running_var")
RENORM = 3


def read_keras(path: str | Path) -> Checkpoint:
    """Read a Keras file without Keras: its arrays in a process of their own, its configuration as plain JSON.

    Args:
        path: a ``.keras`` archive, or an HDF5 file with weights alone or a whole model.

    Returns:
        All arrays by their paths, and the BN layers: with epsilon, momentum and what should be there if the file has a
        configuration.

    Raises:
        MissingExtraError: h5py is not installed.
        DataError: the file is damaged, hostile, or cannot be read within the limits.
    """
    source, table = Source(path), Table(str(path))
    if source.read_up_to(0, 2) == b"PK":
        config, version, weights = open_archive(source, table.faults)
        file = read_hdf5(source, weights.start, weights.size)
        kind = "keras"
    else:
        file = read_hdf5(source)
        config, version = file.texts.get("model_config", ""), file.texts.get("keras_version")
        kind = "keras" if config else "keras weights"
    configured = read_config(config, path) if config else []
    for tensor in file.tensors.values():
        table.add(tensor, "" if tensor.name not in file.unreadable else "holds no numbers")
    for name, problem in file.refused.items():
        table.faults.add("BN003", name, f"is {problem}: not followed")
    table.facts["keras_version"] = version
    found = Found()
    numbered = numbered_variables(table.tensors)
    if numbered:
        find_numbered_layers(found, file, numbered, configured)
    else:
        find_named_layers(found, table.tensors, configured)
    return table.normal_form(kind, found)


def open_archive(source: Source, faults: Faults) -> tuple[str, str | None, Member]:
    """The configuration, the version of Keras, and where the weights lie."""
    members = read_directory(source, faults)
    if members is None:
        raise source.error("expected a Keras archive, but its zip directory is missing: truncated")
    if CONFIG not in members or WEIGHTS not in members:
        raise source.error(f"expected a Keras archive with {CONFIG} and {WEIGHTS}")
    weights = members[WEIGHTS]
    if weights.method != STORED or weights.packed != weights.size or not weights.readable:
        raise source.error(f"{WEIGHTS} is compressed or encrypted, which Keras never does. Try: save the model again")
    version = read_text(source, members[METADATA]) if METADATA in members else ""
    found = re.search(r'"keras_version": "([\w.+-]{1,40})"', version)
    return read_text(source, members[CONFIG]), found[1] if found else None, weights


def read_text(source: Source, member: Member) -> str:
    """A small member, with its checksum."""
    if member.size > LARGEST_TEXT:
        raise source.error(f"{shown(member.name)} has {member.size:,} bytes, more than any model's")
    text = read_member(source, member, 0, member.size)
    if zlib.crc32(text) != member.crc:
        raise source.error(f"damaged: {shown(member.name)} does not have the checksum of the archive")
    return text.decode("utf-8", "replace")


def variable_name(name: str) -> str:
    """Of model_weights/LAYER/VARIABLE:0, where the variable's own name often begins with the layer's.

    Example:
        >>> variable_name("model_weights/bn/bn/gamma:0"), variable_name("nested/inner_bn/gamma:0")
        ('bn/gamma', 'nested/inner_bn/gamma')
    """
    name = name.removeprefix("model_weights/").removesuffix(":0")
    layer, _, variable = name.partition("/")
    return variable if layer in variable.split("/") else name


def numbered_variables(tensors: Mapping[str, StoredTensor]) -> dict[str, list[StoredTensor]]:
    """Group of a layer -> its variables in order, from ``layers/dense/vars/0``."""
    found: dict[str, dict[int, StoredTensor]] = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"(?:(.*)/)?vars/(\d{1,4})", name)
        if match and not OPTIMIZER.search(name):
            found.setdefault(match[1] or "", {})[int(match[2])] = tensor
    return {group: [variables[index] for index in sorted(variables)] for group, variables in found.items()}


def find_numbered_layers(
    found: Found, file: Hdf5, numbered: dict[str, list[StoredTensor]], configured: list[Configured]
) -> None:
    """Add layers by their place in the configuration; then those that only their class or name tells."""
    known = {"/".join(item.group): item for item in configured}
    paths = readable_paths(file, numbered)
    for group, variables in numbered.items():
        parts = ["layers" if part in FOLDERS else part for part in group.split("/")]
        item = known.pop("/".join(parts), None)
        if item is not None:
            roles = [role for role in ORDER if role in item.declared.expected]
            tensors = dict(zip(roles, variables, strict=False))
            add_layer(found, paths[group], "keras", tensors, item.declared)
        elif is_clear(file.names.get(f"{group}/vars", "")) or is_clear(group):
            tensors = by_number(variables)
            add_layer(found, paths[group], "keras", tensors, Declared(frozenset(tensors) | set(STATISTICS)))
    add_absent(found, known.values())


def by_number(variables: list[StoredTensor]) -> dict[str, StoredTensor]:
    """Roles by how many variables there are. Of three the first is gamma or beta: it is left out."""
    count = len(variables) - RENORM if len(variables) > len(ORDER) else len(variables)
    if count == len(ORDER):
        return dict(zip(ORDER, variables, strict=False))
    return dict(zip(STATISTICS, variables[max(0, count - 2) :], strict=False))


def readable_paths(file: Hdf5, groups: Iterable[str]) -> dict[str, str]:
    """Group -> the names of its models and of itself, where the file has them and they differ: nested/inner_bn."""
    paths = {}
    for group in groups:
        parts = group.split("/")
        steps = ["/".join(parts[: index + 1]) for index, part in enumerate(parts) if part not in FOLDERS]
        paths[group] = "/".join(file.names.get(f"{step}/vars", step.rpartition("/")[2]) for step in steps)
    counts = Counter(paths.values())
    return {group: path if path and counts[path] == 1 else group for group, path in paths.items()}


def find_named_layers(found: Found, tensors: Mapping[str, StoredTensor], configured: list[Configured]) -> None:
    """Add layers of the older format; the configuration knows them by the last part of their scope."""
    named = {variable_name(name): tensor for name, tensor in tensors.items() if not OPTIMIZER.search(name)}
    by_name: dict[str, set[Declared]] = {}
    for item in configured:
        by_name.setdefault(item.name, set()).add(item.declared)
    declared = {}
    for scope in {name.rpartition("/")[0] for name in named}:
        same = by_name.get(scope.rpartition("/")[2], set())
        if len(same) == 1:
            declared[scope] = next(iter(same))
    find_layers(found, named, "keras", declared=declared)
    seen = {layer.path.rpartition("/")[2] for layer in found.layers} | {scope.rpartition("/")[2] for scope in declared}
    add_absent(found, (item for item in configured if item.name not in seen))


def add_absent(found: Found, items: Iterable[Configured]) -> None:
    """Add layers of a configuration of which the file holds nothing, if it says how large they are."""
    for item in items:
        if item.declared.num_features:
            add_layer(found, "/".join(item.group) or item.name, "keras", {}, item.declared)
