"""Odd but honest files that must load, and doubtful files and names that must not."""

from __future__ import annotations

import json
import pickle
import struct
import time
import warnings
from argparse import Namespace
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from mmvmamba.checkpoints import Manifest, download, manifest_path, read_checkpoint, read_manifest, write_manifest
from mmvmamba.checkpoints.config_text import take_config_text
from mmvmamba.checkpoints.legacy import check_legacy
from mmvmamba.checkpoints.manifest import sha256_of
from mmvmamba.errors import CheckpointError, CorruptCheckpoint, HashMismatch, UnsafeCheckpoint
from tests.test_checkpoints.forked import forked
from tests.test_checkpoints.hostile import MAGIC, zipped
from tests.test_checkpoints.test_damaged import _limit_memory

STATE = {"w": torch.ones(64)}


def _read(content, tmp_path, **options):
    torch.save(content, tmp_path / "x.pth")
    return read_checkpoint(tmp_path / "x.pth", **options)


def _hash(path):
    with path.open("rb") as file:
        return sha256_of(file)[0]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache that holds x.pth of nobody knows where."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    torch.save(STATE, tmp_path / "checkpoints/x.pth")
    return tmp_path / "checkpoints"


def test_the_hash_of_a_url_is_proved_on_the_file_that_is_opened(cache, monkeypatch):
    from mmvmamba.checkpoints import reader

    def fetch_then_swap(url, sha256):
        path = download.fetch(url, sha256)
        manifest_path(path).unlink()
        torch.save({"w": torch.zeros(64)}, path)
        return path

    url = f"https://h/x.pth#sha256={_hash(cache / 'x.pth')}"
    monkeypatch.setattr(reader, "fetch", fetch_then_swap)
    with pytest.raises(HashMismatch, match="has sha256"):
        read_checkpoint(url)


@pytest.mark.parametrize("mark", ["#SHA256={}", "#sha256:{}", "#sha-256={}", "#", "#{}", "#sha256=", "#sha256={}&a=1"])
def test_misspelt_hashes_are_not_passed_over(mark, cache):
    with pytest.raises(HashMismatch, match="expected.*64 hexadecimal digits"):
        read_checkpoint("https://h/x.pth" + mark.format(_hash(cache / "x.pth")))
    with pytest.raises(HashMismatch, match="64 hexadecimal digits"):
        download.fetch("https://h/x.pth", "")


def test_a_file_that_was_there_already_is_said_to_be_so(cache):
    with pytest.warns(UserWarning, match="was there already, of whichever URL"):
        read_checkpoint("https://h/x.pth")


def test_a_cache_of_others_is_read(cache, monkeypatch):
    (cache / ".mmvmamba.lock").mkdir()  # cannot be opened, not even by root
    assert read_checkpoint(f"https://h/x.pth#sha256={_hash(cache / 'x.pth')}")["state_dict"]
    with pytest.raises(CheckpointError, match="cannot be written to"):
        read_checkpoint("https://h/y.pth")


@pytest.mark.parametrize("url", ["https://[::1/x.pth", "https://h/a b.pth", "https://h/" + "x" * 300])
def test_urls_that_are_none(url, cache):
    with pytest.raises(CheckpointError):
        read_checkpoint(url)


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, " " * (2 << 20), "[]", json.dumps({"format": 1, "sha256": 5, "size": 1}),
     json.dumps({"format": 1, "sha256": "0" * 64, "size": 1, "iteration": "a"})],
    ids=["deep", "long", "list", "hash", "iteration"],
)  # fmt: skip
def test_manifests_that_are_none(text, tmp_path):
    manifest_path(tmp_path / "x.pth").write_text(text)
    with pytest.raises(CorruptCheckpoint, match="cannot be understood"):
        read_manifest(tmp_path / "x.pth")


def test_manifests_of_later_versions_links_and_renamed_files(tmp_path):
    write_manifest(tmp_path / "x.pth", Manifest("0" * 64, 5))
    stored = json.loads(manifest_path(tmp_path / "x.pth").read_text())
    manifest_path(tmp_path / "y.pth").write_text(json.dumps({**stored, "signature": "of a later version"}))
    assert read_manifest(tmp_path / "y.pth") == Manifest("0" * 64, 5)
    torch.save(STATE, tmp_path / "x.pth")
    (tmp_path / "link.pth").symlink_to("x.pth")
    with pytest.raises(CorruptCheckpoint, match="manifest"):
        read_checkpoint(tmp_path / "link.pth")


def test_devices_that_are_not_here_are_no_damage(tmp_path):
    from safetensors.torch import save_file

    save_file(STATE, tmp_path / "x.safetensors")
    torch.save(STATE, tmp_path / "x.pth")
    for name in ("x.safetensors", "x.pth"):
        for device in ("cuda:99", "xpu:77"):
            with pytest.raises(CheckpointError, match=f"map_location is '{device}'") as caught:
                read_checkpoint(tmp_path / name, map_location=device)
            assert not isinstance(caught.value, CorruptCheckpoint)
        with pytest.raises(CheckpointError, match="map_location is 'gpu'"):
            read_checkpoint(tmp_path / name, map_location="gpu")
        assert read_checkpoint(tmp_path / name, map_location="meta")["state_dict"]["w"].is_meta


