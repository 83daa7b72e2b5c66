"""Checking the format of ``torch.save`` before PyTorch 1.6: five pickles one after another, then the bytes of storages.

Official files of the time around the switch still come so. PyTorch allocates what the pickle claims before it looks for
the bytes; here the claims are added up first.
"""

from __future__ import annotations

import struct
from typing import Any, BinaryIO

from mmvmamba.checkpoints.calls import Malformed, Storage, described_storage
from mmvmamba.checkpoints.pickled import follow
from mmvmamba.errors import CorruptCheckpoint

_MAGIC = 0x1950A86A20F9469CFC6C
_VERSION = 1001
_LENGTH = struct.Struct("<q")


def check_legacy(file: BinaryIO, size: int, name: str) -> None:
    """Raise unless an open file is a sound checkpoint of the old format, with every byte accounted for.

    Args:
        file: The open file.
        size: Its length in bytes.
        name: What to call it in messages.

    Raises:
        UnsafeCheckpoint: If it is pickled as weights never are.
        CorruptCheckpoint: If it is cut off or damaged, or a pickle of something else.
    """
    storages: dict[str, Storage] = {}
    claimed = [0]  # a running total: there may be hundreds of thousands

    def no_storage(_: tuple[Any, ...]) -> Storage:
        raise Malformed("a storage where none belongs")

    def storage_of(reference: tuple[Any, ...]) -> Storage:
        storage = described_storage(reference, fields=6)
        if reference[5] is not None:
            raise Malformed("a storage is a view of another one, as PyTorch before 0.4 wrote it")
        if storage.key not in storages:
            storages[storage.key] = storage
            claimed[0] += storage.size
        if storages[storage.key] != storage:
            raise Malformed("two storages of one name")
        if claimed[0] > size:
            raise Malformed(f"its storages claim more than the {size} bytes of the file")
        return storage

    file.seek(0)
    magic, version, system = (follow(file, size, name, no_storage) for _ in range(3))
    if magic != _MAGIC or version != _VERSION:
        raise CorruptCheckpoint(
            f"checkpoint {name} cannot be read (a pickle, but not of torch.save), expected a complete file of "
            "torch.save. Save its weights with torch.save(model.state_dict(), FILE)."
        )
    follow(file, size, name, storage_of)
    keys = follow(file, size, name, no_storage)
    if type(system) is not dict or system.get("little_endian") is not True or type(keys) is not list:
        raise CorruptCheckpoint(f"checkpoint {name} is damaged or of a big-endian machine. Download it again.")
    if len(keys) != len(storages) or {key for key in keys if type(key) is str} != set(storages):
        raise CorruptCheckpoint(f"checkpoint {name} is damaged: its storages have other names. Download it again.")
    end = file.tell()
    for key in keys:
        file.seek(end)
        length = file.read(_LENGTH.size)
        wanted = storages[key].size
        if len(length) < _LENGTH.size or _LENGTH.unpack(length)[0] * storages[key].item_size != wanted:
            end = size + 1
            break
        end += _LENGTH.size + wanted
    if end != size:
        raise CorruptCheckpoint(
            f"checkpoint {name} cannot be read (its {len(keys)} storages do not fill its {size} bytes), expected a "
            "complete file of torch.save. It is probably cut off: delete it and download or train it anew."
        )
