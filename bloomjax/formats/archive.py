"""Where the members of a zip archive lie, for members that are stored as they are.

Python's zipfile believes a good deal of what an archive says; this reads the little that torch's
archives need, and refuses the rest: compressed, encrypted, overlapping or doubled members, more
than one disk, anything that lies outside of the file. The one invariant: members lie within the
file, apart from each other.
"""

import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from bloomjax.errors import InputError

DIRECTORY_BYTES, MEMBERS = 16 << 20, 1 << 16
_END, _END64, _LOCATOR = struct.Struct("<4s4H2IH"), struct.Struct("<4sQ2H2I4Q"), 20
_ENTRY, _LOCAL = struct.Struct("<4s6H3I5H2I"), struct.Struct("<4s5H3I2H")


class Member(NamedTuple):
    offset: int  # of the bytes, from the file's begin
    size: int
    crc: int


def members(path: Path) -> dict[str, Member]:
    """The members of the archive by name. InputError if `path` is none, or one of those refused."""
    try:
        with open(path, "rb") as file:
            return _members(file)
    except OSError as error:
        raise InputError(f"{path}: expected a file to read, found: {error.strerror}") from error
    except (ValueError, struct.error) as error:
        raise InputError(
            f"{path}: expected a zip archive as torch.save writes it since torch 1.6, found "
            f"{error}: bring it back from a copy, or save it again with a newer torch"
        ) from error


def content(path: Path, member: Member, limit: int) -> bytes:
    """All bytes of a small member. InputError if it is larger than `limit`, or damaged."""
    if member.size > limit:
        raise InputError(f"{path}: expected at most {limit} bytes, found a member of {member.size}")
    with open(path, "rb") as file:
        file.seek(member.offset)
        data = file.read(member.size)
    if zlib.crc32(data) != member.crc:
        raise InputError(f"{path}: expected checksum {member.crc:08x}, found it damaged: copy anew")
    return data


def _members(file: BinaryIO) -> dict[str, Member]:
    if file.read(4) != b"PK\x03\x04":
        raise ValueError("other first bytes")
    count, size, start = _directory(file)
    if size > DIRECTORY_BYTES or count > MEMBERS:
        raise ValueError(f"{count} members in a directory of {size} bytes")
    file.seek(start)
    directory = file.read(size)
    entries, at = [], 0
    for _ in range(count):
        entry, at = _entry(directory, at)
        entries.append(entry)
    found: dict[str, Member] = {}
    end = 0
    for name, local, length, crc in sorted(entries, key=lambda entry: entry[1]):
        if local < end:
            raise ValueError("members that overlap")
        mark, _, flags, method, *_, name_size, extra_size = _unpack(file, _LOCAL, local)
        if mark != b"PK\x03\x04" or method or flags & 1 or file.read(name_size) != name:
            raise ValueError("a member whose header is not that of the directory")
        offset = local + _LOCAL.size + name_size + extra_size
        end = offset + length
        if end > start:
            raise ValueError("a member that ends outside of the file")
        text = name.decode()
        if text in found:
            raise ValueError("a name twice")
        found[text] = Member(offset, length, crc)
    return found


def _directory(file: BinaryIO) -> tuple[int, int, int]:
    """Members, bytes and offset of the central directory, which lies before the end records."""
    length = file.seek(0, os.SEEK_END)
    end = length - _END.size
    mark, *disks, _, count, size, start, comment = _unpack(file, _END, end)
    if mark != b"PK\x05\x06" or comment:
        raise ValueError("no directory at its end")
    if end >= _LOCATOR + _END64.size:
        file.seek(end - _LOCATOR)
        if file.read(4) == b"PK\x06\x07":
            end -= _LOCATOR + _END64.size
            mark, _, _, _, *disks, _, count, size, start = _unpack(file, _END64, end)
            if mark != b"PK\x06\x06":
                raise ValueError("no 64-bit directory before its end")
    if any(disks) or start + size > end:
        raise ValueError("a directory outside of it")
    return count, size, start


def _entry(directory: bytes, at: int) -> tuple[tuple[bytes, int, int, int], int]:
    """(name, offset of the local header, bytes, CRC) of an entry, and where the next begins."""
    fields = _ENTRY.unpack_from(directory, at)
    mark, _, _, flags, method, _, _, crc, packed, size = fields[:10]
    name_size, extra_size, comment_size, disk, _, _, local = fields[10:]
    if mark != b"PK\x01\x02" or disk not in (0, 0xFFFF):
        raise ValueError("a damaged directory")
    if method or flags & 1:
        raise ValueError("a member that is compressed or encrypted")
    at += _ENTRY.size
    name, at = directory[at : at + name_size], at + name_size
    extra, at = directory[at : at + extra_size], at + extra_size
    wide = _wide(extra)
    size, packed, local = (
        next(wide, value) if value == 0xFFFFFFFF else value for value in (size, packed, local)
    )
    if size != packed:
        raise ValueError("a member of two sizes")
    return (name, local, size, crc), at + comment_size


def _wide(extra: bytes) -> Iterator[int]:
    """The numbers of the field (of id 1) that has those which are too large for 32 bits."""
    while len(extra) >= 4:
        kind, size = struct.unpack_from("<2H", extra)
        if kind == 1:
            yield from struct.unpack_from(f"<{size // 8}Q", extra, 4)
            return
        extra = extra[4 + size :]


def _unpack(file: BinaryIO, form: struct.Struct, at: int) -> tuple[Any, ...]:
    file.seek(at)
    return form.unpack(file.read(form.size))
