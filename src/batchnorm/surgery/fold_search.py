"""The graphs that tell what becomes of the layers of a model: of the largest blocks that torch.fx can follow."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from torch import nn
from torch.fx import Node

from batchnorm.surgery.calls import Argument, UnusualCallError, usual_arguments
from batchnorm.surgery.code import codes
from batchnorm.surgery.fold_observe import Seen
from batchnorm.surgery.tracing import CannotTraceError, Trace, trace

LINEAR = (nn.Linear, nn.modules.conv._ConvNd)


@dataclass
class Root:
    """A block with a graph of its forward, as it is called; ``name`` as in ``model.named_modules()``."""

    name: str
    block: nn.Module
    arguments: tuple[Argument, ...]
    trace: Trace
    leaves: Callable[[str, nn.Module], bool]

    def __post_init__(self) -> None:
        self.modules = dict(self.block.named_modules())
        # by the id of the module
        self.calls: dict[int, list[Node]] = defaultdict(list)
        for node in self.trace.graph.nodes:
            if node.op == "call_module":
                self.calls[id(self.modules[str(node.target)])].append(node)

    @property
    def condition(self) -> str:
        """What was taken for granted about the calls, in words; "" for nothing."""
        given = [f"{a.name}={a.value!r}" for a in self.arguments if not a.is_tensor and a.value != a.default]
        parts = [f"for calls with {', '.join(given)}"] if given else []
        if self.trace.branches:
            parts.append("for inputs whose shapes make it branch as the example does")
        return ", ".join(parts)


@dataclass
class Search:
    """Follows a model from the outside to the inside; changes nothing."""

    model: nn.Module
    layers: dict[str, nn.Module]
    # how the modules were called with the example, by name; None without one
    seen: dict[str, Seen] | None
    roots: dict[str, Root] = field(default_factory=dict)
    # by id, the blocks that cannot be followed, and why
    failed: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.names = {id(module): name for name, module in self.model.named_modules()}
        self.ids = {id(layer) for layer in self.layers.values()}
        for name, module in self.model.named_modules():
            if is_operation_of_torch(module) and id(module) not in self.ids and self.holds(module):
                self.failed[id(module)] = f"{name} ({type(module).__name__}): it is one operation of torch"

    def follow(self, block: nn.Module) -> bool:
        """Whether there is a graph of a block; what is inside is followed by itself only where there is none."""
        if self.attempt(block):
            return True
        inside = list(self.blocks_inside(block)) if self.holds_layer(block) else []
        followed = [self.follow(child) for child in inside]
        if all(followed) or not self.attempt(block):
            return False
        for child, alone in zip(inside, followed, strict=True):
            if alone:
                self.roots.pop(self.names[id(child)], None)
        return True

    def attempt(self, block: nn.Module) -> bool:
        name, leaves = self.names[id(block)], self.leaves_of(block)
        try:
            arguments = self.arguments(name, block)
            graph = trace(block, arguments, leaves, training=False)
            modes = [path for path in graph.inlined if asks_for_mode(block.get_submodule(path))]
            if modes:
                raise CannotTraceError(f"{modes[0] or 'it'} asks for its mode, which is training: call model.eval()")
        except (CannotTraceError, UnusualCallError) as error:
            self.failed[id(block)] = f"{name or 'the model'} ({type(block).__name__}): {error}"
            return False
        self.failed.pop(id(block), None)
        self.roots[name] = Root(name, block, arguments, graph, leaves)
        return True

    def arguments(self, name: str, block: nn.Module) -> tuple[Argument, ...]:
        if self.seen is None:
            return usual_arguments(block)
        seen = self.seen[name]
        if seen.count == 0:
            raise UnusualCallError("the example does not call it")
        if seen.arguments is None:
            raise UnusualCallError("it is called in ways that no one graph describes")
        return seen.arguments

    def leaves_of(self, block: nn.Module) -> Callable[[str, nn.Module], bool]:
        """Modules without a layer or a linear map, layers, and what cannot be followed stay calls in the graph."""
        followed = {path for path, m in block.named_modules() if m is block or self.is_followed(m)}
        return lambda path, module: path not in followed

    def is_followed(self, module: nn.Module) -> bool:
        return id(module) not in self.ids and id(module) not in self.failed and self.holds(module)

    def holds(self, module: nn.Module) -> bool:
        """Whether a linear map or a layer is in a module, or is it."""
        return any(isinstance(m, LINEAR) or id(m) in self.ids for m in module.modules())

    def holds_layer(self, block: nn.Module) -> bool:
        return any(id(m) in self.ids for m in block.modules())

    def blocks_inside(self, block: nn.Module) -> Iterator[nn.Module]:
        """The outermost blocks in a block that have a forward."""
        for child in block.children():
            if self.is_followed(child) and type(child).forward is not nn.Module.forward:
                yield child
            elif id(child) not in self.ids:
                yield from self.blocks_inside(child)

    def root_of(self, layer: nn.Module) -> Root | str:
        """The one graph with calls of a layer, or why there is none."""
        if layer is self.model:
            return "it is the model: there is nothing to fold it into"
        found = [root for root in self.roots.values() if id(layer) in root.calls]
        if len(found) == 1:
            return found[0]
        if found:
            return f"it is called in {len(found)} blocks: {', '.join(repr(root.name) for root in found)}"
        holders = self.failed_holders(layer)
        return f"torch.fx cannot follow {holders[-1]}" if holders else "the forward of the model does not call it"

    def failed_holders(self, module: nn.Module) -> list[str]:
        """The blocks around a module that cannot be followed, from the outside, and why."""
        holders = [block for block in self.model.modules() if id(block) in self.failed]
        return [self.failed[id(block)] for block in holders if any(m is module for m in block.modules())]

    def why_not_known(self, module: nn.Module, uses: int, root: Root) -> str:
        """Why there may be other calls of a module than those in the graph; "" if there are none.

        Blocks that cannot be followed may call whatever they hold. What they do call is counted on the example.
        """
        holders = self.failed_holders(module)
        if not holders:
            return ""
        if self.seen is None:
            return f"an example is needed, since torch.fx cannot follow {holders[0]}"
        counts = [self.seen[self.names[id(m)]].count for m in (module, root.block)]
        if counts[0] == uses * counts[1]:
            return ""
        return f"it has other calls than those in {root.name or 'the model'}, and torch.fx cannot follow {holders[0]}"


def is_operation_of_torch(module: nn.Module) -> bool:
    """Modules like ``nn.TransformerEncoderLayer``, which may use what they hold without calling it."""
    of_torch = type(module).__module__.startswith("torch.nn.modules.") and not isinstance(module, nn.Sequential)
    return of_torch and type(module).forward is not nn.Module.forward and not isinstance(module, LINEAR)


def asks_for_mode(module: nn.Module) -> bool:
    """Whether a module in training mode may do something else in evaluation."""
    return module.training and any("training" in code.co_names for code in codes(type(module)))
