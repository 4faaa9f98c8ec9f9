"""What a TensorFlow graph says about its batch normalization: which variables it has, epsilon, momentum.

Nothing is executed. Operations are followed from an epsilon or a moving average back to the variable that they read,
through functions and conditions where they lie in one.

Source: TensorFlow's ``framework/graph.proto``, ``node_def.proto``, ``attr_value.proto``, ``function.proto``.
"""

import math
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from batchnorm.doctor.checkpoint import ROLES, STATISTICS
from batchnorm.doctor.read.variables import Declared, by_scope, split_role
from batchnorm.doctor.read.wire import Message

T = TypeVar("T")
VARIABLES = ("VariableV2", "Variable", "VarHandleOp")
# operations that hand on their first input as it is
PASSING = {
    *("Identity", "ReadVariableOp", "Cast", "Switch", "RefSwitch", "Enter", "RefEnter"),
    *("Reshape", "Squeeze", "ExpandDims"),
}
ADDING = ("Add", "AddV2")
UPDATING = ("AssignSub", "AssignSubVariableOp")
CALLING = {"PartitionedCall": 0, "StatefulPartitionedCall": 0, "If": 1, "StatelessIf": 1}
DOUBLE = 2
# a partitioned variable is stored as one
PART = re.compile(r"/part_\d+$")
# the operation's default in TensorFlow's ops/nn_ops.cc
FUSED_EPS = 1e-4
# steps that are followed from one operation to a variable: real graphs need fewer than ten
LONGEST_WAY = 64


@dataclass(frozen=True)
class Node:
    """An operation; its attributes are parsed when asked for."""

    name: str
    op: str
    inputs: list[str]
    message: Message

    def attribute(self, name: str) -> Message:
        for pair in self.message.messages(5):
            if pair.text(1) == name:
                return pair.message(2)
        return Message(b"", self.message.budget)

    @property
    def variable(self) -> str:
        """Under which name the variable is stored."""
        shared = self.attribute("shared_name").text(2) if self.op == "VarHandleOp" else ""
        return PART.sub("", shared or self.name)

    @property
    def length(self) -> int | None:
        """C of a variable that is a vector."""
        if PART.search(self.name):
            return None
        sizes = [dimension.integer(1) for dimension in self.attribute("shape").message(7).messages(2)]
        return sizes[0] if len(sizes) == 1 and sizes[0] > 0 else None


@dataclass
class Scope:
    """The graph or the body of a function.

    Attributes:
        nodes: by name.
        arguments: of the function, with their positions; none of the graph.
        bound: argument -> name of the variable that it stands for.
        callers: where the function is called: the scope, the operation, and how many of its inputs are not arguments.
    """

    nodes: dict[str, Node] = field(default_factory=dict)
    arguments: dict[str, int] = field(default_factory=dict)
    bound: dict[str, str] = field(default_factory=dict)
    callers: "list[tuple[Scope, Node, int]]" = field(default_factory=list)


def read_scopes(graph: Message, bound: dict[str, list[str]]) -> list[Scope]:
    """The graph and its functions, connected by their calls.

    Args:
        graph: GraphDef.
        bound: function -> the variables that its last arguments stand for.
    """
    scopes = {"": Scope(read_nodes(graph.messages(1)))}
    for function in graph.message(2).messages(1):
        signature = function.message(1)
        name, arguments = signature.text(1), [argument.text(1) for argument in signature.messages(2)]
        captured = bound.get(name, [])
        ends = arguments[-len(captured) :] if captured else []
        positions = {argument: index for index, argument in enumerate(arguments)}
        scopes[name] = Scope(read_nodes(function.messages(3)), positions, dict(zip(ends, captured, strict=False)))
    for scope in scopes.values():
        for node in scope.nodes.values():
            if node.op in CALLING:
                for called in called_functions(node):
                    if called in scopes:
                        scopes[called].callers.append((scope, node, CALLING[node.op]))
    return list(scopes.values())


def read_nodes(messages: Iterable[Message]) -> dict[str, Node]:
    nodes = (Node(message.text(1), message.text(2), list(message.texts(3)), message) for message in messages)
    return {node.name: node for node in nodes}


def called_functions(node: Node) -> Iterator[str]:
    for name in ("f", "then_branch", "else_branch"):
        if function := node.attribute(name).message(10).text(1):
            yield function


def source(scope: Scope, name: str) -> tuple[Scope, Node] | str | None:
    """Follow an input to the operation that makes the value, or to the name of a variable that a function is given."""
    for _ in range(LONGEST_WAY):
        name = name.partition(":")[0]
        node = scope.nodes.get(name)
        if node is None:
            if name in scope.bound:
                return scope.bound[name]
            step = caller_of(scope, name)
            if step is None:
                return None
            scope, name = step
        elif node.op in PASSING and node.inputs:
            name = node.inputs[0]
        else:
            return scope, node
    return None


def caller_of(scope: Scope, argument: str) -> tuple[Scope, str] | None:
    """The input, of the first call of a function, that the argument is."""
    if argument not in scope.arguments or not scope.callers:
        return None
    outer, node, skipped = scope.callers[0]
    index = scope.arguments[argument] + skipped
    return (outer, node.inputs[index]) if index < len(node.inputs) else None


