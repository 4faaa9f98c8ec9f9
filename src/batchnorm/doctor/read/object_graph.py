"""The objects that ``tf.train.Checkpoint`` and Keras store with a checkpoint: who owns which variable.

There a layer is an object with children called moving_mean and moving_variance; the keys of its variables can lie
anywhere (Keras 3 stores gamma under the optimizer).

Source: TensorFlow's ``protobuf/trackable_object_graph.proto``.
"""

from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from batchnorm.doctor.checkpoint import STATISTICS, StoredTensor
from batchnorm.doctor.read.graph import Graph
from batchnorm.doctor.read.layers import Found
from batchnorm.doctor.read.variables import ROLE_NAMES, Declared, add_layer, find_layers, split_role
from batchnorm.doctor.read.wire import Message

KEY = "_CHECKPOINTABLE_OBJECT_GRAPH"
SLOT = ".OPTIMIZER_SLOT"
LONGEST_PATH = 400


@dataclass(frozen=True)
class Owner:
    """An object.

    Attributes:
        children: number of the object, by the name of the attribute.
        key: of the tensor that it stands for, "" if it is no variable.
        full_name: that the variable was made with.
    """

    children: dict[str, int]
    key: str
    full_name: str

    @property
    def scope(self) -> str:
        return self.full_name.rpartition("/")[0]


def read_objects(message: Message) -> list[Owner]:
    """The objects of a TrackableObjectGraph."""
    owners = []
    for node in message.messages(1):
        children = {child.text(2): child.integer(1) for child in node.messages(1)}
        values = [value for value in node.messages(2) if value.text(1) == "VARIABLE_VALUE"]
        key, full_name = (values[0].text(3), values[0].text(2)) if values else ("", "")
        owners.append(Owner(children, key, full_name))
    return owners


def find_object_layers(
    found: Found,
    owners: list[Owner],
    tensors: Mapping[str, StoredTensor],
    graph: Graph,
    unreadable: Collection[str] = (),
) -> None:
    """Add the BN layers among objects, then those among variables that no such object owns, by their full names.

    Args:
        found: what they are added to.
        owners: the objects.
        tensors: of the checkpoint, by key.
        graph: what is known from a SavedModel; may be empty.
        unreadable: keys of tensors whose values cannot be had.
    """
    taken: set[str] = set()
    for index, path in paths(owners).items():
        roles = roles_of(owners, index)
        if roles.keys().isdisjoint(STATISTICS):
            continue
        scope = scope_of(roles)
        name = path if not scope or scope in taken else scope
        known = replace(graph.declared.get(name, Declared(frozenset())), expected=frozenset(roles))
        stored = {role: tensors[owner.key] for role, owner in roles.items() if owner.key in tensors}
        add_layer(found, name, "tensorflow", stored, known, unreadable=unreadable)
        taken.update((name, *(owner.scope for owner in roles.values())))
    rest = {
        owner.full_name: tensors[owner.key]
        for owner in owners
        if owner.key in tensors and SLOT not in owner.key and owner.scope not in taken
    }
    declared = {scope: known for scope, known in graph.declared.items() if scope not in taken}
    described = graph.described
    find_layers(found, rest, "tensorflow", declared=declared, described=described, unreadable=unreadable)


def roles_of(owners: list[Owner], index: int) -> dict[str, Owner]:
    """The children of an object that are called like variables of BN."""
    children = owners[index].children
    named = {role: children[name] for name, role in ROLE_NAMES.items() if name in children}
    return {role: owners[child] for role, child in named.items() if child in range(len(owners))}


def paths(owners: list[Owner]) -> dict[int, str]:
    """The shortest way from the root to each object, as TensorFlow names them; very long ways are not followed."""
    found = {0: ""} if owners else {}
    waiting = deque(found)
    while waiting:
        index = waiting.popleft()
        for name, child in owners[index].children.items():
            path = f"{found[index]}/{name}".lstrip("/")
            if child in range(len(owners)) and child not in found and len(path) <= LONGEST_PATH:
                found[child] = path
                waiting.append(child)
    return found


def scope_of(roles: Mapping[str, Owner]) -> str | None:
    """The scope that the full names of a layer's variables share, if they tell the same roles."""
    scopes = set()
    for role, owner in roles.items():
        split = split_role(owner.full_name)
        scopes.add(split[0] if split and split[1] == role else None)
    return scopes.pop() if len(scopes) == 1 else None
