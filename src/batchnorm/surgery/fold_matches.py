"""Which linear or convolution call a BN layer can be folded into, read from a graph of one block."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.utils._pytree import tree_leaves

from batchnorm.surgery.foldable import DTYPES, does_nothing
from batchnorm.surgery.fused import has_hooks
from batchnorm.surgery.linear_calls import OPERATIONS, LinearCall, linear_call
from batchnorm.surgery.patterns import describe, may_write

# F.pad: what it adds is computed from values of the same channel, which a scale and a shift reach as well
COMMUTING_PADDING = ("reflect", "replicate", "circular")
# numbers of dimensions that a layer accepts
DIMENSIONS = ((nn.BatchNorm1d, {2, 3}), (nn.BatchNorm2d, {4}), (nn.BatchNorm3d, {5}))
# what may be asked of a weight without its values
METADATA = ("dtype", "device", "shape", "ndim", "requires_grad", "is_cuda")


class NoMatchError(Exception):
    """Why a layer cannot be folded into what stands on one side of it."""


class NoNeighbourError(NoMatchError):
    """There is no linear map on one side."""


@dataclass
class Match:
    """A layer, by its name in the block, with all its calls, and the calls of the one linear map it can go into."""

    layer: str
    calls: list[Node]
    linears: list[LinearCall]
    # the normalization is applied to the output of the linear map
    follows: bool


def input_of(call: Node) -> Node:
    given = dict(zip(("input", "residual"), call.args, strict=False)) | call.kwargs
    if not given.keys() <= {"input", "residual"} or not isinstance(given["input"], Node):
        raise NoMatchError("it is called with more than an input and a residual")
    if given.get("residual") is given["input"]:
        raise NoMatchError("its input is its residual, too")
    return given["input"]


def has_residual(call: Node) -> bool:
    return len(call.args) + len(call.kwargs) > 1


def behind(calls: list[Node], modules: dict[str, nn.Module]) -> list[LinearCall]:
    """The linear calls whose outputs a layer normalizes, and nobody else sees."""
    linears = []
    for call in calls:
        node = input_of(call)
        while node.op == "call_module" and does_nothing(modules[str(node.target)]):
            check_one_user(node, modules)
            node = node.all_input_nodes[0]
        if node.op == "placeholder":
            raise NoNeighbourError("its input is that of the model or block")
        linear = linear_call(node)
        if linear is None:
            check_not_computed(node)
            raise NoNeighbourError(f"{describe(node, modules)} precedes")
        check_one_user(node, modules)
        linears.append(linear)
    return linears


def ahead(calls: list[Node], modules: dict[str, nn.Module]) -> list[LinearCall]:
    """The linear calls whose input is the output of a layer, which nobody else sees."""
    linears = []
    for call in calls:
        input_of(call)
        if has_residual(call):
            raise NoMatchError("a residual is added to its output")
        node, pads = call, []
        while True:
            check_one_user(node, modules)
            node, last = next(iter(node.users)), node
            if node.op == "output":
                raise NoNeighbourError("its output is that of the model or block")
            if node.op == "call_function" and node.target is F.pad and node.args[0] is last:
                pads.append(dict(zip(("pad", "mode", "value"), node.args[1:], strict=False)) | node.kwargs)
            elif not (node.op == "call_module" and does_nothing(modules[str(node.target)])):
                break
        linear = linear_call(node)
        if linear is None or node.args[:1] != (last,):
            check_not_computed(node)
            raise NoNeighbourError(f"{describe(node, modules)} follows")
        linear.pads = pads
        check_pads(linear)
        check_nothing_written(call, node, modules)
        linears.append(linear)
    return linears


def check_one_user(node: Node, modules: dict[str, nn.Module]) -> None:
    if len(node.users) != 1:
        raise NoMatchError(f"the output of {name_of(node, modules)} is used by {len(node.users)} operations")


def name_of(node: Node, modules: dict[str, nn.Module]) -> str:
    """A linear call by the name of the module whose weight it takes."""
    linear = linear_call(node)
    return describe(node, modules) if linear is None else f"{describe(node, modules)} {linear.owner!r}"


def check_not_computed(node: Node) -> None:
    if node.op == "call_function" and node.target in OPERATIONS:
        raise NoMatchError(f"weight, bias or options of the {name_of_function(node)} next to it are computed")


def name_of_function(node: Node) -> str:
    return getattr(node.target, "__name__", str(node.target))


def check_pads(linear: LinearCall) -> None:
    for pad in linear.pads:
        mode, value = pad.get("mode", "constant"), pad.get("value")
        if mode not in COMMUTING_PADDING and not (mode == "constant" and not value):
            raise NoMatchError(f"padding with {value!r} follows")
        if any(isinstance(leaf, Node) for leaf in tree_leaves(pad)):
            raise NoMatchError("padding of a computed size follows")


def check_nothing_written(call: Node, linear: Node, modules: dict[str, nn.Module]) -> None:
    """The folded layer hands on its input itself, which must stay what it was until the linear map takes it."""
    node = call.next
    while node is not linear:
        module = modules[str(node.target)] if node.op == "call_module" else None
        if may_write(node, module):
            raise NoMatchError(f"{describe(node, modules)} before the linear map may change its input")
        node = node.next


def check_only_pair(graph: Graph, layer: str, linears: list[LinearCall]) -> None:
    """Every use of the weight is one of these calls, and none uses another; nor has the layer's tensors another use."""
    first = linears[0]
    if any((one.weight, one.bias, one.options) != (first.weight, first.bias, first.options) for one in linears):
        names = ", ".join(repr(name) for name in dict.fromkeys(one.owner for one in linears))
        raise NoMatchError(f"its calls meet different weights or options ({names})")
    nodes = {one.node for one in linears}
    for node in graph.nodes:
        if node.op != "get_attr":
            continue
        if node.target in (first.weight, first.bias) and not set(filter(uses_values, node.users)) <= nodes:
            raise NoMatchError(f"{str(node.target)!r} is used without this layer, too")
        if str(node.target).rpartition(".")[0] == layer and node.users:
            raise NoMatchError(f"{str(node.target)!r} is used outside the layer")


