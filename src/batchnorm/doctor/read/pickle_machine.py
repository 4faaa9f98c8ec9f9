"""Reads what a pickle says without doing it: plain containers are built, everything else becomes a placeholder.

Nothing is imported, nothing is called, no attribute is set. What a program may ask for is bounded, and no step of the
machine visits a value again, so a value that holds itself or a thousandfold copy of itself costs nothing.
"""

import pickletools
import sys
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

from batchnorm.doctor.read.source import shown

# An operation keeps up to about 100 bytes. A state dict of 10,000 tensors takes 30 MB by this measure.
OPERATION_BYTES = 100
MOST_BYTES = 128 << 20
# 20 times what any counter or size needs; larger ones cost time that grows with their square
LONGEST_INTEGER = 1024
# bounds the cost of looking at a name, which may be there once and be meant a million times
LONGEST_GLOBAL = 1024

# numbers, strings and bytes: the value is the argument
CONSTANTS = frozenset(
    opcode.name
    for opcode in pickletools.opcodes
    if opcode.arg and not opcode.stack_before and opcode.stack_after not in ([], [pickletools.anyobject])
)
SINGLE = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
SAME_AS = {"GET": "BINGET", "LONG_BINGET": "BINGET", "PUT": "BINPUT", "LONG_BINPUT": "BINPUT"}
# Python 2's names, which pickles of protocol 2 have to this day
RENAMED = {"__builtin__": "builtins", "copy_reg": "copyreg"}
DICTS = frozenset({"collections.OrderedDict", "collections.defaultdict", "collections.Counter"})