def variable_of(scope: Scope, name: str) -> str | None:
    """The variable that an input reads."""
    found = source(scope, name)
    if isinstance(found, tuple):
        return found[1].variable if found[1].op in VARIABLES else None
    return found


def constant_of(scope: Scope, name: str) -> float | None:
    """The number that an input is: a constant, or the difference of two."""
    found = source(scope, name)
    if not isinstance(found, tuple):
        return None
    scope, node = found
    if node.op == "Const":
        return scalar(node.attribute("value").message(8))
    if node.op == "Sub" and len(node.inputs) >= 2:
        values = [direct_constant(scope, name) for name in node.inputs[:2]]
        return values[0] - values[1] if values[0] is not None and values[1] is not None else None
    return None


def direct_constant(scope: Scope, name: str) -> float | None:
    found = source(scope, name)
    if isinstance(found, tuple) and found[1].op == "Const":
        return scalar(found[1].attribute("value").message(8))
    return None


def scalar(tensor: Message) -> float | None:
    """The one float of a TensorProto."""
    values = tensor.floats(5) + tensor.floats(6, "<d") + tensor.floats(4, "<d" if tensor.integer(1) == DOUBLE else "<f")
    if len(values) != 1 or not math.isfinite(values[0]):
        return None
    return values[0] if tensor.integer(1) == DOUBLE else written(values[0])


def written(value: float) -> float:
    """The shortest decimal number with the same float32: 0.001 instead of 0.0010000000474974513."""
    return float(str(np.float32(value)))


@dataclass
class Found:
    """What was found on the way, by the scope of the variables; several values where scopes have the same name."""

    eps: dict[str, set[float]] = field(default_factory=lambda: defaultdict(set))
    momentum: dict[str, set[float]] = field(default_factory=lambda: defaultdict(set))
    normalizing: set[str] = field(default_factory=set)


def look_at(scope: Scope, node: Node, found: Found) -> None:
    """Note what one operation tells."""
    if node.op.startswith("FusedBatchNorm") and "Grad" not in node.op:
        # SavedModels leave out attributes that have the default of the operation
        eps = node.attribute("epsilon").floats(4) or [FUSED_EPS]
        factor = node.attribute("exponential_avg_factor").floats(4)
        for path in filter(None, (layer_of(scope, name) for name in node.inputs[1:5])):
            found.normalizing.add(path)
            found.eps[path].add(written(eps[-1]))
            # 1 means that the operation keeps no average
            if factor and factor[-1] < 1:
                found.momentum[path].add(written(factor[-1]))
    elif node.op == "Rsqrt" and node.inputs:
        look_at_sum(scope, node.inputs[0], found)
    elif node.op in UPDATING and len(node.inputs) >= 2:
        path, factor = layer_of(scope, node.inputs[0], STATISTICS), source(scope, node.inputs[1])
        if path and isinstance(factor, tuple) and factor[1].op == "Mul":
            for name in factor[1].inputs[:2]:
                if (value := constant_of(factor[0], name)) is not None:
                    found.momentum[path].add(value)


def look_at_sum(scope: Scope, name: str, found: Found) -> None:
    """rsqrt(moving_variance + epsilon), as evaluation mode writes it where there is no fused operation."""
    added = source(scope, name)
    if isinstance(added, tuple) and added[1].op in ADDING and len(added[1].inputs) >= 2:
        scope, (one, other) = added[0], added[1].inputs[:2]
        path = layer_of(scope, one, ("running_var",))
        eps = constant_of(scope, other)
        if path and eps is not None:
            found.normalizing.add(path)
            found.eps[path].add(eps)


def layer_of(scope: Scope, name: str, roles: Collection[str] = ROLES) -> str | None:
    """Scope of the variable that an input reads, if it has one of the roles."""
    split = split_role(variable_of(scope, name) or "")
    return split[0] if split and split[1] in roles else None


@dataclass(frozen=True)
class Graph:
    """What a graph says about batch normalization.

    Attributes:
        declared: by scope, its BN layers.
        described: every scope that has variables called like those of BN.
    """

    declared: dict[str, Declared]
    described: frozenset[str]


def only(values: set[T]) -> T | None:
    """The one value, if all agree."""
    return next(iter(values)) if len(values) == 1 else None


def read_graph(graph: Message, bound: dict[str, list[str]] | None = None) -> Graph:
    """The BN layers of a GraphDef.

    Args:
        graph: the message.
        bound: function -> the variables that its last arguments stand for, where functions are called from outside.

    Returns:
        A layer for every scope that has moving statistics, or whose gamma or beta goes into a batch normalization.

    Raises:
        DataError: it is no GraphDef.
    """
    scopes = read_scopes(graph, bound or {})
    variables = {node.variable: node for node in scopes[0].nodes.values() if node.op in VARIABLES}
    found = Found()
    for scope in scopes:
        for node in scope.nodes.values():
            look_at(scope, node, found)
    declared = {}
    groups = by_scope(variables)
    for path, names in groups.items():
        if path in found.normalizing or names.keys() & set(STATISTICS):
            lengths = {variables[name].length for name in names.values()}
            eps = only(found.eps[path]) if found.eps[path] else constant_of(scopes[0], f"{path}/batchnorm/add/y")
            declared[path] = Declared(
                expected=frozenset(names),
                num_features=only(lengths),
                eps=eps,
                momentum=only(found.momentum[path]),
            )
    return Graph(declared, frozenset(groups))
