"""Tensors that TensorFlow stores in parts, as partitioned variables are: an entry that lists slices, and one for each.

Source: TensorFlow's ``util/saved_tensor_slice_util.cc`` (the keys of slices), ``lib/strings/ordered_code.cc`` (numbers
in them), ``framework/tensor_slice.proto``.
"""

from batchnorm.doctor.read.wire import Message

FULL = -1

Extent = tuple[int, int]


def read_slices(record: Message) -> list[list[Extent]]:
    """Start and length along each dimension, of each slice that an entry lists; length -1 is the whole dimension."""
    return [
        [(extent.integer(1), extent.integer(2) if 2 in extent.fields else FULL) for extent in part.messages(1)]
        for part in record.messages(7)
    ]


def place_of(extents: list[Extent], shape: tuple[int, ...]) -> tuple[slice, ...] | None:
    """Where a slice lies in the whole tensor; None if it does not."""
    if len(extents) != len(shape):
        return None
    ends = [size if length == FULL else start + length for (start, length), size in zip(extents, shape, strict=True)]
    if any(not 0 <= start <= end <= size for (start, _), end, size in zip(extents, ends, shape, strict=True)):
        return None
    return tuple(slice(start, end) for (start, _), end in zip(extents, ends, strict=True))


def slice_key(name: bytes, extents: list[Extent]) -> bytes:
    """The key of a slice: a zero, the name, how many dimensions, and the extents, so that keys sort as they do."""
    numbers = b"".join(signed(start) + signed(length) for start, length in extents)
    return unsigned(0) + text(name) + unsigned(len(extents)) + numbers


def unsigned(value: int) -> bytes:
    """How many bytes, and the bytes."""
    data = value.to_bytes((value.bit_length() + 7) // 8, "big")
    return bytes([len(data)]) + data


def signed(value: int) -> bytes:
    """As many ones as there are bytes, then the number in two's complement; negative numbers all inverted.

    Example:
        >>> signed(0), signed(-1), signed(63), signed(64)
        (b'\\x80', b'\\x7f', b'\\xbf', b'\\xc0@')
    """
    length = (value if value >= 0 else ~value).bit_length() // 7 + 1
    ones = (1 << length) - 1 << 7 * length
    number = int.from_bytes(value.to_bytes(length, "big", signed=True), "big")
    return (number ^ ones).to_bytes(length, "big")


def text(name: bytes) -> bytes:
    """A name whose bytes 0 and 255 are escaped, and its end."""
    escapes = {0x00: b"\x00\xff", 0xFF: b"\xff\x00"}
    return b"".join(escapes.get(byte, bytes([byte])) for byte in name) + b"\x00\x01"
