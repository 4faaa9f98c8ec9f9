"""Proof that a forward does the same where layers are replaced by what remains of them, and biases are there."""

from collections import defaultdict
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node

from batchnorm.surgery.calls import copy_structure
from batchnorm.surgery.fold_matches import Match, has_residual
from batchnorm.surgery.fold_search import Root
from batchnorm.surgery.foldable import become, remainder
from batchnorm.surgery.folding import scale_and_shift
from batchnorm.surgery.tracing import CannotTraceError, trace


def why_not_the_same(root: Root, matches: dict[str, Match], layers: dict[str, Any]) -> dict[str, str]:
    """The layers that cannot be replaced as their matches say, and why; {} if all can, together.

    A forward may ask for the class or an attribute of a layer, or never use a bias. So the structure of the folded
    block, without values, is followed again: its graph must be the same but for the biases that were added.
    """
    why = why_not_together(root, matches, layers)
    if len(why) > 1:
        alone = [why_not_together(root, {name: match}, layers) for name, match in matches.items()]
        return {name: reason for one in alone for name, reason in one.items()} or why
    return why


def why_not_together(root: Root, matches: dict[str, Match], layers: dict[str, Any]) -> dict[str, str]:
    different = f"the forward of {root.name or 'the model'} ({type(root.block).__name__}) would do something else"
    try:
        graph = trace(folded_structure(root, matches, layers), root.arguments, root.leaves, training=False).graph
    except CannotTraceError:
        return dict.fromkeys(matches, different)
    if flow(graph) != flow(root.trace.graph):
        return dict.fromkeys(matches, different)
    expected: dict[Node, set[str]] = defaultdict(set)
    for name, match in matches.items():
        for linear in match.linears:
            expected[linear.node] |= {bias_of(match)} if needs_bias(layers[name], match) else set()
    wrong = {
        old
        for old, new in zip(steps(root.trace.graph), steps(graph), strict=True)
        if parameters(new) - parameters(old) != expected.get(old, set())
    }
    if wrong - expected.keys():
        return dict.fromkeys(matches, different)
    return {
        name: f"its shift needs a bias, which {match.linears[0].owner!r} does not use"
        for name, match in matches.items()
        if any(linear.node in wrong for linear in match.linears)
    }


def folded_structure(root: Root, matches: dict[str, Match], layers: dict[str, Any]) -> nn.Module:
    again = copy_structure(root.block)
    for name, match in matches.items():
        become(again.get_submodule(match.layer), remainder_of(layers[name], match))
        owner = again.get_submodule(match.linears[0].owner)
        if needs_bias(layers[name], match) and owner._parameters.get("bias", ...) is None:
            owner.bias = nn.Parameter(torch.empty(0, device="meta"))
    return again


def needs_bias(layer: Any, match: Match) -> bool:
    """Whether folding adds a bias where there is none."""
    return match.linears[0].bias is None and (match.follows or bool(scale_and_shift(layer)[1].any()))


def bias_of(match: Match) -> str:
    return f"{match.linears[0].owner}.bias".removeprefix(".")


def remainder_of(layer: Any, match: Match) -> nn.Module:
    with_residual = any(has_residual(call) for call in match.calls)
    return remainder(getattr(layer, "activation", None), with_residual=with_residual)


def steps(graph: Graph) -> list[Node]:
    return [node for node in graph.nodes if node.op != "get_attr"]


def parameters(node: Node) -> set[str]:
    return {str(argument.target) for argument in node.all_input_nodes if argument.op == "get_attr"}


def flow(graph: Graph) -> list[Any]:
    """The operations of a graph and where their inputs come from, but for parameters."""
    order = {node: position for position, node in enumerate(steps(graph))}
    return [(n.op, n.target, [order[i] for i in n.all_input_nodes if i in order]) for n in steps(graph)]
