"""Protocol buffers as they lie in a file: fields by number. What the numbers mean is the reader's business.

Nothing nests by itself: a message is parsed when somebody asks for it, so depth costs nothing, and a budget for the
whole file bounds time and memory.

Source: https://protobuf.dev/programming-guides/encoding/
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from batchnorm.errors import DataError

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
# a graph of 50 MB has so many; they take 5 to 10 s and up to 400 MB
MOST_FIELDS = 2_000_000
MOST_VARINT_BYTES = 10


@dataclass
class Budget:
    """How many fields of a file may still be read; its path is for messages."""

    path: object
    left: int = MOST_FIELDS

    def spend(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise DataError(f"{self.path}: more than {MOST_FIELDS:,} protobuf fields: refused, it would take too long")


class Message:
    """The fields of one message; unknown ones are kept and never looked at.

    Args:
        data: its bytes.
        budget: of the file.

    Raises:
        DataError: the bytes are not a protobuf message; later, that a field is of another kind than asked for.
    """

    def __init__(self, data: bytes | memoryview, budget: Budget) -> None:
        self.budget = budget
        self.fields: dict[int, list[int | memoryview]] = {}
        view, at = memoryview(data), 0
        while at < len(view):
            budget.spend()
            key, at = read_varint(view, at, budget.path)
            value, at = self._value(view, at, key & 7)
            self.fields.setdefault(key >> 3, []).append(value)

    def _value(self, view: memoryview, at: int, kind: int) -> tuple[int | memoryview, int]:
        if kind == VARINT:
            return read_varint(view, at, self.budget.path)
        if kind == BYTES:
            size, at = read_varint(view, at, self.budget.path)
        elif kind in (FIXED32, FIXED64):
            size = 4 if kind == FIXED32 else 8
        else:
            raise DataError(f"{self.budget.path}: damaged: protobuf has no field of kind {kind}")
        if size > len(view) - at:
            raise DataError(f"{self.budget.path}: damaged: a field of {size:,} bytes where {len(view) - at:,} are left")
        return view[at : at + size], at + size

    def bytes_of(self, number: int) -> Iterator[memoryview]:
        """Every value of a field that holds bytes, text, messages or fixed numbers."""
        for value in self.fields.get(number, []):
            if isinstance(value, int):
                raise DataError(f"{self.budget.path}: damaged: protobuf field {number} is a number, expected bytes")
            yield value

    def messages(self, number: int) -> "Iterator[Message]":
        return (Message(value, self.budget) for value in self.bytes_of(number))

    def message(self, number: int) -> "Message":
        """The last one, as protobuf has it; empty if there is none."""
        last = b""
        for value in self.bytes_of(number):
            last = value
        return Message(last, self.budget)

    def texts(self, number: int) -> Iterator[str]:
        return (decoded(bytes(value)) for value in self.bytes_of(number))

    def text(self, number: int) -> str:
        return next(self.texts(number), "")

    def integers(self, number: int) -> list[int]:
        """Signed 64-bit, packed or not."""
        found: list[int] = []
        for value in self.fields.get(number, []):
            if isinstance(value, int):
                found.append(value)
                continue
            at = 0
            while at < len(value):
                self.budget.spend()
                one, at = read_varint(value, at, self.budget.path)
                found.append(one)
        return [value - (1 << 64) if value >> 63 else value for value in found]

    def integer(self, number: int) -> int:
        return (self.integers(number) or [0])[-1]

    def floats(self, number: int, form: str = "<f") -> list[float]:
        """Of a fixed field, packed or not: ``"<f"`` or ``"<d"``."""
        found: list[float] = []
        for value in self.bytes_of(number):
            if len(value) % struct.calcsize(form):
                raise DataError(f"{self.budget.path}: damaged: {len(value)} bytes are no whole number of floats")
            found += [one for (one,) in struct.iter_unpack(form, value)]
        return found


def read_varint(view: memoryview, at: int, path: object) -> tuple[int, int]:
    """A number of 7 bits per byte, lowest first, and where it ends."""
    value = 0
    for index, byte in enumerate(view[at : at + MOST_VARINT_BYTES]):
        value |= (byte & 127) << 7 * index
        if byte < 128:
            return value & (1 << 64) - 1, at + index + 1
    raise DataError(f"{path}: damaged: a variable-length number at byte {at} does not end")


def write_varint(value: int) -> bytes:
    """Of a number that is not negative."""
    parts = bytearray()
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    parts.append(value)
    return bytes(parts)


def decoded(name: bytes) -> str:
    """A name of a file: bytes that are no UTF-8 stay visible."""
    return name.decode("utf-8", "backslashreplace")
