"""Sound checkpoints of every kind, and thousands of ways to damage them, each reproducible by its number."""

from __future__ import annotations

import io
import json
import random
import struct
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path

import torch
from mmengine.logging import HistoryBuffer
from safetensors.torch import save


def weights(size: int = 40) -> OrderedDict:
    generator = torch.Generator().manual_seed(0)
    return OrderedDict(
        (f"backbone.layer{index}.weight", torch.randn(size, size + index, generator=generator)) for index in range(6)
    )


def stored(kind: str, size: int = 40) -> bytes:
    """Return a sound file of a kind: a training of mmengine, bare weights, the old format, or safetensors."""
    state = weights(size)
    if kind == "safetensors":
        return save(dict(state), metadata={"family": "vmamba"})
    buffer = io.BytesIO()
    if kind == "training":
        parameters = [torch.nn.Parameter(value.clone()) for value in state.values()]
        optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        hub = {"log_scalars": {"loss": HistoryBuffer([1.0, 2.0], [1, 1])}, "runtime_info": {}, "resumed_keys": {}}
        meta = {"epoch": 1, "iter": 2, "cfg": "a = dict(b=[1, 2.5, 'x'])\n"}
        torch.save({"meta": meta, "state_dict": state, "message_hub": hub, "optimizer": optimizer.state_dict()}, buffer)
    else:
        torch.save(state, buffer, _use_new_zipfile_serialization=kind != "old")
    return buffer.getvalue()


INTERESTING = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 40, (1 << 63) - 1)


def mutated(data: bytes, number: int) -> bytes:
    """Return a damaged copy of a file; the damage is decided by the number alone."""
    chance = random.Random(number)  # noqa: S311 (no secrets here)
    result = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 5))):
        chance.choice(_DAMAGES)(result, chance)
    return bytes(result)


def _place(data: bytearray, chance: random.Random) -> int:
    """Return a position, more often where structure is: at both ends and near marks of the formats."""
    where = chance.random()
    if where < 0.3:
        return chance.randrange(max(1, min(len(data), 2000)))
    if where < 0.6:
        return max(0, len(data) - 1 - chance.randrange(min(len(data), 1500) or 1))
    return chance.randrange(max(1, len(data)))


def _flip_bit(data: bytearray, chance: random.Random) -> None:
    if data:
        data[_place(data, chance)] ^= 1 << chance.randrange(8)


def _set_bytes(data: bytearray, chance: random.Random) -> None:
    position = _place(data, chance)
    width = chance.choice((1, 2, 4, 8))
    value = chance.choice(INTERESTING) & ((1 << 8 * width) - 1)
    data[position : position + width] = value.to_bytes(width, chance.choice(("little", "big")))


def _nudge(data: bytearray, chance: random.Random) -> None:
    position = _place(data, chance)
    data[position] = (data[position] + chance.choice((-8, -1, 1, 8))) % 256


def _cut(data: bytearray, chance: random.Random) -> None:
    del data[chance.randrange(len(data) + 1) :]


def _remove(data: bytearray, chance: random.Random) -> None:
    position = _place(data, chance)
    del data[position : position + chance.choice((1, 4, 64, 4096))]


def _insert(data: bytearray, chance: random.Random) -> None:
    position = _place(data, chance)
    data[position:position] = chance.randbytes(chance.choice((1, 4, 64)))


def _move(data: bytearray, chance: random.Random) -> None:
    length = chance.choice((4, 46, 200))
    source, target = _place(data, chance), _place(data, chance)
    data[target : target + length] = data[source : source + length]


def _append(data: bytearray, chance: random.Random) -> None:
    data += bytes(data[-chance.choice((22, 100, 1000)) :])


_DAMAGES = (_flip_bit, _flip_bit, _set_bytes, _set_bytes, _cut, _remove, _insert, _move, _append)


def repacked(data: bytes, number: int) -> bytes:
    """Return a zip checkpoint whose list of contents is damaged while every CRC sum is right again."""
    chance = random.Random(number)  # noqa: S311 (no secrets here)
    records = {entry.filename: zipfile.ZipFile(io.BytesIO(data)).read(entry) for entry in _entries(data)}
    name = next(text for text in records if text.endswith("data.pkl"))
    program = bytearray(records[name])
    for _ in range(chance.choice((1, 1, 2, 4))):
        chance.choice((_nudge, _nudge, _flip_bit, _set_bytes, _remove, _insert, _move))(program, chance)
    if chance.random() < 0.7 and not program.endswith(b"."):
        program += b"."
    records[name] = bytes(program)
    if chance.random() < 0.2:  # storages in each other's place, or of another length
        first, second = chance.sample([text for text in records if "/data/" in text], 2)
        records[first], records[second] = records[second], records[first]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for text, record in records.items():
            archive.writestr(text, record)
    return buffer.getvalue()


def _entries(data: bytes) -> list[zipfile.ZipInfo]:
    return zipfile.ZipFile(io.BytesIO(data)).infolist()


def rewritten_header(data: bytes, number: int) -> bytes:
    """Return a safetensors file whose header says something else in sound JSON."""
    chance = random.Random(number)  # noqa: S311 (no secrets here)
    length = struct.unpack_from("<Q", data)[0]
    header = json.loads(data[8 : 8 + length])
    name = chance.choice([key for key in header if key != "__metadata__"])
    entry = header[name]
    what = chance.randrange(4)
    if what == 0:
        entry["data_offsets"][chance.randrange(2)] = chance.choice((*INTERESTING, -1, "0", None))
    elif what == 1:
        entry["shape"] = [chance.choice((*INTERESTING, -1)) for _ in range(chance.randrange(1, 5))]
    elif what == 2:
        entry["dtype"] = chance.choice(("F64", "F16", "BOOL", "I64", "F8_E4M3", "", "X", None))
    else:
        header[chance.choice(("", "x" * 5000, "a\0b"))] = header.pop(name)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def same_crc_sums(data: bytes) -> bool:
    """Return whether every record of a zip file has its CRC sum; shows that ``repacked`` gets past that check."""
    archive = zipfile.ZipFile(io.BytesIO(data))
    return all(zlib.crc32(archive.read(entry)) == entry.CRC for entry in archive.infolist())


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path
