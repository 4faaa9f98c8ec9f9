"""What stands next to each BN layer, as batchnorm.fold proves it: for rules about biases, dropout and folding."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node

from batchnorm.doctor.live_data import call_of, call_with_input, sample_of, undisturbed
from batchnorm.doctor.rule import Subject
from batchnorm.surgery.code import codes
from batchnorm.surgery.fold_matches import (
    NoMatchError,
    behind,
    check_channels,
    check_dimensions,
    check_hooks,
    check_only_pair,
    check_values,
    input_of,
)
from batchnorm.surgery.fold_observe import Seen, bare_copy, observe
from batchnorm.surgery.fold_plan import Group, Plan
from batchnorm.surgery.fold_search import Root, Search
from batchnorm.surgery.foldable import DROPOUT, HOLDERS, by_class, normalizing_layers, why_not_foldable
from batchnorm.surgery.folding import by_output

# those that keep mean and variance as they are
KEEPING_MOMENTS = (nn.AlphaDropout, nn.FeatureAlphaDropout)
DROPOUT_FUNCTIONS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d)


@dataclass(frozen=True)
class Folded:
    """What folding would make of one layer.

    Attributes:
        layer: its path.
        owner: path of the module whose weight would take it up.
        largest: largest absolute value of the folded weight and bias.
        widest: the largest range of an output channel, over the median of those that are not 0.
    """

    layer: str
    owner: str
    largest: float
    widest: float


@dataclass(frozen=True)
class DeadBias:
    """A bias that the layer behind it subtracts again: of which module, its name in it, and its largest value."""

    layer: str
    owner: str
    largest: float


@dataclass(frozen=True)
class Dropped:
    """A dropout directly before a layer: its name, or that of the function, and its probability."""

    layer: str
    dropout: str
    p: float


@dataclass
class Flow:
    """What was found, without the model in it."""

    folded: list[Folded]
    dead: list[DeadBias]
    dropped: list[Dropped]


def flow_of(subject: Subject) -> Flow:
    """Analysed once. Where torch.fx cannot follow the model, its blocks are followed; what is not proved is not here.

    With a loader its first input is the example that tells how modules are called.
    """
    if "flow" not in subject.kept:
        model = subject.model
        assert model is not None
        if is_compiled(model) or not normalizing_layers(model):
            subject.kept["flow"] = Flow([], [], [])
        else:
            seen = observed(subject, model)
            with undisturbed(model), torch.inference_mode(False):
                subject.kept["flow"] = analysed(model, seen)
    return subject.kept["flow"]


def is_compiled(model: nn.Module) -> bool:
    """By name, because importing torch._dynamo takes seconds."""
    return any(type(m).__name__ == "OptimizedModule" for m in model.modules())


def observed(subject: Subject, model: nn.Module) -> dict[str, Seen] | None:
    """How the modules are called with the first item; None without one, or where the model cannot be copied."""
    if subject.loader is None or call_of(subject) is not call_with_input:
        return None
    item = sample_of(subject).items[0]
    with undisturbed(model):
        try:
            return observe(bare_copy(model), (item[0] if isinstance(item, (tuple, list)) else item,))
        except ValueError:
            return None


def analysed(model: nn.Module, seen: dict[str, Seen] | None) -> Flow:
    layers = normalizing_layers(model)
    why = why_not_foldable(model, layers)
    plan = Plan({name: layer for name, layer in layers.items() if name not in why}, Search(model, layers, seen))
    plan.make()
    folded = [folded_numbers(name, group) for name, group in plan.groups.items()]
    held = {id(m) for holder in model.modules() if isinstance(holder, tuple(HOLDERS)) for m in holder.modules()}
    dead, dropped = [], []
    for name, layer in layers.items():
        root = plan.search.root_of(layer)
        if isinstance(root, Root):
            dropped += dropouts_before(name, layer, root)
            if id(layer) not in held and not by_class(layer) and isinstance(layer.running_mean, Tensor):
                dead += dead_biases(name, layer, root, plan.search)
    return Flow(folded, dead, dropped)


def folded_numbers(name: str, group: Group) -> Folded:
    linear = group.linears[0]
    weight = group.folded_weight
    largest = [tensor.abs().max().item() for tensor in (weight, group.folded_bias) if tensor is not None]
    ranges = by_output(weight, linear.transposed, linear.groups).flatten(1).abs().amax(1)
    ranges = ranges[ranges > 0]
    widest = (ranges.max() / ranges.median()).item() if len(ranges) else 1.0
    return Folded(name, group.owner, max(largest), widest)


def dead_biases(name: str, layer: Any, root: Root, search: Search) -> Iterator[DeadBias]:
    """The bias of the linear map before a layer, if nothing but the layer sees it, in both modes."""
    calls = root.calls[id(layer)]
    try:
        linear = behind(calls, root.modules)[0]
        owner = root.block.get_submodule(linear.owner)
        _, bias = linear.parameters(owner)
        dropped = any(getattr(module, "p", 0) for call in calls for module, _ in chain_before(call, root))
        if not isinstance(bias, Tensor) or dropped or reads_mode(root):
            return
        check_only_pair(root.trace.graph, str(calls[0].target), behind(calls, root.modules))
        check_values(layer, owner, linear)
        seen = search.seen
        check_dimensions(layer, linear, None if seen is None else seen[search.names[id(layer)]].dims or None)
        check_channels(layer, owner, linear, follows=True)
        check_hooks(str(calls[0].target), linear, root.block, root.trace.inlined)
    except NoMatchError:
        return
    if any(search.why_not_known(module, len(calls), root) for module in (layer, owner)):
        return
    yield DeadBias(name, search.names[id(owner)], bias.detach().abs().max().item() if bias.numel() else 0.0)


def reads_mode(root: Root) -> bool:
    """Whether the forward of a module in the graph asks for its mode: the graph is that of evaluation."""
    modules = [root.block.get_submodule(path) for path in root.trace.inlined]
    return any("training" in code.co_names for module in modules for code in codes(type(module)))


def chain_before(call: Node, root: Root) -> Iterator[tuple[Any, Node]]:
    """The calls of modules that do nothing in evaluation, and of dropout functions, directly before a call."""
    node = input_of(call)
    while True:
        module = root.modules.get(str(node.target)) if node.op == "call_module" else None
        is_function = node.op == "call_function" and node.target in DROPOUT_FUNCTIONS
        if not (is_function or type(module) is nn.Identity or type(module) in DROPOUT):
            return
        yield module, node
        node = node.all_input_nodes[0]


def probability(module: Any, node: Node) -> float:
    """With which a step drops in training and not in evaluation; 0 if it keeps mean and variance."""
    if module is not None:
        return 0.0 if isinstance(module, KEEPING_MOMENTS) else float(getattr(module, "p", 0.0))
    given = dict(zip(("input", "p", "training"), node.args, strict=False)) | node.kwargs
    p = given.get("p", 0.5)
    # the graph is that of evaluation: a function that still drops there does so in both modes
    return float(p) if given.get("training", True) is False and isinstance(p, (int, float)) else 0.0


def dropouts_before(name: str, layer: Any, root: Root) -> Iterator[Dropped]:
    for call in root.calls[id(layer)]:
        try:
            steps = list(chain_before(call, root))
        except NoMatchError:
            continue
        for module, node in steps:
            if (p := probability(module, node)) > 0:
                called = str(node.target) if module is not None else getattr(node.target, "__name__", "dropout")
                yield Dropped(name, path_in_model(root, called) if module is not None else called, p)
                return


def path_in_model(root: Root, path: str) -> str:
    return f"{root.name}.{path}" if root.name else path
