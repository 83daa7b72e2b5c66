"""Checking the zip file that ``torch.save`` writes before PyTorch's own reader sees it.

PyTorch's reader (miniz, compiled without its check of CRC sums) trusts the directory of the archive, gives back a
record whose bits were flipped without a word, and finds names without regard to case. Here every byte of the file must
belong to exactly one known record, and every record must have the CRC sum that its directory entry says.
"""

from __future__ import annotations

import dataclasses
import re
import struct
import zlib
from typing import BinaryIO

from mmvmamba.errors import CorruptCheckpoint, UnsafeCheckpoint

_CHUNK = 1 << 20
_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR64 = struct.Struct("<4sLQL")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
#: What the short fields hold where only the long ones have room.
_FULL = (0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF)
_MAX_DIRECTORY = 64 << 20
#: Behind a record the writer may repeat sizes and CRC sum: 12 or 20 bytes, and 4 more of signature.
_MAX_GAP = 24
_DEFLATED_OR_ENCRYPTED = 1 << 0 | 1 << 5 | 1 << 6 | 1 << 13
_KNOWN = re.compile(r"data\.pkl|data/\d{1,9}|version|byteorder|\.format_version|\.storage_alignment|\.data/.*")
_TORCHSCRIPT = re.compile(r"code/.*|constants\.pkl|constants/.*|model\.json|bytecode\.pkl|extra/.*|mobile_debug.*")


@dataclasses.dataclass(frozen=True)
class Record:
    """A record of the archive: where its bytes are in the file, how many, and their CRC sum."""

    name: str
    header: int
    offset: int
    size: int
    crc: int


def check_archive(file: BinaryIO, size: int, name: str) -> dict[str, Record]:
    """Return the records of a zip file by name without its root folder, after proving that the file is sound.

    Args:
        file: The open file.
        size: Its length in bytes.
        name: What to call it in messages.

    Raises:
        CorruptCheckpoint: If it is cut off, damaged or built as ``torch.save`` does not build it.
        UnsafeCheckpoint: If it is compressed, encrypted, of TorchScript, or holds records that no checkpoint has.
    """
    records, directory = _read_directory(file, size, name)
    names = [record.name for record in records]
    # PyTorch's reader compares without case: two such names are one to it, and it takes either.
    if len({text.casefold() for text in names}) != len(names):
        raise UnsafeCheckpoint(f"checkpoint {name} has two records of one name, expected each once. Do not load it.")
    root = names[0].split("/", 1)[0] + "/"
    inner_names = [text[len(root) :] if text.startswith(root) else f"../{text}" for text in names]
    _check_names(inner_names, name)
    inner = dict(zip(inner_names, _located(records, file, directory, name), strict=True))
    for text, record in inner.items():
        if _crc(file, record) != record.crc:
            raise CorruptCheckpoint(
                f"checkpoint {name} is damaged: record {text!r} ({record.size} bytes) has not the CRC sum that the "
                "file gives for it. Download it again, or go on from an earlier one."
            )
    return inner


def read_record(file: BinaryIO, record: Record) -> bytes:
    """Return the bytes of a record."""
    file.seek(record.offset)
    return file.read(record.size)


def _cut_off(name: str, what: str) -> CorruptCheckpoint:
    return CorruptCheckpoint(
        f"checkpoint {name} cannot be read ({what}), expected a complete file of torch.save. It is probably cut off: "
        "delete it and download or train it anew."
    )


def _read_directory(file: BinaryIO, size: int, name: str) -> tuple[list[Record], int]:
    """Return the records, without their offsets, and where the directory begins."""
    if size < _END.size:
        raise _cut_off(name, f"{size} bytes")
    file.seek(size - _END.size)
    signature, disk, start_disk, here, count, length, start, comment = _END.unpack(file.read(_END.size))
    if signature != b"PK\5\6" or comment or disk or start_disk or here != count:
        raise _cut_off(name, "no directory at its end")
    end = size - _END.size
    if end >= _LOCATOR64.size + _END64.size:
        file.seek(end - _LOCATOR64.size)
        locator, _, place, _ = _LOCATOR64.unpack(file.read(_LOCATOR64.size))
        if locator == b"PK\6\7":
            if place != end - _LOCATOR64.size - _END64.size:
                raise _cut_off(name, "the end of its directory is elsewhere")
            file.seek(place)
            short = (here, count, length, start)
            signature, _, _, _, disk, start_disk, here, count, length, start = _END64.unpack(file.read(_END64.size))
            long = (here, count, length, start)
            # One reader may go by the short fields and another by the long ones.
            same = all(a in (b, full) for a, b, full in zip(short, long, _FULL, strict=True))
            if signature != b"PK\6\6" or disk or start_disk or here != count or not same:
                raise _cut_off(name, "the end of its directory is damaged")
            end = place
    if start + length != end or length > _MAX_DIRECTORY or not count:
        raise _cut_off(name, f"a directory of {length} bytes at {start} of {size}")
    file.seek(start)
    data = file.read(length)
    records, position = [], 0
    for _ in range(count):
        record, position = _read_entry(data, position, start, name)
        records.append(record)
    if position != length:
        raise _cut_off(name, "its directory has more than its entries")
    return records, start


