"""The zip archive that torch writes, checked before torch opens it.

In: an open file. Out: the position of its pickle, or an `UnreadableFile`. torch stores all records uncompressed; a
record that is compressed, or that claims more bytes than the file has, was not written by torch and may be a zip bomb.
The directory is read at once, up to a maximum size. The format: APPNOTE.TXT of PKWARE, 4.3.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from lora_probe.errors import UnreadableFile
from lora_probe.files.untrusted import shown

MAX_DIRECTORY = 64_000_000
"""Bytes of the directory; it has about a hundred for each record, and one record for each tensor."""
MAX_SMALL = 1_000_000
"""Bytes of a record that is neither pickle nor storage, such as a version, a byte order or a digest."""
_END, _LOCATOR, _END64, _ENTRY, _LOCAL = b"PK\x05\x06", b"PK\x06\x07", b"PK\x06\x06", b"PK\x01\x02", b"PK\x03\x04"
_STORAGE = re.compile(rb"[^/]*/data/[0-9]+")
_AGAIN = "copy or download it again, or save it again with torch.save"


@dataclass(frozen=True)
class PickleRecord:
    """Position and size of the archive's pickle in the file, and the sizes of the records with values."""

    start: int
    size: int
    storages: frozenset[int]


@dataclass(frozen=True)
class _Entry:
    name: bytes
    method: int
    packed: int
    size: int
    at: int


def pickle_record(path: Path, file: BinaryIO, size: int) -> PickleRecord:
    """Find `data.pkl`, and check that no record is larger than its bytes in the file.

    Raises:
        UnreadableFile: the archive is damaged, or torch did not write it.
    """
    try:
        entries = _entries(_directory(file, size))
    except (struct.error, IndexError) as error:
        raise UnreadableFile(f"`{path}` is a damaged zip archive: its directory is truncated", _AGAIN) from error
    except _Damaged as error:
        raise UnreadableFile(f"`{path}` is a damaged zip archive: {error}", _AGAIN) from None
    total = 0
    pickles = []
    for entry in entries:
        name = shown(entry.name.decode("utf-8", "replace"))
        total += entry.size
        if entry.method != 0 or entry.packed != entry.size:
            raise UnreadableFile(
                f"`{path}` has a compressed record, `{name}` of {entry.size} bytes, but torch never compresses", _AGAIN
            )
        # torch ignores case when it looks for names.
        if entry.name.lower().endswith(b"data.pkl"):
            pickles.append(entry)
        elif entry.size > MAX_SMALL and not _STORAGE.fullmatch(entry.name):
            raise UnreadableFile(f"`{path}` has a record that torch does not write, `{name}`", _AGAIN)
    if total > size:
        raise UnreadableFile(f"`{path}` claims {total} bytes in its records, but the file has {size}", _AGAIN)
    if len(pickles) != 1:
        raise UnreadableFile(f"`{path}` is a zip archive with {len(pickles)} pickles, but torch writes one", _AGAIN)
    # A tensor takes about 300 bytes in the pickle, and has its own record.
    if pickles[0].size > MAX_SMALL + 2048 * len(entries):
        raise UnreadableFile(
            f"`{path}` has a pickle of {pickles[0].size} bytes for {len(entries)} records, more than tensors need",
            _AGAIN,
        )
    storages = frozenset(entry.size for entry in entries if _STORAGE.fullmatch(entry.name))
    return PickleRecord(_data_of(path, file, pickles[0], size), pickles[0].size, storages)


class _Damaged(Exception):
    pass


def _directory(file: BinaryIO, size: int) -> bytes:
    """The central directory; the end of the file has its position."""
    tail = min(size, 65_535 + 22 + 20)
    file.seek(size - tail)
    data = file.read(tail)
    end = data.rfind(_END)
    if end < 0:
        raise _Damaged("it has no directory at its end; it may be truncated")
    length, at = struct.unpack_from("<II", data, end + 12)
    locator = end - 20
    if locator >= 0 and data[locator : locator + 4] == _LOCATOR:
        (where,) = struct.unpack_from("<Q", data, locator + 8)
        if where + 56 > size:
            raise _Damaged("its directory is beyond the end of the file")
        file.seek(where)
        far = file.read(56)
        if not far.startswith(_END64):
            raise _Damaged("its directory is not where the file says")
        length, at = struct.unpack_from("<QQ", far, 40)
    if length > MAX_DIRECTORY or at + length > size:
        raise _Damaged(f"its directory claims {length} bytes at {at}, but the file has {size}")
    file.seek(at)
    return file.read(length)


def _entries(data: bytes) -> list[_Entry]:
    entries = []
    at = 0
    while at < len(data):
        if data[at : at + 4] != _ENTRY:
            raise _Damaged("its directory holds something other than records")
        method = struct.unpack_from("<H", data, at + 10)[0]
        packed, size, long, extra, comment = struct.unpack_from("<IIHHH", data, at + 20)
        (offset,) = struct.unpack_from("<I", data, at + 42)
        name = data[at + 46 : at + 46 + long]
        rest = data[at + 46 + long : at + 46 + long + extra]
        size, packed, offset = _wide(name, rest, size, packed, offset)
        entries.append(_Entry(name, method, packed, size, offset))
        at += 46 + long + extra + comment
    return entries


def _wide(name: bytes, extra: bytes, *short: int) -> tuple[int, int, int]:
    """Sizes and offset, from the zip64 field if they do not fit into the short ones."""
    at, fields = 0, []
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            fields.append(extra[at + 4 : at + 4 + length])
        at += 4 + length
    # Readers disagree on which of two fields counts: torch might read another pickle than the one checked here.
    if len(fields) > 1:
        raise _Damaged(f"the record `{shown(name.decode('utf-8', 'replace'))}` has {len(fields)} zip64 fields")
    wide = b"".join(fields)
    values, used = [], 0
    for value in short:
        if value == 0xFFFFFFFF:
            (value,) = struct.unpack_from("<Q", wide, used)
            used += 8
        values.append(value)
    return values[0], values[1], values[2]


def _data_of(path: Path, file: BinaryIO, entry: _Entry, size: int) -> int:
    """Where the bytes of a record begin: after its local header."""
    if entry.at + 30 <= size:
        file.seek(entry.at)
        header = file.read(30)
        start = entry.at + 30 + sum(struct.unpack_from("<HH", header, 26)) if len(header) == 30 else size
        if header.startswith(_LOCAL) and start + entry.size <= size:
            return start
    raise UnreadableFile(f"`{path}` is a damaged zip archive: its pickle is not where its directory says", _AGAIN)