def uses_values(user: Node) -> bool:
    return not (user.op == "call_function" and user.target is getattr and user.args[1] in METADATA)


def check_dimensions(layer: nn.Module, linear: LinearCall, seen: set[int] | None) -> None:
    """The axis that is normalized is that of the outputs or inputs of the linear map."""
    expected = linear.spatial + 2
    accepted = next((dims for cls, dims in DIMENSIONS if isinstance(layer, cls)), {2, 3, 4, 5})
    if expected not in accepted:
        raise NoMatchError(f"{type(layer).__name__} does not go with {linear.function.__name__}")
    if seen is None and linear.spatial == 0:
        raise NoMatchError(
            f"an example is needed: it normalizes the features of {linear.owner!r} only if its input is (N, C)"
        )
    if seen is not None and seen != {expected}:
        dims = ", ".join(map(str, sorted(seen)))
        raise NoMatchError(
            f"its input has {dims} dimensions, so it normalizes another axis than the features of {linear.owner!r}"
        )


def check_channels(layer: Any, owner: nn.Module, linear: LinearCall, *, follows: bool) -> None:
    weight, _ = linear.parameters(owner)
    first, second = weight.shape[0], weight.shape[1] * linear.groups
    channels = first if follows != linear.transposed else second
    if channels != layer.num_features:
        raise NoMatchError(f"it has {layer.num_features} channels, {linear.owner!r} has {channels}")


def check_shift(shift: Tensor, linear: LinearCall) -> None:
    """A shift before a linear map is a constant after it only where every output sees the whole kernel."""
    if not shift.any():
        return
    if linear.transposed:
        raise NoMatchError(f"its shift would reach each output of {linear.owner!r} through another part of the kernel")
    if linear.pads_with_zeros:
        raise NoMatchError(f"{linear.owner!r} pads with zeros, which its shift does not reach")


def check_hooks(layer: str, linear: LinearCall, block: nn.Module, inlined: list[str]) -> None:
    """No hook of a module between the two, whose input or output is the value that changes."""
    for path in inlined:
        around_layer, around_linear = (is_inside(name, path) for name in (layer, linear.owner))
        if around_layer != around_linear and has_hooks(block.get_submodule(path)):
            raise NoMatchError(f"the hooks of {path!r} would see another value")


def is_inside(name: str, path: str) -> bool:
    return not path or name == path or name.startswith(f"{path}.")


def check_values(layer: Any, owner: nn.Module, linear: LinearCall) -> None:
    """Parameters of the module, with values, where the layer has its own, of a dtype that goes with it."""
    weight, bias = linear.parameters(owner)
    name, own = repr(linear.owner), layer.running_mean
    for one in (weight, *([] if linear.bias is None else [bias])):
        if not isinstance(one, nn.Parameter) or one.is_meta or one.dtype not in DTYPES:
            raise NoMatchError(f"the weight or bias of {name} is no parameter of a floating point type")
    if linear.bias is None and owner._parameters.get("bias", ...) is not None:
        raise NoMatchError(f"{name} has no place for a bias, or does not use it")
    if weight.device != own.device:
        raise NoMatchError(f"it is on {own.device}, {name} on {weight.device}")
    mixed = weight.dtype in (torch.float16, torch.bfloat16) and own.dtype == torch.float32
    if weight.dtype != own.dtype and not mixed:
        raise NoMatchError(f"it is {own.dtype}, {name} is {weight.dtype}")
