"""Finds the members of a torch archive whose end, and with it the directory, is missing."""

import struct

from batchnorm.doctor.read.source import Source
from batchnorm.doctor.read.zip_directory import LOCAL, LOCAL_SIZE, Member

# Torch writes checksum, packed size and size of a member behind it; the sizes have 4 or 8 bytes.
DESCRIPTOR = b"PK\x07\x08"
LAST = 24
SMALLEST_CHUNK, LARGEST_CHUNK = 4096, 1 << 20
# each takes up to 0.1 ms
MOST_RECOVERED = 20_000


def recover(source: Source) -> dict[str, Member]:
    """The members that are whole, by name in the order of the file."""
    members: dict[str, Member] = {}
    at = 0
    while len(members) < MOST_RECOVERED:
        local = source.read_up_to(at, LOCAL_SIZE)
        if len(local) < LOCAL_SIZE or not local.startswith(LOCAL):
            break
        flags, method = struct.unpack_from("<HH", local, 6)
        crc, packed, size = struct.unpack_from("<III", local, 14)
        name_size, extra_size = struct.unpack_from("<HH", local, 26)
        name = source.read_up_to(at + LOCAL_SIZE, name_size).decode("utf-8", "replace")
        start = at + LOCAL_SIZE + name_size + extra_size
        if flags & 8:
            behind = find_descriptor(source, start)
            if behind is None:
                break
            crc, packed, size, end = behind
        else:
            end = start + packed
        if end > source.size:
            break
        members.setdefault(name, Member(name, at, start, packed, size, crc, method, flags))
        at = end
    return members


def find_descriptor(source: Source, start: int) -> tuple[int, int, int, int] | None:
    """Checksum, packed size, size and end of the member whose bytes begin here."""
    at, size_of_chunk = start, SMALLEST_CHUNK
    while at < source.size:
        chunk = source.read_up_to(at, size_of_chunk + LAST)
        found = chunk.find(DESCRIPTOR)
        while 0 <= found < size_of_chunk:
            for form in ("<III", "<IQQ"):
                end = found + 4 + struct.calcsize(form)
                if end <= len(chunk):
                    crc, packed, size = struct.unpack_from(form, chunk, found + 4)
                    if packed == at + found - start:
                        return crc, packed, size, at + end
            found = chunk.find(DESCRIPTOR, found + 1)
        at += size_of_chunk
        size_of_chunk = min(2 * size_of_chunk, LARGEST_CHUNK)
    return None
