"""Calls of linear maps in a graph: ``F.linear``, convolutions and transposed convolutions, of any module."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node
from torch.utils._pytree import tree_leaves

# number of spatial dimensions, and whether transposed
OPERATIONS: dict[Any, tuple[int, bool]] = {
    F.linear: (0, False),
    F.conv1d: (1, False),
    F.conv2d: (2, False),
    F.conv3d: (3, False),
    F.conv_transpose1d: (1, True),
    F.conv_transpose2d: (2, True),
    F.conv_transpose3d: (3, True),
}
NAMES = ("input", "weight", "bias")
OPTIONS = ("stride", "padding", "dilation", "groups")
TRANSPOSED_OPTIONS = ("stride", "padding", "output_padding", "groups", "dilation")


@dataclass
class LinearCall:
    """One call of a linear map with parameters of a module: ``function(input, weight, bias, **options)``."""

    node: Node
    function: Callable[..., Tensor]
    weight: str
    bias: str | None
    spatial: int
    transposed: bool
    options: dict[str, Any]
    # of the calls of F.pad between a layer and this call: everything but the input
    pads: list[dict[str, Any]] = field(default_factory=list)

    @property
    def owner(self) -> str:
        return self.weight.rpartition(".")[0]

    @property
    def groups(self) -> int:
        return self.options.get("groups", 1)

    @property
    def pads_with_zeros(self) -> bool:
        padding = self.options.get("padding", 0)
        by_itself = padding != "valid" if isinstance(padding, str) else any(tree_leaves(padding))
        return by_itself or any(pad.get("mode", "constant") == "constant" for pad in self.pads)

    def parameters(self, owner: nn.Module) -> tuple[Any, Any]:
        """Weight and bias in the module that owns the weight; None for a bias that is not, or not there."""
        holder, _, bias = (self.bias or "").rpartition(".")
        names = (self.weight.rpartition(".")[2], bias if holder == self.owner else "")
        weight, bias = (owner._parameters.get(name) for name in names)
        return weight, bias

    def run(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        for pad in self.pads:
            x = F.pad(x, **pad)
        return self.function(x, weight, bias, **self.options)


def linear_call(node: Node) -> LinearCall | None:
    """None for anything but a linear map with a weight and a bias that are parameters as they are."""
    if node.op != "call_function" or node.target not in OPERATIONS:
        return None
    spatial, transposed = OPERATIONS[node.target]
    options = () if spatial == 0 else TRANSPOSED_OPTIONS if transposed else OPTIONS
    given = dict(zip((*NAMES, *options), node.args, strict=False)) | node.kwargs
    if not isinstance(given.pop("input"), Node):
        return None
    weight: Any = given.pop("weight")
    bias: Any = given.pop("bias", None)
    if any(isinstance(leaf, Node) for leaf in tree_leaves(given)):
        return None
    if not is_parameter(weight) or not (bias is None or is_parameter(bias)):
        return None
    assert callable(node.target)
    bias_name = None if bias is None else str(bias.target)
    return LinearCall(node, node.target, str(weight.target), bias_name, spatial, transposed, given)


def is_parameter(value: Any) -> bool:
    return isinstance(value, Node) and value.op == "get_attr"
