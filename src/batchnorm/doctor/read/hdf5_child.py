"""The side of the HDF5 reader that may die: a script that prints what a file holds, and imports nothing of ours.

    python -I hdf5_child.py MEMORY SECONDS PATH START SIZE [NAME]

Prints the length of a JSON header in eight bytes, the header, then the values: of the dataset NAME, or without it of
all short vectors. Links to other files, and datasets that lie in other files, are named and not followed.
"""

import contextlib
import io
import json
import sys

# a BN layer of more channels does not exist; together they have to pass through a pipe
LONGEST_VECTOR = 1 << 16
MOST_VALUE_BYTES = 1 << 26
MOST_OBJECTS = 200_000
MOST_NAME_BYTES = 1 << 25
LONGEST_NAME = 4096
DEEPEST = 64
# a configuration of a large Keras model has some 100 KB
MOST_TEXT = 1 << 24
ROOT_TEXTS = ("model_config", "keras_version", "backend")


def limit(memory: int, seconds: int) -> None:
    """Where the system can: no more memory and time than this, no core dump, no file written."""
    with contextlib.suppress(ImportError):
        import resource

        for kind, most in (("AS", memory), ("CPU", seconds), ("CORE", 0), ("FSIZE", 0)):
            number = getattr(resource, f"RLIMIT_{kind}")
            _, hard = resource.getrlimit(number)
            most = most if hard == resource.RLIM_INFINITY else min(most, hard)
            # macOS knows RLIMIT_AS and refuses to set it
            with contextlib.suppress(ValueError, OSError):
                resource.setrlimit(number, (most, most))


class Part(io.RawIOBase):
    """A part of a file as a file: where a zip archive stores it without compression."""

    def __init__(self, path: str, start: int, size: int) -> None:
        self.file = open(path, "rb", buffering=0)  # noqa: SIM115
        self.start, self.size, self.at = start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = offset + (0, self.at, self.size)[whence]
        return self.at

    def readinto(self, buffer) -> int:
        self.file.seek(self.start + self.at)
        data = self.file.read(max(0, min(len(buffer), self.size - self.at)))
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)


class Listing:
    """What the header says.

    Attributes:
        tensors: name, shape, dtype, NumPy's code of the stored values, and how many of their bytes follow; -1: none.
        names: attribute "name" of groups, by the path of the group.
        texts: attributes of the root.
        refused: what is not followed, and why.
    """

    def __init__(self, wanted: str) -> None:
        self.wanted = wanted
        self.tensors: list[tuple[str, list[int], str, str, int]] = []
        self.names: dict[str, str] = {}
        self.texts: dict[str, str] = {}
        self.refused: list[tuple[str, str]] = []
        self.values: list[bytes] = []
        self.visited: set[tuple[int, int]] = set()
        self.left = MOST_VALUE_BYTES
        self.name_bytes = 0

    def note(self, name: str) -> None:
        self.name_bytes += len(name)
        count = len(self.tensors) + len(self.visited) + len(self.refused)
        if count > MOST_OBJECTS or self.name_bytes > MOST_NAME_BYTES:
            raise ValueError(f"more than {MOST_OBJECTS} objects, or too long names")

    def walk(self, h5py, group, path: str, depth: int) -> None:
        info = h5py.h5o.get_info(group.id)
        if (info.fileno, info.addr) in self.visited:
            self.refused.append((path, "a group that contains itself, or stands in two places"))
            return
        self.visited.add((info.fileno, info.addr))
        if depth > DEEPEST:
            raise ValueError(f"groups nested deeper than {DEEPEST}")
        if "name" in group.attrs:
            self.names[path] = text_of(group.attrs["name"])
        for name in group:
            inner = f"{path}/{readable(name)}" if path else readable(name)
            self.note(inner)
            if len(inner) > LONGEST_NAME:
                self.refused.append((inner[:LONGEST_NAME], "an object with a name too long"))
            elif not isinstance(group.get(name, getlink=True), h5py.HardLink):
                self.refused.append((inner, "a link"))
            elif isinstance(item := group[name], h5py.Group):
                self.walk(h5py, item, inner, depth + 1)
            elif isinstance(item, h5py.Dataset):
                self.take(item, inner)

    def take(self, item, name: str) -> None:
        if item.is_virtual or item.external:
            self.refused.append((name, "a dataset whose values lie in other files"))
            return
        shape: list[int] = list(item.shape or ())
        code = item.dtype.newbyteorder("<").str
        # Keras stores bfloat16 as two bytes without a meaning
        half = code == "|V2" and "dtype" in item.attrs and text_of(item.attrs["dtype"]) == "bfloat16"
        dtype = "bfloat16" if half else item.dtype.name
        numbers = item.shape is not None and (item.dtype.kind in "fiu" or half)
        short = len(shape) == 1 and shape[0] <= LONGEST_VECTOR and item.nbytes <= self.left
        following = -1
        if numbers and (short if not self.wanted else name == self.wanted):
            self.values.append(item[()].astype(code).tobytes())
            following = len(self.values[-1])
            self.left -= following
        self.tensors.append((name, shape, dtype, code if numbers else "", following))


def readable(name: str) -> str:
    """A name with its bytes that are no UTF-8 visible."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def text_of(value) -> str:
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
    if len(text) > MOST_TEXT:
        raise ValueError("an attribute of more than 16 MB")
    return text


def main(memory: str, seconds: str, path: str, start: str, size: str, name: str = "") -> None:
    limit(int(memory), int(seconds))
    import h5py

    with h5py.File(Part(path, int(start), int(size)), "r") as file:
        listing = Listing(name)
        listing.texts = {key: text_of(file.attrs[key]) for key in ROOT_TEXTS if key in file.attrs}
        listing.walk(h5py, file, "", 0)
        header = {key: getattr(listing, key) for key in ("tensors", "names", "texts", "refused")}
        encoded = json.dumps(header).encode()
        sys.stdout.buffer.write(len(encoded).to_bytes(8, "little") + encoded)
        for part in listing.values:
            sys.stdout.buffer.write(part)


if __name__ == "__main__":
    main(*sys.argv[1:])
