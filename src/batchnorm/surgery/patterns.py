"""What follows a batch normalization in a graph: an activation, an addition and an activation, or something else."""

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node

from batchnorm.surgery.activations import activation_of_node
from batchnorm.surgery.fused import normalize

LEAVES = "its output leaves the block"
ADD_IN_PLACE = (operator.iadd, "add_", "__iadd__")
ADD = (operator.add, torch.add, "add", "__add__", *ADD_IN_PLACE)
# modules of torch.nn whose output is new memory
NEW_MEMORY = (nn.modules.conv._ConvNd, nn.Linear)


@dataclass
class Match:
    """One call of a layer, and the operations that it can absorb."""

    layer: str
    normalized: Node
    activation: Node
    activation_name: str
    passed: list[Node]
    add: Node | None = None

    @property
    def what(self) -> str:
        return f"absorbed {'add + ' if self.add else ''}{self.activation_name}"

    def passed_over(self, modules: dict[str, nn.Module]) -> list[str]:
        """The modules that are not called any more, what they hold, and the layer itself."""
        called = {n.target for n in (self.normalized, self.activation, *self.passed) if n.op == "call_module"}
        return [path for path in modules if any(path == t or path.startswith(f"{t}.") for t in called)]


def match(call: Node, modules: dict[str, nn.Module]) -> Match | str:
    """What one call of a layer can absorb, or why nothing."""
    if len(call.args) + len(call.kwargs) != 1:
        return "it is called with more than an input"
    passed: list[Node] = []
    follower = only_follower(call, modules, passed)
    if isinstance(follower, str):
        return follower
    name = activation_of_node(follower, modules)
    if name:
        return Match(str(call.target), call, follower, name, passed)
    if follower.op != "call_module" and follower.target in ADD:
        return match_add(call, follower, modules, passed)
    return f"{describe(follower, modules)} follows"


def only_follower(node: Node, modules: dict[str, nn.Module], passed: list[Node]) -> Node | str:
    """The one operation that uses a value, behind any that does nothing; or why there is no such operation."""
    if len(node.users) != 1:
        return f"its output is used by {len(node.users)} operations" if node.users else "its output is not used"
    (user,) = node.users
    if user.op == "output":
        return LEAVES if user.args[0] is node else "its output is one of several outputs of the block"
    if user.op == "call_module" and does_nothing(modules[str(user.target)]) and user.args == (node,):
        passed.append(user)
        return only_follower(user, modules, passed)
    return user


def does_nothing(module: nn.Module) -> bool:
    if "forward" in vars(module):
        return False
    dropout = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
    return type(module) is nn.Identity or (type(module) in dropout and getattr(module, "p", None) == 0)


def match_add(call: Node, add: Node, modules: dict[str, nn.Module], passed: list[Node]) -> Match | str:
    value = passed[-1] if passed else call
    follower = only_follower(add, modules, passed_after := [])
    name = None if isinstance(follower, str) else activation_of_node(follower, modules)
    if isinstance(follower, str) or name is None:
        return "an addition follows, and no activation after it"
    if any(key != "other" and not (key == "alpha" and item == 1) for key, item in add.kwargs.items()):
        return "an addition with further arguments follows"
    operands = [*add.args, *([add.kwargs["other"]] if "other" in add.kwargs else [])]
    if len(operands) != 2 or not all(isinstance(operand, Node) for operand in operands):
        return "a number is added to its output"
    if any(operand.op == "get_attr" for operand in operands if isinstance(operand, Node)):
        return "a parameter or a buffer is added to its output"
    if operands[0] is operands[1]:
        return "its output is added to itself"
    if add.target in ADD_IN_PLACE and operands[0] is not value:
        return "its output is added in place to another tensor"
    reason = why_not_later(call, add, modules)
    return reason or Match(str(call.target), call, follower, name, passed + passed_after, add)


def why_not_later(call: Node, add: Node, modules: dict[str, nn.Module]) -> str:
    """Why a normalization cannot wait for the other operand of the addition; "" if it can."""
    layer = modules[str(call.target)]
    own = {id(tensor) for tensor in [*layer.parameters(), *layer.buffers()]}
    source = call.all_input_nodes[0]
    is_new = (
        source.op == "call_module"
        and isinstance(modules[str(source.target)], NEW_MEMORY)
        and type(modules[str(source.target)]).__module__.startswith("torch.nn.")
        and len(source.users) == 1
    )
    node = call.next
    while node is not add:
        module = modules[str(node.target)] if node.op == "call_module" else None
        if module is not None and own & {id(tensor) for tensor in [*module.parameters(), *module.buffers()]}:
            return "its parameters are used again before the addition"
        if node.op == "get_attr" and str(node.target).startswith(f"{call.target}."):
            return "its parameters are used again before the addition"
        if not is_new and may_write(node, module):
            return f"{describe(node, modules)} before the addition may change its input"
        node = node.next
    return ""


def may_write(node: Node, module: nn.Module | None) -> bool:
    """Whether a node may write into a tensor that exists."""
    if module is not None:
        return any(
            not type(m).__module__.startswith(("torch.nn.modules.", "batchnorm.nn.")) or getattr(m, "inplace", False)
            for m in module.modules()
        )
    if node.op in ("get_attr", "placeholder"):
        return False
    if node.target in (operator.add, operator.sub, operator.mul, getattr, operator.getitem):
        return False
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "_")
    home = "torch" if node.op == "call_method" else str(getattr(node.target, "__module__", None) or "")
    harmless = not name.endswith("_") and not node.kwargs.get("inplace") and "out" not in node.kwargs
    return not (harmless and home.startswith("torch") and True not in node.args)


def describe(node: Node, modules: dict[str, nn.Module]) -> str:
    if node.op == "call_module":
        return f"{type(modules[str(node.target)]).__name__} {node.target!r}"
    return getattr(node.target, "__name__", str(node.target))


def residual(found: Match) -> Node | None:
    """The other operand of the addition."""
    if found.add is None:
        return None
    chain = {found.normalized, *found.passed}
    (other,) = (operand for operand in found.add.all_input_nodes if operand not in chain)
    return other


def absorb(graph: Graph, found: Match) -> None:
    """Replace the operations of a match by one call."""
    position = found.add or found.normalized
    with graph.inserting_before(position):
        layer = graph.get_attr(found.layer)
        args: tuple[Any, ...] = (layer, found.normalized.all_input_nodes[0], residual(found), found.activation_name)
        in_place = found.add is not None and found.add.target in ADD_IN_PLACE
        fused = graph.call_function(normalize, (*args, in_place) if in_place else args)
    found.activation.replace_all_uses_with(fused)
    absorbed = {found.activation, found.add, found.normalized, *found.passed}
    # users before what they use
    for node in reversed(list(graph.nodes)):
        if node in absorbed:
            graph.erase_node(node)
