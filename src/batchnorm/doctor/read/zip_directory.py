"""The directory of a zip archive, read with bounds of its own; nothing is unpacked."""

import struct
import zlib
from typing import BinaryIO, NamedTuple

from batchnorm.doctor.read.faults import Faults
from batchnorm.doctor.read.source import Source, shown

LOCAL, CENTRAL, END, END64, LOCATOR64 = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"
LOCAL_SIZE, CENTRAL_SIZE, END_SIZE, END64_SIZE, LOCATOR64_SIZE = 30, 46, 22, 56, 20
LONGEST_COMMENT = 0xFFFF
STORED, DEFLATED = 0, 8
ENCRYPTED = 0x1 | 0x40 | 0x2000
# a checkpoint of 10^5 tensors has a directory of 10 MB
LARGEST_DIRECTORY = 32 << 20
MOST_MEMBERS = 200_000
MOST_EXTRA_FIELDS = 16
# read and summed at about 2 GB/s from the cache of the system
CHECKED_BYTES, CHUNK = 1 << 30, 1 << 20
# what may come out of compressed members, at a time
LARGEST_INFLATED = 64 << 20


class Member(NamedTuple):
    name: str
    header: int  # position of its local header
    start: int  # position of its bytes
    packed: int  # bytes in the file
    size: int  # bytes of its contents
    crc: int
    method: int
    flags: int

    @property
    def readable(self) -> bool:
        return self.method in (STORED, DEFLATED) and not self.flags & ENCRYPTED

    @property
    def plain(self) -> bool:
        """Whether the bytes of the file are its contents."""
        return self.method == STORED and not self.flags & ENCRYPTED and self.packed == self.size


def read_directory(source: Source, faults: Faults) -> dict[str, Member] | None:
    """Members by name in the order of the directory, without those that lie outside the file; None: there is no end.

    Raises:
        DataError: more members than any checkpoint has.
    """
    end = find_end(source)
    if end is None:
        return None
    start, size, count = end
    if size > LARGEST_DIRECTORY or count > MOST_MEMBERS:
        raise source.error(f"its zip directory claims {count} members in {size} bytes: more than any checkpoint has")
    if start + size > source.size:
        return None
    members: dict[str, Member] = {}
    claimed = entries(source.read(start, size), count, faults)
    with source.open() as file:
        for entry in claimed:
            member = locate(source, file, entry, faults)
            if entry.name in members:
                faults.add("BN003", entry.name, "stands in the directory twice: programs disagree on which one counts")
            elif member is not None:
                members[entry.name] = member
                check_member(member, faults)
    check_overlaps(members, faults)
    return members


def find_end(source: Source) -> tuple[int, int, int] | None:
    """Start and size of the directory and the number of its entries."""
    tail_start = max(0, source.size - END_SIZE - LONGEST_COMMENT)
    tail = source.read(tail_start, source.size - tail_start)
    at = tail.rfind(END)
    while at >= 0 and not ends_there(tail, at):
        at = tail.rfind(END, 0, at)
    if at < 0:
        return None
    count, size, start = struct.unpack_from("<HII", tail, at + 10)
    locator = tail_start + at - LOCATOR64_SIZE
    if locator >= 0 and (signature := source.read(locator, LOCATOR64_SIZE)).startswith(LOCATOR64):
        (position,) = struct.unpack_from("<Q", signature, 8)
        if position + END64_SIZE <= source.size:
            record = source.read(position, END64_SIZE)
            if record.startswith(END64):
                count, size, start = struct.unpack_from("<QQQ", record, 32)
    return start, size, count


def ends_there(tail: bytes, at: int) -> bool:
    """Whether a signature is followed by a whole record and a comment up to the end of the file."""
    return at + END_SIZE <= len(tail) and at + END_SIZE + struct.unpack_from("<H", tail, at + 20)[0] == len(tail)


def entries(directory: bytes, count: int, faults: Faults) -> list[Member]:
    """Entries as they are claimed; their ``start`` is not known yet."""
    found, at = [], 0
    for _ in range(count):
        if directory[at : at + 4] != CENTRAL or at + CENTRAL_SIZE > len(directory):
            faults.add("BN003", "", f"the directory claims {count} members and has {len(found)}")
            break
        flags, method = struct.unpack_from("<HH", directory, at + 8)
        crc, packed, size = struct.unpack_from("<III", directory, at + 16)
        name_size, extra_size, comment_size = struct.unpack_from("<HHH", directory, at + 28)
        (header,) = struct.unpack_from("<I", directory, at + 42)
        name = directory[at + CENTRAL_SIZE : at + CENTRAL_SIZE + name_size].decode("utf-8", "replace")
        extra_start = at + CENTRAL_SIZE + name_size
        extra = directory[extra_start : extra_start + extra_size]
        size, packed, header = widened(extra, size, packed, header)
        found.append(Member(name, header, 0, packed, size, crc, method, flags))
        at = extra_start + extra_size + comment_size
    return found