def _read_entry(data: bytes, position: int, directory: int, name: str) -> tuple[Record, int]:
    if position + _ENTRY.size > len(data):
        raise _cut_off(name, "its directory ends early")
    fields = _ENTRY.unpack_from(data, position)
    signature, _, _, flags, method, _, _, crc, packed, size, name_length, extra_length, comment, disk, _, _, header = (
        fields
    )
    position += _ENTRY.size
    end = position + name_length + extra_length + comment
    if signature != b"PK\1\2" or end > len(data) or disk or comment:
        raise _cut_off(name, "an entry of its directory is damaged")
    try:
        text = data[position : position + name_length].decode("ascii")
    except UnicodeDecodeError as error:
        raise _cut_off(name, "the name of a record is damaged") from error
    if method or flags & _DEFLATED_OR_ENCRYPTED:
        raise UnsafeCheckpoint(
            f"checkpoint {name} holds a compressed or encrypted record, {text!r}, expected only stored ones as "
            "torch.save writes them. Unpack it and save it again on a machine you trust."
        )
    extra = data[position + name_length : position + name_length + extra_length]
    size, packed, header = _wide(extra, [size, packed, header], name)
    if size != packed or header + _LOCAL.size + size > directory:
        raise _cut_off(name, f"record {text!r} claims {size} bytes at {header}")
    return Record(text, header, 0, size, crc), end


def _wide(extra: bytes, fields: list[int], name: str) -> list[int]:
    """Return size, packed size and place, read from the zip64 field where they do not fit 32 bits."""
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<2H", extra)
        body, extra = extra[4 : 4 + length], extra[4 + length :]
        if kind == 1:
            for index, value in enumerate(fields):
                if value == 0xFFFFFFFF:
                    if len(body) < 8:
                        raise _cut_off(name, "a 64-bit size is missing")
                    fields[index], body = struct.unpack_from("<Q", body)[0], body[8:]
            return fields
    return fields


def _check_names(names: list[str], name: str) -> None:
    strange = [text for text in names if not _KNOWN.fullmatch(text)]
    if any(_TORCHSCRIPT.fullmatch(text) for text in strange):
        raise UnsafeCheckpoint(
            f"checkpoint {name} is a TorchScript program, expected weights. A program is not loaded: save the weights "
            "alone (model.state_dict()) on a machine you trust."
        )
    if "data.pkl" not in names:
        raise UnsafeCheckpoint(
            f"checkpoint {name} is a zip archive without 'data.pkl' (it holds {names[:3]}), expected a file of "
            "torch.save. If the checkpoint is inside, unpack it first."
        )
    if strange:
        raise UnsafeCheckpoint(
            f"checkpoint {name} holds {len(strange)} records that torch.save does not write: {strange[:3]}, expected "
            "weights only. Do not load it."
        )


def _located(records: list[Record], file: BinaryIO, directory: int, name: str) -> list[Record]:
    """Return the records with their offsets; they neither overlap nor leave room between them."""
    position = 0
    located = list(records)
    for index, record in sorted(enumerate(records), key=lambda pair: pair[1].header):
        file.seek(record.header)
        head = file.read(_LOCAL.size)
        if len(head) < _LOCAL.size:
            raise _cut_off(name, f"record {record.name!r} is missing")
        signature, _, flags, method, _, _, _, packed, length, name_length, extra_length = _LOCAL.unpack(head)
        text = file.read(name_length)
        offset = record.header + _LOCAL.size + name_length + extra_length
        # Sizes may stand behind the record instead (flag 8, then zero here) or in the 64-bit field.
        sizes = {record.size, 0xFFFFFFFF} | ({0} if flags & 8 else set())
        same = text == record.name.encode() and packed in sizes and length in sizes
        if signature != b"PK\3\4" or method or flags & _DEFLATED_OR_ENCRYPTED or not same:
            raise _cut_off(name, f"record {record.name!r} is not what the directory says")
        if not 0 <= record.header - position <= _MAX_GAP or offset + record.size > directory:
            raise _cut_off(name, f"record {record.name!r} is not where the one before it ends")
        position = offset + record.size
        located[index] = dataclasses.replace(record, offset=offset)
    if directory - position > _MAX_GAP:
        raise _cut_off(name, "there are bytes that belong to no record")
    return located


def _crc(file: BinaryIO, record: Record) -> int:
    file.seek(record.offset)
    crc, left = 0, record.size
    while left:
        chunk = file.read(min(left, _CHUNK))
        if not chunk:
            return -1
        crc, left = zlib.crc32(chunk, crc), left - len(chunk)
    return crc
