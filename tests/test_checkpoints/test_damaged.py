"""Damaged files: each is refused, or gives the very weights that were saved; none kills the process (C2, C3)."""

from __future__ import annotations

import json
import os
import resource
import signal
import zipfile
from collections import Counter

import pytest
import torch

from mmvmamba.checkpoints import Manifest, read_checkpoint, write_manifest
from mmvmamba.checkpoints.manifest import sha256_of
from mmvmamba.errors import CheckpointError, CorruptCheckpoint, HashMismatch
from tests.test_checkpoints.forked import forked
from tests.test_checkpoints.mutations import mutated, repacked, rewritten_header, same_crc_sums, stored, weights, write

KINDS = ("training", "bare", "old", "safetensors")
SECONDS = 10
#: Beyond what the process has: a small multiple of a file of 50 to 150 KB, most of it PyTorch's first use of its parts.
MEMORY = 256 << 20


def _limit_memory(extra=MEMORY):
    with open("/proc/self/statm") as file:  # noqa: PTH123 (no path of ours)
        pages = int(file.read().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + extra
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _too_late(*_):
    raise TimeoutError(f"more than {SECONDS} s")


def _read_all(path, cases, strict):
    """Read damaged files one after another in this process; return how they ended as JSON."""
    _limit_memory()
    signal.signal(signal.SIGALRM, _too_late)
    expected = weights()
    ends, wrong = Counter(), []
    for number, data in cases:
        path.write_bytes(data)
        signal.alarm(SECONDS)
        try:
            state = read_checkpoint(path)["state_dict"]
        except CheckpointError as error:
            ends[type(error).__name__] += 1
        except BaseException as error:  # noqa: BLE001 (whatever else comes is the finding)
            wrong.append(f"{number}: {type(error).__name__}: {error}")
        else:
            same = state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in expected)
            ends["equal" if same else "other weights"] += 1
            if not same and (strict or _claims(state) > 4 * len(data)):
                wrong.append(f"{number}: other weights")
        signal.alarm(0)
    return json.dumps([ends, wrong])


def _claims(state):
    return sum(value.numel() * value.element_size() for value in state.values())


def _run(name, path, cases, strict):
    classes, answer = forked(lambda: _read_all(path, cases, strict))
    assert not classes, f"{name}: the process ended with {classes}: {answer}"
    ends, wrong = json.loads(answer)
    print(f"\nC2 {name}: {sum(ends.values())} files: {dict(sorted(ends.items()))}")
    assert not wrong, f"{name}: {len(wrong)} of {sum(ends.values())}: {wrong[:5]}"
    return ends


def _mutate_everything(path, count):
    """Read damaged files of every kind: ``count`` in all."""
    share = count // 8
    ends = Counter()
    for kind in KINDS:
        data = stored(kind)
        # The zip format has CRC sums. In the other two a changed bit of a weight is another weight, and only a
        # manifest knows: there the weights may differ, but nothing may crash, hang or grow.
        strict = kind in ("training", "bare")
        cases = ((number, mutated(data, number)) for number in range(share + share * strict))
        ends.update(_run(f"{kind} with damage", path, cases, strict))
    training = stored("training")
    ends.update(_run("list of contents", path, ((n, repacked(training, n)) for n in range(share)), strict=False))
    plain = stored("safetensors")
    ends.update(_run("safetensors header", path, ((n, rewritten_header(plain, n)) for n in range(share)), strict=False))
    assert sum(ends.values()) == share * 8
    return ends


def test_damaged_files_are_refused_or_equal(tmp_path):
    ends = _mutate_everything(tmp_path / "weights.pth", 5000)
    assert ends["equal"] > 50 and ends["CorruptCheckpoint"] > 2500


def test_the_damage_reaches_what_the_crc_sums_do_not_see():
    assert all(same_crc_sums(repacked(stored("training"), number)) for number in range(20))


@pytest.mark.parametrize("kind", KINDS)
def test_sound_files_are_read(kind, tmp_path):
    state = read_checkpoint(write(tmp_path / "x", stored(kind)))["state_dict"]
    assert all(torch.equal(state[key], value) for key, value in weights().items()) and len(state) == len(weights())


@pytest.mark.parametrize("kind", KINDS)
def test_cut_files_are_refused(kind, tmp_path):
    """At every 4 KiB of 2 MB, and at both ends of every record."""
    path = tmp_path / "weights.pth"
    data = stored(kind, 290)
    lengths = {*range(0, len(data), 4096), len(data) - 1, 1, 2, 3, 4, 8, 9}
    write(path, data)
    if kind in ("training", "bare"):
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                lengths |= {entry.header_offset + d for d in (-1, 0, 1)}
    lengths = sorted((length for length in lengths if 0 <= length < len(data)), reverse=True)
    refused = 0
    for length in lengths:
        os.truncate(path, length)
        with pytest.raises(CorruptCheckpoint, match="weights.pth"):
            read_checkpoint(path)
        refused += 1
    print(f"\nC3 {kind}: {refused} of {len(lengths)} cut files of {len(data)} bytes refused")


@pytest.mark.parametrize("kind", KINDS)
def test_flipped_bits_are_refused_under_a_manifest(kind, tmp_path):
    path = tmp_path / "weights.pth"
    data = bytearray(stored(kind, 290))
    write(path, bytes(data))
    with path.open("rb") as file:
        write_manifest(path, Manifest(*sha256_of(file)))
    read_checkpoint(path)
    generator = torch.Generator().manual_seed(1)
    places = torch.randint(len(data) * 8, (250,), generator=generator).tolist()
    for place in places:
        with path.open("r+b") as file:
            file.seek(place // 8)
            file.write(bytes([data[place // 8] ^ 1 << place % 8]))
        with pytest.raises(HashMismatch, match=r"weights.pth.*expected"):
            read_checkpoint(path)
        with path.open("r+b") as file:
            file.seek(place // 8)
            file.write(bytes([data[place // 8]]))
    read_checkpoint(path)


@pytest.mark.parametrize("kind", ["training", "bare"])
def test_flipped_bits_of_weights_are_refused_without_a_manifest_in_the_zip_format(kind, tmp_path):
    """PyTorch alone loads each of them without a word."""
    path = write(tmp_path / "weights.pth", stored(kind))
    with zipfile.ZipFile(path) as archive:
        entry = next(e for e in archive.infolist() if e.filename.endswith("/data/0"))
    data = bytearray(path.read_bytes())
    start = data.index(weights()["backbone.layer0.weight"].numpy().tobytes())
    for bit in range(0, entry.file_size * 8, 997):
        damaged = bytearray(data)
        damaged[start + bit // 8] ^= 1 << bit % 8
        write(path, bytes(damaged))
        with pytest.raises(CorruptCheckpoint, match="CRC sum"):
            read_checkpoint(path)
