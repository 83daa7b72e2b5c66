"""Zip files that two readers might read as two different ones: none of them is read."""

from __future__ import annotations

import io
import struct
import zipfile

import pytest
import torch

from mmvmamba.checkpoints import read_checkpoint
from mmvmamba.errors import CheckpointError, CorruptCheckpoint, UnsafeCheckpoint
from tests.test_checkpoints.mutations import stored, weights

DATA = stored("bare")
ENTRY, LOCAL = 46, 30


def _directory(data):
    """Return where the directory begins, and the position of each of its entries by the name of the record."""
    start = struct.unpack_from("<L", data, len(data) - 6)[0]
    position, entries = start, {}
    while data[position : position + 4] == b"PK\1\2":
        lengths = struct.unpack_from("<3H", data, position + 28)
        entries[bytes(data[position + ENTRY : position + ENTRY + lengths[0]]).decode().partition("/")[2]] = position
        position += ENTRY + sum(lengths)
    return start, entries


def _header(data, name):
    _, entries = _directory(data)
    return struct.unpack_from("<L", data, entries[name] + 42)[0]


def _insert(data, position, more):
    """Insert bytes into the file and correct all places behind them."""
    start, entries = _directory(data)
    for entry in entries.values():
        place = struct.unpack_from("<L", data, entry + 42)[0]
        struct.pack_into("<L", data, entry + 42, place + len(more) * (place >= position))
    moved = start + len(more) * (start >= position)
    struct.pack_into("<L", data, len(data) - 6, moved)
    end = data.rfind(b"PK\6\6")
    if end >= 0:  # the long fields, and where they are
        struct.pack_into("<Q", data, end + 48, moved)
        struct.pack_into("<Q", data, len(data) - 22 - 20 + 8, end + len(more))
    data[position:position] = more


def local_name(data):
    data[_header(data, "data/0") + LOCAL + len("archive/data/")] = ord("1")


def local_size(data):
    struct.pack_into("<2L", data, _header(data, "version") + 18, 1, 1)


def local_method(data):
    struct.pack_into("<H", data, _header(data, "data/0") + 8, 8)


def local_flags(data):
    data[_header(data, "data/0") + 6] |= 1


def directory_method(data):
    struct.pack_into("<H", data, _directory(data)[1]["data/0"] + 10, 8)


def directory_flags(data):
    data[_directory(data)[1]["data/0"] + 8] |= 1


def same_place(data):
    entries = _directory(data)[1]
    data[entries["data/0"] + 42 : entries["data/0"] + 46] = data[entries["data/1"] + 42 : entries["data/1"] + 46]


def hidden_bytes(data):
    _insert(data, _header(data, "data/1"), b"x" * 100)


def hidden_bytes_before_the_directory(data):
    _insert(data, _directory(data)[0], b"x" * 100)


def bytes_before_the_archive(data):
    _insert(data, 0, b"PK\3\4" + b"x" * 100)


def comment(data):
    data[-2:] = b"\1\0"
    data += b"x"


def two_ends(data):
    data += data[-22:]


def two_archives(data):
    data.extend(bytes(data))


def fewer_entries(data):
    count = struct.unpack_from("<H", data, len(data) - 12)[0]
    struct.pack_into("<2H", data, len(data) - 14, count - 1, count - 1)


def other_disk(data):
    struct.pack_into("<H", data, len(data) - 18, 1)


def name_that_is_no_ascii(data):
    for position in (_directory(data)[1]["version"] + ENTRY, _header(data, "version") + LOCAL):
        data[position] = 0xE9


@pytest.mark.parametrize(
    "damage",
    [
        *(local_name, local_size, local_method, local_flags, directory_method, directory_flags, same_place),
        *(hidden_bytes, hidden_bytes_before_the_directory, bytes_before_the_archive, comment, two_ends, two_archives),
        *(fewer_entries, other_disk, name_that_is_no_ascii),
    ],
)
def test_ambiguous_archives(damage, tmp_path):
    data = bytearray(DATA)
    damage(data)
    (tmp_path / "x.pth").write_bytes(bytes(data))
    with pytest.raises((CorruptCheckpoint, UnsafeCheckpoint), match="x.pth"):
        read_checkpoint(tmp_path / "x.pth")


def test_the_tools_of_this_test_find_the_right_places():
    data = bytearray(DATA)
    names = [entry.filename.partition("/")[2] for entry in zipfile.ZipFile(io.BytesIO(DATA)).infolist()]
    assert list(_directory(data)[1]) == names and data[_header(data, "data/0") :].startswith(b"PK\3\4")
    _insert(data, _header(data, "data/1"), b"x" * 8)
    archive = zipfile.ZipFile(io.BytesIO(bytes(data)))
    assert archive.testzip() is None


def _zip(records, **options):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", **options) as archive:
        for name, data in records.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def _records():
    with zipfile.ZipFile(io.BytesIO(DATA)) as archive:
        return {entry.filename: archive.read(entry) for entry in archive.infolist()}


def test_archives_of_other_tools_are_read(tmp_path):
    """Programs that take optimizer states out of checkpoints write plain zip files."""
    (tmp_path / "x.pth").write_bytes(_zip(_records()))
    state = read_checkpoint(tmp_path / "x.pth")["state_dict"]
    assert all(torch.equal(state[key], value) for key, value in weights().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"archive/code/a.py": b"x"}, "TorchScript"),
        ({"archive/readme.txt": b"x"}, "records that torch.save does not write"),
        ({"other/version": b"3"}, "records that torch.save does not write"),
        ({"archive/byteorder": b"big"}, "big-endian"),
        ({"archive/version": b"x"}, "is no number"),
        ({"archive/DATA.pkl": b"x"}, "two records of one name"),
        ({"archive/data.pkl": b"\x80\x02}.rest"}, "goes on"),
    ],
)
def test_strange_records(change, message, tmp_path):
    (tmp_path / "x.pth").write_bytes(_zip({**_records(), **change}))
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(tmp_path / "x.pth")


def test_an_archive_without_contents(tmp_path):
    for records in ({"archive/weights.bin": b"x"}, {}):
        (tmp_path / "x.pth").write_bytes(_zip(records))
        with pytest.raises(CheckpointError, match="x.pth"):
            read_checkpoint(tmp_path / "x.pth")