class Global:
    """A class or function that the pickle names."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


class Object:
    """What a call would have returned, or an instance of a class: only what was given to it."""

    __slots__ = ("arguments", "elements", "items", "kind", "state")

    def __init__(self, kind: str, arguments: Any) -> None:
        self.kind = kind
        self.arguments = arguments
        self.state: Any = None
        self.items: dict[Any, Any] | None = None
        self.elements: list[Any] | None = None


class Attributed(dict[Any, Any]):
    """A dict of a class that can have attributes, such as OrderedDict."""

    __slots__ = ("attributes",)

    def __init__(self) -> None:
        self.attributes: Any = None


Constructor = Callable[[tuple[Any, ...]], Any]


class Machine:
    """Runs pickle programs, and bounds what all of its programs together may ask for.

    Args:
        constructors: what to build instead of a call, by the name of the function: gets the arguments.
        persistent: what to put for a persistent id.

    Attributes:
        globals: all classes and functions that were named, in order.
    """

    def __init__(self, constructors: Mapping[str, Constructor], persistent: Callable[[Any], Any]) -> None:
        self.constructors = constructors
        self.persistent = persistent
        self.globals: dict[str, Global] = {}
        self.spent = 0
        self.forget()

    def forget(self) -> None:
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def run(self, stream: BinaryIO) -> Any:
        """The value of the program that begins here; the stream is left behind its end.

        Raises:
            ValueError: the program is no valid pickle or asks for too much.
        """
        self.forget()
        try:
            for opcode, argument, _ in pickletools.genops(stream):
                self.spend(argument)
                name = SAME_AS.get(opcode.name, opcode.name)
                if name in CONSTANTS:
                    self.stack.append(argument)
                elif name in SINGLE:
                    self.stack.append(SINGLE[name])
                elif (operation := getattr(self, f"op_{name.lower()}", None)) is not None:
                    operation(argument)
                elif name == "STOP":
                    return self.stack.pop()
                elif name not in ("PROTO", "FRAME"):
                    raise ValueError(f"operation {name} is not known")
        except (IndexError, KeyError) as error:
            raise ValueError(f"the program asks for a value that is not there ({type(error).__name__})") from None
        raise ValueError("the program has no end")

    def spend(self, argument: Any) -> None:
        self.spent += OPERATION_BYTES
        if isinstance(argument, str | bytes | bytearray):
            self.spent += sys.getsizeof(argument)
        elif isinstance(argument, int) and argument.bit_length() > LONGEST_INTEGER:
            raise ValueError(f"an integer of {argument.bit_length()} bits")
        if self.spent > MOST_BYTES:
            raise ValueError(f"the program would fill more than {MOST_BYTES >> 20} MB")

    def op_empty_list(self, _: None) -> None:
        self.stack.append([])

    def op_empty_dict(self, _: None) -> None:
        self.stack.append({})

    op_empty_set = op_empty_list

    def op_mark(self, _: None) -> None:
        self.outer.append(self.stack)
        self.stack = []

    def marked(self) -> list[Any]:
        items, self.stack = self.stack, self.outer.pop()
        return items

    def op_list(self, _: None) -> None:
        items = self.marked()
        self.stack.append(items)

    op_frozenset = op_list

    def op_tuple(self, _: None) -> None:
        items = self.marked()
        self.stack.append(tuple(items))

    def op_tuple1(self, _: None) -> None:
        self.stack.append((self.stack.pop(),))

    def op_tuple2(self, _: None) -> None:
        second, first = self.stack.pop(), self.stack.pop()
        self.stack.append((first, second))

    def op_tuple3(self, _: None) -> None:
        third, second, first = self.stack.pop(), self.stack.pop(), self.stack.pop()
        self.stack.append((first, second, third))

    def op_dict(self, _: None) -> None:
        items = self.marked()
        self.stack.append({})
        self.set_items(items)

    def op_append(self, _: None) -> None:
        self.extend([self.stack.pop()])

    def op_appends(self, _: None) -> None:
        self.extend(self.marked())

    op_additems = op_appends

    def extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Object):
            target.elements = target.elements or []
            target = target.elements
        if not isinstance(target, list):
            raise ValueError(f"something is appended to a {type(target).__name__}")
        target.extend(items)

    def op_setitem(self, _: None) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.set_items([key, value])

    def op_setitems(self, _: None) -> None:
        self.set_items(self.marked())

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Object):
            target.items = target.items if target.items is not None else {}
            target = target.items
        if not isinstance(target, dict) or len(items) % 2:
            raise ValueError(f"items are set in a {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # the hash of a nested tuple visits all that is in it, however often it is there: such keys get a name
            simple = key is None or isinstance(key, str | int | float | bytes)
            target[key if simple else f"<{type(key).__name__.lower()} {len(target)}>"] = value

    def op_pop(self, _: None) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.marked()

    def op_pop_mark(self, _: None) -> None:
        self.marked()

    def op_dup(self, _: None) -> None:
        self.stack.append(self.stack[-1])

    def op_binput(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def op_memoize(self, _: None) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def op_binget(self, index: int) -> None:
        self.stack.append(self.memo[index])

    def named(self, module: Any, name: Any) -> Global:
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("the name of a global is no string")
        if len(module) + len(name) > LONGEST_GLOBAL:
            raise ValueError(f"the name of a global has {len(module) + len(name)} characters")
        full = f"{RENAMED.get(module, module)}.{name}"
        return self.globals.setdefault(full, Global(full))

    def op_global(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self.stack.append(self.named(module, name))

    def op_stack_global(self, _: None) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.stack.append(self.named(module, name))

    def op_inst(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self.stack.append(self.call(self.named(module, name), tuple(self.marked())))

    def op_obj(self, _: None) -> None:
        function, *arguments = self.marked() or [None]
        self.stack.append(self.call(function, tuple(arguments)))

    def op_ext1(self, code: int) -> None:
        self.stack.append(self.named("copyreg", f"extension {code}"))

    op_ext2 = op_ext4 = op_ext1

    def op_reduce(self, _: None) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        self.stack.append(self.call(function, arguments))

    op_newobj = op_reduce

    def op_newobj_ex(self, _: None) -> None:
        named, arguments, function = self.stack.pop(), self.stack.pop(), self.stack.pop()
        self.stack.append(self.call(function, arguments))
        if isinstance(named, dict) and isinstance(self.stack[-1], Object):
            self.stack[-1].state = named

    def call(self, function: Any, arguments: Any) -> Any:
        kind = function.name if isinstance(function, Global) else ""
        if not isinstance(arguments, tuple):
            raise ValueError(f"{shown(kind)} is called with a {type(arguments).__name__}")
        if kind in self.constructors:
            return self.constructors[kind](arguments)
        if kind in DICTS:
            return self.new_dict(arguments)
        if kind == "copyreg._reconstructor" and arguments:
            kind = arguments[0].name if isinstance(arguments[0], Global) else ""
        return Object(kind, arguments)

    def new_dict(self, arguments: tuple[Any, ...]) -> Attributed:
        """Of pairs, as Python 2 wrote them, or empty."""
        pairs = arguments[-1] if arguments and isinstance(arguments[-1], list) else []
        self.spent += OPERATION_BYTES * len(pairs)
        self.stack.append(result := Attributed())
        for pair in pairs:
            if not isinstance(pair, list | tuple) or len(pair) != 2:
                raise ValueError("an OrderedDict is made of something else than pairs")
            self.set_items([*pair])
        self.stack.pop()
        return result

    def op_build(self, _: None) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Object):
            target.state = state
        elif isinstance(target, Attributed):
            target.attributes = state

    def op_binpersid(self, _: None) -> None:
        self.stack.append(self.persistent(self.stack.pop()))

    def op_persid(self, identity: str) -> None:
        self.stack.append(self.persistent(identity))
