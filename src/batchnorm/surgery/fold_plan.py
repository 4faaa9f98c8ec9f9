"""What goes where: the match of each layer, and the new weights and biases in float64; nothing is changed."""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from batchnorm.surgery.fold_matches import (
    Match,
    NoMatchError,
    NoNeighbourError,
    ahead,
    behind,
    check_channels,
    check_dimensions,
    check_hooks,
    check_only_pair,
    check_shift,
    check_values,
)
from batchnorm.surgery.fold_proof import why_not_the_same
from batchnorm.surgery.fold_search import Root, Search
from batchnorm.surgery.folding import fold_after, fold_before, scale_and_shift
from batchnorm.surgery.linear_calls import LinearCall


@dataclass(eq=False)
class Group:
    """A linear map, by the name of its module in the model, and the layers that go into it."""

    root: Root
    owner: str
    linears: list[LinearCall]
    weight: Tensor
    bias: Tensor | None
    folded_weight: Tensor
    folded_bias: Tensor | None
    dtype: torch.dtype
    # the layers that normalize its input, with their calls, and its output
    before: Any = None
    calls: list[Node] = field(default_factory=list)
    after: Any = None

    @property
    def weight_name(self) -> str:
        return self.linears[0].weight.rpartition(".")[2]

    @property
    def bias_name(self) -> str:
        return (self.linears[0].bias or "bias").rpartition(".")[2]


@dataclass
class Plan:
    """Groups of what is folded, by layer, and why the other layers are left alone."""

    # those that can be folded as far as they themselves are concerned
    layers: dict[str, Any]
    search: Search
    groups: dict[str, Group] = field(default_factory=dict)
    matches: dict[str, Match] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    def make(self) -> None:
        self.search.follow(self.search.model)
        found: dict[str, dict[str, Match]] = defaultdict(dict)
        for name, layer in self.layers.items():
            root = self.search.root_of(layer)
            if isinstance(root, str):
                self.reasons[name] = root
            elif match := self.match(name, root):
                found[root.name][name] = match
        for root_name, matches in found.items():
            root = self.search.roots[root_name]
            while why := why_not_the_same(root, matches, self.layers):
                self.reasons |= why
                matches = {name: match for name, match in matches.items() if name not in why}
            for name, match in matches.items():
                self.fold(name, match, root)

    def all_groups(self) -> list[Group]:
        return list(dict.fromkeys(self.groups.values()))

    def match(self, name: str, root: Root) -> Match | None:
        """With what precedes, or else with what follows."""
        calls, reasons = root.calls[id(self.layers[name])], list[NoMatchError]()
        for follows, find in ((True, behind), (False, ahead)):
            try:
                match = Match(str(calls[0].target), calls, find(calls, root.modules), follows)
                self.check(self.layers[name], match, root)
            except NoMatchError as error:
                reasons.append(error)
            else:
                return match
        # with a neighbour on one side, the other side explains nothing
        neighbours = [error for error in reasons if not isinstance(error, NoNeighbourError)]
        self.reasons[name] = "; ".join(dict.fromkeys(map(str, neighbours or reasons)))
        return None

    def check(self, layer: Any, match: Match, root: Root) -> None:
        linear, seen = match.linears[0], self.search.seen
        owner = root.block.get_submodule(linear.owner)
        check_only_pair(root.trace.graph, match.layer, match.linears)
        check_values(layer, owner, linear)
        check_dimensions(layer, linear, None if seen is None else seen[self.search.names[id(layer)]].dims or None)
        check_channels(layer, owner, linear, follows=match.follows)
        if not match.follows:
            if getattr(layer, "activation", None):
                raise NoMatchError("it applies an activation to its output")
            check_shift(scale_and_shift(layer)[1], linear)
        check_hooks(match.layer, linear, root.block, root.trace.inlined)
        for module in (layer, owner):
            reason = self.search.why_not_known(module, len(match.calls), root)
            if reason:
                raise NoMatchError(reason)

    def fold(self, name: str, match: Match, root: Root) -> None:
        """In float64, if the result can be written in the dtype of the weight."""
        group, linear = self.group(match, root), match.linears[0]
        how = {"transposed": linear.transposed, "groups": linear.groups}
        affine = scale_and_shift(self.layers[name])
        weight, bias = (fold_after if match.follows else fold_before)(
            group.folded_weight, group.folded_bias, *affine, **how
        )
        for tensor in (weight, bias):
            if tensor is not None and not tensor.to(group.dtype).isfinite().all():
                largest = f"{tensor.abs().max().item():.3g}"
                self.reasons[name] = f"{group.owner!r} would hold {largest}, which {group.dtype} cannot"
                return
        group.folded_weight, group.folded_bias = weight, bias
        if match.follows:
            group.after = self.layers[name]
        else:
            # with the padding between the two
            group.before, group.calls, group.linears = self.layers[name], match.calls, match.linears
        self.groups[name], self.matches[name] = group, match

    def group(self, match: Match, root: Root) -> Group:
        linear = match.linears[0]
        owner = root.block.get_submodule(linear.owner)
        for group in self.groups.values():
            if group.root is root and group.linears[0].weight == linear.weight:
                return group
        weight, bias = linear.parameters(owner)
        wide, wide_bias = weight.detach().double(), None if bias is None else bias.detach().double()
        name = self.search.names[id(owner)]
        return Group(root, name, match.linears, wide, wide_bias, wide, wide_bias, weight.dtype)
