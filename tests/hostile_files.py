"""Files that no honest program writes: zip archives, pickles and safetensors put together by hand."""

import json
import struct
import zlib
from pathlib import Path

PICKLE_OF_TWO = b"\x80\x02K\x02."


def write_zip(path: Path, members, *, crc=None, method=0, flags=0, sizes=None, comment=b"") -> Path:
    """A zip archive; each member is a name and its bytes, or the number of zero bytes that it claims, as a hole."""
    directory, at = [], 0
    with open(path, "wb") as file:
        for name, content in members:
            name = name.encode("utf-8", "surrogatepass")
            length = content if isinstance(content, int) else len(content)
            check = (0 if isinstance(content, int) else zlib.crc32(content)) if crc is None else crc
            packed, size = (length, length) if sizes is None else sizes
            common = struct.pack("<HHHHIIIHH", flags, method, 0, 0, check, packed, size, len(name), 0)
            file.write(b"PK\x03\x04\x14\x00" + common + name)
            directory.append(b"PK\x01\x02\x14\x00\x14\x00" + common + struct.pack("<HHHII", 0, 0, 0, 0, at) + name)
            if isinstance(content, int):
                file.seek(length, 1)
            else:
                file.write(content)
            at = file.tell()
        raw = b"".join(directory)
        count = len(directory)
        end = struct.pack("<HHHHIIH", 0, 0, count, count, len(raw), at, len(comment))
        file.write(raw + b"PK\x05\x06" + end + comment)
    return path


def torch_file(path: Path, pickle: bytes, *others, **options) -> Path:
    return write_zip(path, [("archive/data.pkl", pickle), *others], **options)


def text(value: str) -> bytes:
    """BINUNICODE."""
    raw = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


def integer(value: int) -> bytes:
    """LONG1."""
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def numbers(values) -> bytes:
    """A tuple of integers."""
    return b"(" + b"".join(map(integer, values)) + b"t"


def tensor(key: str, count: int, shape, stride, offset=0, kind="FloatStorage") -> bytes:
    """The opcodes of a tensor."""
    storage = b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + text(key) + text("cpu") + integer(count) + b"tQ"
    arguments = b"(" + storage + integer(offset) + numbers(shape) + numbers(stride) + b"\x89}t"
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"R"


def state_dict(**entries: bytes) -> bytes:
    return b"\x80\x02}(" + b"".join(text(name) + value for name, value in entries.items()) + b"u."


def write_safetensors(path: Path, header, data: bytes = b"", *, length=None) -> Path:
    """The header as it is, if it is bytes."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def entry(dtype: str, shape, begin: int, end: int):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