def widened(extra: bytes, *values: int) -> list[int]:
    """Size, packed size and header position, those of 32 one bits taken from the field for large files."""
    result, at = list(values), 0
    for _ in range(MOST_EXTRA_FIELDS):
        if at + 4 > len(extra):
            break
        tag, length = struct.unpack_from("<HH", extra, at)
        if tag == 1:
            field = extra[at + 4 : at + 4 + length]
            wide = [field[i : i + 8] for i in range(0, len(field) - 7, 8)]
            for index, value in enumerate(values):
                if value == 0xFFFFFFFF and wide:
                    result[index] = int.from_bytes(wide.pop(0), "little")
        at += 4 + length
    return result


def locate(source: Source, file: BinaryIO, entry: Member, faults: Faults) -> Member | None:
    """The entry with the position of its bytes, which its local header decides; None if it lies outside the file."""
    file.seek(min(entry.header, source.size))
    local = file.read(LOCAL_SIZE + len(entry.name.encode()))
    if len(local) < LOCAL_SIZE or not local.startswith(LOCAL):
        faults.add("BN003", entry.name, "no member begins where the directory says", position=entry.header)
        return None
    name_size, extra_size = struct.unpack_from("<HH", local, 26)
    start = entry.header + LOCAL_SIZE + name_size + extra_size
    if local[LOCAL_SIZE : LOCAL_SIZE + name_size].decode("utf-8", "replace") != entry.name:
        faults.add("BN003", entry.name, "has another name in its own header")
    if start + entry.packed > source.size:
        faults.add("BN003", entry.name, "reaches over the end of the file", end=start + entry.packed, file=source.size)
        return None
    return entry._replace(start=start)


def check_member(member: Member, faults: Faults) -> None:
    """Note what torch never writes."""
    name = member.name
    if name.startswith("/") or "\\" in name or ":" in name.partition("/")[0] or ".." in name.split("/"):
        faults.add("BN003", name, "its path leads out of the folder it would be unpacked to")
    if member.flags & ENCRYPTED:
        faults.add("BN003", name, "is encrypted")
    elif member.method == DEFLATED and name.split("/")[1:2] == ["code"]:
        # the source code of TorchScript is compressed; nobody reads it here
        pass
    elif member.method != STORED:
        problem = (
            "is compressed, which torch and Keras never do"
            if member.method == DEFLATED
            else "is packed in an unknown way"
        )
        faults.add("BN003", name, problem, grave=False, bytes=member.packed, unpacked=member.size, method=member.method)
    elif member.packed != member.size:
        faults.add("BN003", name, "is not compressed, but has two sizes", bytes=member.packed, unpacked=member.size)


def check_overlaps(members: dict[str, Member], faults: Faults) -> None:
    """Note members that share bytes: a small file can seem large that way."""
    end = 0
    for member in sorted(members.values(), key=lambda member: member.header):
        if member.header < end:
            faults.add("BN003", member.name, "shares bytes with the member before it", position=member.header, end=end)
        end = max(end, member.start + member.packed)


def read_member(source: Source, member: Member, start: int, count: int) -> bytes:
    """Bytes of the contents.

    Raises:
        DataError: they cannot be unpacked, or are more than anything this is used for needs.
    """
    if not member.readable:
        raise source.error(f"member {shown(member.name)} is encrypted or packed in an unknown way")
    if start < 0 or count < 0 or start + count > member.size:
        raise source.error(f"member {shown(member.name)} has {member.size} bytes, and {start + count} are needed")
    if member.method == STORED:
        return source.read(member.start + start, count)
    if start + count > LARGEST_INFLATED or member.packed > LARGEST_INFLATED:
        raise source.error(f"member {shown(member.name)} is compressed and too large; save the file again")
    try:
        data = zlib.decompressobj(-15).decompress(source.read(member.start, member.packed), max(1, start + count))
    except zlib.error as error:
        raise source.error(f"member {shown(member.name)} cannot be unpacked ({error})") from None
    if len(data) < start + count:
        raise source.error(f"member {shown(member.name)} ends after {len(data)} of {start + count} bytes")
    return data[start : start + count]


def check_sums(source: Source, members: dict[str, Member], faults: Faults) -> dict[str, int]:
    """Compare the checksums of the smallest members first: BN layers are always among them.

    Returns:
        How many members were ``checked``, and how many were ``left`` because together they are too large to be read
        in about a second. Both 0: the file was written without checksums.
    """
    stored = sorted((m for m in members.values() if m.method == STORED), key=lambda member: member.packed)
    if not any(member.crc for member in stored):
        return {"checked": 0, "left": 0}
    budget, checked = CHECKED_BYTES, 0
    with source.open() as file:
        for member in stored:
            budget -= member.packed
            if budget < 0:
                break
            checked += 1
            if (crc := checksum(file, member)) != member.crc:
                faults.add("BN002", member.name, "checksum differs", expected=member.crc, found=crc, bytes=member.size)
    return {"checked": checked, "left": len(stored) - checked}


def checksum(file: BinaryIO, member: Member) -> int:
    crc, left = 0, member.packed
    file.seek(member.start)
    while left > 0 and (chunk := file.read(min(left, CHUNK))):
        crc, left = zlib.crc32(chunk, crc), left - len(chunk)
    return crc