@pytest.mark.parametrize(("dtype", "shape"), [("F32", [0, (1 << 63) - 1, 9]), ("F4", [0]), ("F4", [2])])
def test_strange_safetensors(dtype, shape, tmp_path):
    size = 1 if shape == [2] else 0
    header = json.dumps({"w": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * size)
    with pytest.raises(CheckpointError):
        read_checkpoint(tmp_path / "x.safetensors")


def test_a_hundred_thousand_storages_of_the_old_format(tmp_path):
    def reference(number):
        key = str(number).encode()
        return b"(h\x01h\x02X" + struct.pack("<I", len(key)) + key + b"h\x03K\x01NtQ"

    body = b"\x80\x02X\x07\x00\x00\x00storageq\x01ctorch\nByteStorage\nq\x02X\x03\x00\x00\x00cpuq\x03]("
    body += b"".join(map(reference, range(100_000))) + b"e."
    head = b"".join(pickle.dumps(part, 2) for part in (MAGIC, 1001, {"little_endian": True}))
    keys = [str(number) for number in range(100_000)]
    (tmp_path / "x.pth").write_bytes(head + body + pickle.dumps(keys, 2) + (struct.pack("<q", 1) + b"\0") * 100_000)
    start = time.perf_counter()
    with (tmp_path / "x.pth").open("rb") as file:
        check_legacy(file, (tmp_path / "x.pth").stat().st_size, "x")
    assert time.perf_counter() - start < 20  # it was minutes


@pytest.mark.parametrize(("views", "read"), [(3, True), (10, False)])
def test_views_of_one_storage_count_each(views, read, tmp_path):
    storage = torch.zeros(100_000)
    content = {f"w{number}": storage.view(-1) for number in range(views)}
    if read:
        assert len(_read(content, tmp_path)["state_dict"]) == views
    else:
        with pytest.raises(CheckpointError, match="more than 4 times the bytes"):
            _read(content, tmp_path)


def test_tensors_that_show_their_values_many_times(tmp_path):
    content = {"w": torch.zeros(1).expand(100), "v": torch.zeros(1000)}
    assert _read(content, tmp_path)["state_dict"]["w"].shape == (100,)


def test_a_config_text_costs_little_and_is_judged_once(monkeypatch):
    from mmvmamba.checkpoints import config_text

    def judge():
        _limit_memory(768 << 20)
        start = time.perf_counter()
        for text in ("a = [" + "[]," * 80_000 + "]", "a = [" + "[]," * 1_300_000 + "]"):
            content = {"meta": {"cfg": text, "config": text}, "config_text": text}
            try:
                take_config_text(content, "x")
            except UnsafeCheckpoint:
                assert len(text) > 256_000
        assert time.perf_counter() - start < 15
        return "judged"

    assert forked(judge) == ("", "judged")
    asked = []
    monkeypatch.setattr(config_text, "problem_with", lambda text: asked.append(text))
    take_config_text({"meta": {"cfg": "a = 1", "config": "a = 1"}, "config_text": "a = 1"}, "x")
    assert asked == ["a = 1"]


def test_what_honest_trainings_hold(tmp_path):
    from mmengine.config import ConfigDict

    addict = pytest.importorskip("addict")
    honest = {
        "info": ConfigDict(a=1, b=dict(c=2)), "addict": addict.Dict(a=1, b=dict(c=2)), "bytes": b"", "z": 1 + 2j,
        "default": defaultdict(list, a=[1]), "frozen": frozenset({1}),
        "args": Namespace(out=Path("/a/b"), to=Path("a")),
    }  # fmt: skip
    read = _read({"state_dict": STATE, "meta": honest}, tmp_path)["meta"]
    assert read == {**honest, "default": {"a": [1]}, "args": {"out": "/a/b", "to": "a"}}


def test_optimizer_states_by_id_and_other_keys(tmp_path):
    state = {140_000_000_000_000 + number: {"step": 1} for number in range(1000)}
    state |= {None: 1, True: 2, 1.5: 3, (0, "a"): 4}
    assert _read({"state_dict": STATE, "optimizer": {"state": state}}, tmp_path)["optimizer"]["state"] == state
    with pytest.raises(UnsafeCheckpoint, match="neither text nor small numbers") as caught:
        _read({"state_dict": STATE, "x": {(1 << 40) + number: 0 for number in range(20_000)}}, tmp_path)
    assert "delete" not in str(caught.value)


def test_a_schedule_of_one_cycle_resumes(tmp_path):
    from mmengine.optim import OneCycleLR
    from mmengine.runner import CheckpointLoader

    import mmvmamba.registry  # noqa: F401 (installs the loader)

    def schedule():
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1, momentum=0.9)
        return OneCycleLR(optimizer, eta_max=1.0, total_steps=10)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stored = schedule()
        stored.step()
        torch.save({"state_dict": STATE, "param_schedulers": [stored.state_dict()]}, tmp_path / "x.pth")
        content = CheckpointLoader.load_checkpoint(str(tmp_path / "x.pth"), logger="silent")
        resumed = schedule()
        resumed.load_state_dict(content["param_schedulers"][0])
        resumed.step()
    assert resumed.last_step == 2


def _text(data):
    return b"X" + struct.pack("<I", len(data)) + data


BOMBS = {
    "sets": b"](" + b"K\x01" * 100_000 + b"eq\x01" + b"c__builtin__\nset\nh\x01\x85R" * 1000,
    "bytes": _text(b"a" * 1_000_000) + b"q\x01" + _text(b"latin1")
    + b"q\x02" + b"c_codecs\nencode\nh\x01h\x02\x86R" * 1000,
    "paths": _text(b"a" * 1_000_000) + b"q\x01" + b"cpathlib\nPosixPath\nh\x01\x85R" * 1000,
}  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS)
def test_what_is_written_once_is_not_copied_again_and_again(bomb, tmp_path):
    zipped(b"\x80\x02](" + BOMBS[bomb] + b"e.", tmp_path / "x.pth")

    def read():
        _limit_memory()
        read_checkpoint(tmp_path / "x.pth")

    classes, message = forked(read)
    assert classes.startswith("UnsafeCheckpoint") and "again and again" in message
