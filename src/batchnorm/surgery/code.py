"""What the code of a forward uses, read from its bytecode: what a graph of the forward would forget."""

import dis
from collections.abc import Iterator
from types import CodeType, FunctionType

from torch import nn

# recomputation, modes of the caller, what is written elsewhere
UNSEEN = ("checkpoint", "is_grad_enabled", "is_autocast_enabled", "is_inference_mode_enabled", "print")
# a proxy answers them as no tensor would
ASKING = ("type", "callable", "id")
LOADS = ("LOAD_ATTR", "LOAD_METHOD")


def codes(cls: type) -> list[CodeType]:
    """The code of ``forward`` and of the methods that it names, directly or not, but for those of torch's classes."""
    found: dict[CodeType, None] = {}
    names = ["forward"]
    for name in names:
        for base in cls.__mro__:
            function = vars(base).get(name)
            if isinstance(function, FunctionType) and not base.__module__.startswith("torch."):
                inner = [c for c in function.__code__.co_consts if isinstance(c, CodeType)]
                found |= dict.fromkeys([function.__code__, *inner])
                names += [n for code in (function.__code__, *inner) for n in code.co_names if n not in names]
    return list(found)


def chains(code: CodeType) -> Iterator[list[str]]:
    """What is loaded: ["self", "conv", "weight"] for ``self.conv.weight``, ["print"] for a global."""
    chain: list[str] = []
    for instruction in dis.get_instructions(code):
        if instruction.opname in LOADS:
            chain = [*(chain or [""]), instruction.argval]
            continue
        if chain:
            yield chain
        chain = []
        if instruction.opname.startswith(("LOAD_FAST", "LOAD_DEREF", "LOAD_GLOBAL")):
            name = instruction.argval
            chain = [name[-1] if isinstance(name, tuple) else name]
    if chain:
        yield chain


def why_unseen(module: nn.Module) -> str:
    """What keeps a graph from doing what the forward does; "" if nothing that the code shows."""
    for code in codes(type(module)):
        names = {*code.co_varnames, *code.co_freevars}
        for chain in chains(code):
            if used := [name for name in UNSEEN if name in chain]:
                return f"its forward uses {used[0]}"
            first, last = chain[0], chain[-1]
            if first in ASKING and first not in names:
                return f"its forward uses {first}"
            if last == "training" and (len(chain) > 2 or first not in owners(code)):
                return "its forward asks for the mode of another module"
    return ""


def reads_submodules(module: nn.Module) -> bool:
    """Whether a forward may read attributes of the modules that it calls, as in ``self.conv.stride``."""
    return any(len(chain) > 2 and chain[0] in owners(code) for code in codes(type(module)) for chain in chains(code))


def owners(code: CodeType) -> tuple[str, ...]:
    """The names of the module in its method, and in functions inside it."""
    return (*code.co_varnames[: min(code.co_argcount, 1)], "self")
