"""Which blocks of a model get a fused forward: the smallest ones that hold a layer and what it can absorb."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from keyword import iskeyword

from torch import nn
from torch.fx import Graph, Node

from batchnorm.surgery.activations import activation_of_module
from batchnorm.surgery.calls import Argument, Calls, UnusualCallError, usual_arguments
from batchnorm.surgery.fused import FusedForward, Program, has_hooks
from batchnorm.surgery.patterns import LEAVES, Match, absorb, match
from batchnorm.surgery.tracing import CannotTraceError, Trace, trace

Key = tuple[str, str, str]
# what a layer does in one call, or why it absorbs nothing there
Found = list[tuple[str, Match | str]]


@dataclass
class Search:
    """Follows the layers of a model, by name, until it is known what each can absorb; changes nothing."""

    model: nn.Module
    layers: dict[str, nn.Module]
    # those of the layers that blocks of an earlier search have fused
    fused: set[str]
    what: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    forwards: list[FusedForward] = field(default_factory=list)
    calls: Calls = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.names = {id(layer): name for name, layer in self.layers.items()}
        self.open = set(self.layers) - self.fused

    def run(self, calls: Calls) -> None:
        """From the innermost blocks to the model itself; ``calls`` is what is known about how they are called."""
        self.calls = calls
        for name, block in reversed(list(self.model.named_modules())):
            inside = [
                found for m in block.modules() if m is not block and (found := self.names.get(id(m))) in self.open
            ]
            if inside and has_own_forward(block) and not self.is_bypassed(name):
                self.look_into(name, block, [layer for layer in inside if layer is not None])

    def is_bypassed(self, name: str) -> bool:
        """Whether a block is called with what no graph takes, or not at all, but modules in it are."""
        if name in self.calls:
            return self.calls[name] is None
        return bool(name) and name not in self.calls and any(call.startswith(f"{name}.") for call in self.calls)

    def look_into(self, name: str, block: nn.Module, inside: list[str]) -> None:
        label = f"{name or 'the model'} ({type(block).__name__})"
        try:
            arguments = self.calls.get(name) or usual_arguments(block)
            check_names(block)
            traces = [trace(block, arguments, self.leaves(block), training=training) for training in (True, False)]
            inlined = list(dict.fromkeys(path for t in traces for path in t.inlined))
            watched = [path for path in inlined if path and has_hooks(block.get_submodule(path))]
            if watched:
                raise CannotTraceError(f"the hooks of {watched[0]!r} would be passed over")
        except (CannotTraceError, UnusualCallError) as error:
            for layer in inside:
                self.settle(layer, f"in {label}: {error}")
            return
        found = [self.matches(t, block) for t in traces]
        common = set.intersection(*({key(m) for _, m in per_mode if isinstance(m, Match)} for per_mode in found))
        if self.judge(label, inside, found, common, is_model=block is self.model):
            self.forwards.append(self.forward(block, arguments, traces, found, common, inlined))

    def leaves(self, block: nn.Module) -> Callable[[str, nn.Module], bool]:
        """Modules that hold no layer to be followed stay calls in the graph."""
        followed = {
            path
            for path, module in block.named_modules()
            if id(module) not in self.names and any(self.names.get(id(m)) in self.open for m in module.modules())
        }
        return lambda path, module: path not in followed

    def matches(self, t: Trace, block: nn.Module) -> Found:
        """Every call of a layer in the graph, and what it can absorb; an addition is absorbed once."""
        modules, taken, result = dict(block.named_modules()), set[Node](), Found()
        for node in t.graph.nodes:
            layer = self.names.get(id(modules[str(node.target)])) if node.op == "call_module" else None
            if layer is None:
                continue
            found = self.allowed(match(node, modules), modules)
            if isinstance(found, Match) and found.activation in taken:
                found = "the layer of the other operand absorbs the addition"
            if isinstance(found, Match):
                taken.add(found.activation)
            result.append((layer, found))
        return result

    def allowed(self, found: Match | str, modules: dict[str, nn.Module]) -> Match | str:
        """No layer with an activation, and no module whose hooks would see another value."""
        if isinstance(found, str):
            return found
        if modules[found.layer].__dict__.get("activation"):
            return "it has an activation already"
        watched = [path for path in found.passed_over(modules) if has_hooks(modules[path])]
        return f"the hooks of {watched[0]!r} would see another value" if watched else found

    def judge(self, label: str, inside: list[str], found: list[Found], common: set[Key], *, is_model: bool) -> bool:
        """Settle what is known now; True if a layer absorbs something here."""
        absorbs = False
        for layer in inside:
            per_call = [m for per_mode in found for name, m in per_mode if name == layer]
            absorbed = [m for m in per_call if isinstance(m, Match) and key(m) in common]
            others = [m for m in per_call if not (isinstance(m, Match) and key(m) in common)]
            if not per_call:
                self.reasons[layer] = f"the forward of {label} does not call it"
            elif absorbed:
                self.settle(layer, f"in other calls: {reason(others[0])}" if others else "", absorbed[0].what)
                absorbs = True
            elif LEAVES not in others:
                self.settle(layer, reason(others[0]))
            elif is_model:
                self.settle(layer, "its output is the model's")
            else:
                self.reasons[layer] = f"its output is that of {label}"
        return absorbs

    def settle(self, layer: str, reason: str, what: str = "") -> None:
        self.open.discard(layer)
        self.reasons[layer] = reason
        if what:
            self.what[layer] = what

    def forward(
        self,
        block: nn.Module,
        arguments: tuple[Argument, ...],
        traces: list[Trace],
        found: list[Found],
        common: set[Key],
        inlined: list[str],
    ) -> FusedForward:
        modules, unseen, absorbed, programs = dict(block.named_modules()), set(inlined) - {""}, {}, []
        for t, per_mode in zip(traces, found, strict=True):
            taken = [m for _, m in per_mode if isinstance(m, Match) and key(m) in common]
            unseen |= {path for m in taken for path in m.passed_over(modules)}
            absorbed |= {m.layer: m.what for m in taken}
            programs.append(program(t, taken))
        return FusedForward(
            block,
            arguments,
            {True: programs[0], False: programs[1]},
            [modules[path] for path in inlined],
            [modules[path] for path in sorted(unseen)],
            absorbed,
        )


def has_own_forward(block: nn.Module) -> bool:
    return type(block).forward is not nn.Module.forward and activation_of_module(block) is None


def check_names(block: nn.Module) -> None:
    """The names of modules become part of the source of a graph."""
    parts = {part for path, _ in block.named_modules() for part in path.split(".") if path}
    odd = sorted(part for part in parts if not re.fullmatch(r"[\w-]+", part) or iskeyword(part))
    if odd:
        raise CannotTraceError(f"no code can be written for the name {odd[0]!r}")


def key(found: Match) -> Key:
    return found.layer, found.what, str(found.activation.target)


def reason(found: Match | str) -> str:
    if isinstance(found, Match):
        return f"{found.what.removeprefix('absorbed ')} follows in one of the two modes only"
    return "its output leaves the block" if found == LEAVES else found


def program(t: Trace, taken: list[Match]) -> Program:
    """The source of the fused graph, and of the conditions that it was traced under."""
    branches = branches_graph(t)
    for found in taken:
        absorb(t.graph, found)
    code = t.graph.python_code("self")
    source, names = code.src, dict(code.globals)
    if branches is not None:
        code = branches.python_code("self")
        source += code.src.replace("def forward(", "def branches(")
        names |= code.globals
    result = Program(source, names, tuple(value for _, value in t.branches))
    result.compiled()
    return result


def branches_graph(t: Trace) -> Graph | None:
    """The conditions alone, computed from the arguments."""
    if not t.branches:
        return None
    graph, copies = Graph(), {}
    for node in t.graph.nodes:
        if node.op == "placeholder" or (all(n in copies for n in node.all_input_nodes) and is_condition(node, t)):
            copies[node] = graph.node_copy(node, lambda n: copies[n])
    graph.output(tuple(copies[node] for node, _ in t.branches))
    return graph


def is_condition(node: Node, t: Trace) -> bool:
    """Whether a branch depends on a node."""
    conditions = {branch for branch, _ in t.branches}
    return node in conditions or any(is_condition(user, t) for user in node.users)
