"""Reading checkpoints: what comes out of sound files, and files that are sound but claim too much."""

from __future__ import annotations

import pickle
import struct
import time
from collections import Counter, OrderedDict

import pytest
import torch
from mmengine.logging import HistoryBuffer
from safetensors.torch import save_file

from mmvmamba.checkpoints import Manifest, read_checkpoint, write_manifest
from mmvmamba.checkpoints.config_text import problem_with
from mmvmamba.errors import CheckpointError, CorruptCheckpoint, HashMismatch, UnsafeCheckpoint
from tests.test_checkpoints.forked import forked
from tests.test_checkpoints.hostile import MAGIC, zipped

np = pytest.importorskip("numpy")
STATE = OrderedDict([("backbone.a", torch.ones(2)), ("head.b", torch.zeros(3))])
SETTINGS = "model = dict(\n    type='VMamba',\n    scales=[1, -2.5, None],\n    pair=(True, 1))\n"


def _history():
    buffer = HistoryBuffer(max_length=3)
    for value in (0.1, 1e-300, float("nan"), 7.0):
        buffer.update(value, 2)
    return buffer


def _read(content, tmp_path, **options):
    torch.save(content, tmp_path / "x.pth")
    return read_checkpoint(tmp_path / "x.pth", **options)


def test_everything_a_training_of_mmengine_holds(tmp_path):
    meta = {"epoch": 2, "iter": 8, "seed": 5, "dataset_meta": {"classes": ("a", "b"), "palette": np.ones((2, 3), "u1")}}
    schedulers = [{"milestones": Counter({2: 1}), "base_values": [0.1]}]
    info = {"best": np.float32(3.5), "name": np.str_("x"), "flag": np.bool_(True), "last_ckpt": "x.pth"}
    hub = {"log_scalars": {"loss": _history()}, "runtime_info": info, "resumed_keys": OrderedDict(loss=True)}
    content = _read(
        {"meta": meta, "state_dict": STATE, "message_hub": hub, "param_schedulers": schedulers, "mmvmamba": {"x": [1]}},
        tmp_path,
    )
    palette = content["meta"]["dataset_meta"].pop("palette")
    assert palette.dtype == np.uint8 and palette.tolist() == [[1] * 3] * 2
    del meta["dataset_meta"]["palette"]
    assert content["meta"] == meta and content["mmvmamba"] == {"x": [1]}
    assert content["param_schedulers"] == schedulers and type(content["param_schedulers"][0]["milestones"]) is Counter
    read = content["message_hub"]["runtime_info"]
    assert read == info and [type(read[key]) for key in info] == [type(value) for value in info.values()]
    record = content["message_hub"]["log_scalars"]["loss"]
    assert record.max_length == 3
    assert record.log_history.tobytes() == _history()._log_history.tobytes()
    assert record.count_history.tobytes() == _history()._count_history.tobytes()
    record.log_history[0] = 1.0  # mmengine appends to it: it must be an array of its own


@pytest.mark.parametrize("code", ["<f4", ">f4", "<i8", "|b1", "<U3", "|S2", "<c8"])
def test_arrays_keep_type_order_and_values(code, tmp_path):
    array = np.asfortranarray(np.arange(6).reshape(2, 3).astype(code))
    read = _read({"state_dict": STATE, "x": array}, tmp_path)["x"]
    assert read.dtype == array.dtype and (read == array).all() and read.flags.f_contiguous


def test_mmengine_gets_its_own_histories_back(tmp_path):
    from mmengine.runner import CheckpointLoader

    import mmvmamba.registry  # noqa: F401 (installs the loader)

    hub = {"log_scalars": {"loss": _history()}, "runtime_info": {"cfg": SETTINGS}, "resumed_keys": {}}
    torch.save({"meta": {"cfg": "a = 1"}, "state_dict": STATE, "message_hub": hub}, tmp_path / "x.pth")
    content = CheckpointLoader.load_checkpoint(str(tmp_path / "x.pth"), map_location="cpu", logger="silent")
    buffer = content["message_hub"]["log_scalars"]["loss"]
    assert isinstance(buffer, HistoryBuffer)
    assert buffer._log_history.tobytes() == _history()._log_history.tobytes()
    buffer.update(1.0)
    assert buffer.current() == 1.0 and len(buffer._log_history) == 3


@pytest.mark.parametrize(
    "name", ["s3://x/y.pth", "petrel://y", "cluster:s3://y", "pavi://y", "ftp://h/y.pth", "http://h/y"]
)
def test_other_roads_are_refused(name):
    from mmengine.runner import CheckpointLoader

    import mmvmamba.registry  # noqa: F401 (installs the loader)

    with pytest.raises(CheckpointError, match="expected"):
        CheckpointLoader.load_checkpoint(name, logger="silent")


@pytest.mark.parametrize("scheme", ["torchvision", "mmcls", "open-mmlab", "openmmlab"])
def test_unknown_names_of_model_zoos(scheme):
    from mmengine.runner import CheckpointLoader

    with pytest.raises(CheckpointError, match="not in mmengine's table"):
        CheckpointLoader.load_checkpoint(f"{scheme}://no_such_model", logger="silent")


def test_names_of_model_zoos_lead_to_our_downloads(monkeypatch, tmp_path):
    from mmengine.runner import CheckpointLoader

    from mmvmamba.checkpoints import reader

    asked = []
    torch.save({"state_dict": STATE}, tmp_path / "x.pth")
    monkeypatch.setattr(reader, "fetch", lambda url, sha256: asked.append(url) or tmp_path / "x.pth")
    names = {"torchvision://resnet50": "head.b", "open-mmlab://resnet50_caffe": "head.b", "mmcls://vgg11": "a"}
    for name, key in names.items():
        assert key in CheckpointLoader.load_checkpoint(name, logger="silent")["state_dict"]
    assert len(asked) == 3 and all(url.startswith("https://") for url in asked)


def test_sections(tmp_path):
    ema = {"backbone.a": torch.full((2,), 5.0)}
    content = {"model": STATE, "model_ema": ema, "epoch": 3}
    read = _read(content, tmp_path)
    assert list(read["state_dict"]) == list(STATE) and read["epoch"] == 3 and "model" not in read
    assert _read(content, tmp_path, section="model_ema")["state_dict"]["backbone.a"][0] == 5.0
    with pytest.raises(CheckpointError, match=r"no section 'ema'; found \['model', 'model_ema'\]"):
        _read(content, tmp_path, section="ema")


@pytest.mark.parametrize("name", ["net", "params", "params_ema"])
def test_sections_of_other_trainings_are_listed(name, tmp_path):
    content = {name: STATE, "other": STATE, "optimizer": {"state": {}}, "epoch": 3}
    with pytest.raises(
        CheckpointError, match=rf"sections \['{name}', 'other'\] hold tensors: give .* section, or save"
    ):
        _read(content, tmp_path)
    assert list(_read(content, tmp_path, section=name)["state_dict"]) == list(STATE)


def test_names_without_an_address_are_refused(monkeypatch):
    from mmengine.runner import CheckpointLoader
    from mmengine.runner import checkpoint as stock

    monkeypatch.setattr(stock, "get_torchvision_models", lambda: {"shufflenetv2_x1.5": None})
    with pytest.raises(CheckpointError, match=r"'torchvision://shufflenetv2_x1.5' is in mmengine's table without an"):
        CheckpointLoader.load_checkpoint("torchvision://shufflenetv2_x1.5", logger="silent")
    with pytest.raises(CheckpointError, match="not in mmengine's table of 1 names"):
        CheckpointLoader.load_checkpoint("torchvision://shufflenetv2", logger="silent")


def test_the_prefix_of_a_distributed_training_goes(tmp_path):
    assert list(_read({f"module.{key}": value for key, value in STATE.items()}, tmp_path)["state_dict"]) == list(STATE)
    mixed = {"module.a": torch.ones(1), "b": torch.ones(1)}
    assert list(_read(mixed, tmp_path)["state_dict"]) == list(mixed)


def test_versions_of_modules_stay_with_the_weights(tmp_path):
    assert _read(torch.nn.BatchNorm1d(2).state_dict(), tmp_path)["state_dict"]._metadata[""] == {"version": 2}
    parallel = torch.nn.DataParallel(torch.nn.Sequential(torch.nn.BatchNorm1d(2))).state_dict()
    assert _read(parallel, tmp_path)["state_dict"]._metadata == {"": {"version": 1}, "0": {"version": 2}}


def test_safetensors(tmp_path):
    save_file(dict(STATE), tmp_path / "x.pth", metadata={"family": "vmamba"})
    content = read_checkpoint(tmp_path / "x.pth")
    assert content["meta"] == {"family": "vmamba"} and torch.equal(content["state_dict"]["backbone.a"], torch.ones(2))


def test_what_other_code_allowed_is_not_allowed_here(tmp_path):
    path, canary = tmp_path / "x.pth", tmp_path / "canary"
    torch.serialization.add_safe_globals([(eval, "builtins.getattr"), eval])
    try:
        program = b"\x80\x02}X\x0a\x00\x00\x00state_dictc__builtin__\ngetattr\n"
        text = f"open({str(canary)!r}, 'w')".encode()
        zipped(program + b"X" + struct.pack("<I", len(text)) + text + b"\x85Rs.", path)
        with pytest.raises(CheckpointError):
            read_checkpoint(path)
        assert not canary.exists()
        assert eval in torch.serialization.get_safe_globals()
    finally:
        torch.serialization.clear_safe_globals()


def test_hashes(tmp_path):
    path = tmp_path / "x.pth"
    torch.save(STATE, path)
    import hashlib

    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert read_checkpoint(path, sha256=digest.upper())
    with pytest.raises(HashMismatch, match=f"has sha256 {digest}, expected {'0' * 64} \\(sha256\\)"):
        read_checkpoint(path, sha256="0" * 64)
    with pytest.raises(HashMismatch, match="expected 64 hexadecimal digits"):
        read_checkpoint(path, sha256=digest[:8])
    write_manifest(path, Manifest("0" * 64, path.stat().st_size))
    with pytest.raises(HashMismatch, match="its manifest"):
        read_checkpoint(path, sha256=digest)
    write_manifest(path, Manifest(digest, path.stat().st_size + 1))
    with pytest.raises(
        CorruptCheckpoint, match=rf"has {path.stat().st_size} bytes, expected the {path.stat().st_size + 1}"
    ):
        read_checkpoint(path)


def test_nothing_of_a_file_with_the_wrong_hash_is_parsed(tmp_path):
    path = tmp_path / "x.pth"
    path.write_bytes(b"\x80\x04 not even a pickle")
    with pytest.raises(HashMismatch):
        read_checkpoint(path, sha256="0" * 64)


@pytest.mark.parametrize("bad", [float("nan"), complex(0, float("nan"))])
@pytest.mark.parametrize("where", ["state_dict", "ema_state_dict"])
def test_weights_that_are_nan(bad, where, tmp_path):
    content = {"state_dict": dict(STATE), "ema_state_dict": dict(STATE)}
    content[where] = {**STATE, "backbone.c": torch.tensor([1.0, bad])}
    with pytest.raises(CheckpointError, match="'backbone.c' holds NaN, expected"):
        _read(content, tmp_path)
    assert _read(content, tmp_path, allow_nan=True)["state_dict"]


def test_infinite_values_are_meant(tmp_path):
    mask = torch.full((2, 2), -torch.inf).triu(1)
    assert torch.equal(_read({"state_dict": {"mask": mask}}, tmp_path)["state_dict"]["mask"], mask)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e5m2, torch.uint16, torch.int8]
)
def test_element_types(dtype, tmp_path):
    read = _read({"w": torch.tensor([1.0, 2.0]).to(dtype)}, tmp_path)["state_dict"]["w"]
    assert read.dtype == dtype and read.float().tolist() == [1.0, 2.0]


def _sparse():
    return torch.eye(3).to_sparse()


def _quantized():
    return torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)


@pytest.mark.parametrize("make", [_sparse, _quantized, lambda: torch.empty(3, device="meta")])
def test_tensors_without_ordinary_bytes(make, tmp_path):
    with pytest.raises(UnsafeCheckpoint, match="torch"):
        _read({"w": make()}, tmp_path)


def _tensor(storage=b"\x00" * 16, numel=4, offset=0, size=(4,), stride=(1,), key="0"):
    """Return a pickle of a dict with one tensor, and the records, with everything in it to choose."""
    body = b"\x80\x02}X\x01\x00\x00\x00wctorch._utils\n_rebuild_tensor_v2\n(("
    body += pickle.dumps("storage", 2)[2:-1] + b"ctorch\nFloatStorage\n"
    for part in (key, "cpu", numel):
        body += pickle.dumps(part, 2)[2:-1]
    body += b"tQ"
    for part in (offset, size, stride, False):
        body += pickle.dumps(part, 2)[2:-1]
    return body + b"ccollections\nOrderedDict\n)RtRs.", {"data/0": storage}


@pytest.mark.parametrize(
    "claim",
    [
        dict(size=(5,)),
        dict(size=(1 << 20,), stride=(0,)),
        dict(offset=1),
        dict(offset=-1),
        dict(size=(2, 2), stride=(3, 2)),
        dict(size=(-1,)),
        dict(stride=(-1,)),
        dict(size=(1 << 40,), stride=(0,)),
        dict(size=(1 << 62, 1 << 62), stride=(0, 0)),
        dict(size=(2, 2), stride=(1 << 62, 1)),
        dict(numel=5),
        dict(numel=3),
        dict(numel=-1),
        dict(numel=1 << 40),
        dict(key="1"),
        dict(key="../version"),
        dict(size=(4, 1)),
        dict(storage=b"\x00" * 15),
    ],
)
def test_tensors_that_claim_more_than_they_have(claim, tmp_path):
    program, records = _tensor(**claim)
    zipped(program, tmp_path / "x.pth", records=records)
    with pytest.raises(
        CheckpointError, match="x.pth.*(claims|show more|in a way that no writer|reference to a storage)"
    ):
        read_checkpoint(tmp_path / "x.pth")


def test_the_hand_made_tensor_is_sound_without_false_claims(tmp_path):
    program, records = _tensor()
    zipped(program, tmp_path / "x.pth", records=records)
    assert read_checkpoint(tmp_path / "x.pth")["state_dict"]["w"].tolist() == [0.0] * 4


def _doubling(step, rounds=60):
    """Return a pickle in which each value is made of two of the one before."""
    return b"\x80\x02}X\x0a\x00\x00\x00state_dict" + b"]" + step * rounds + b"s."


def _key_of_one_hash(number):
    return b"\x8a\x0a" + (number * ((1 << 61) - 1)).to_bytes(10, "little") + b"N"


_CODED = b"q\x01c_codecs\nencode\nh\x01X\x03\x00\x00\x00hex\x86R"
BOMBS = {
    "a tensor without bytes": b"\x80\x02ctorch\nTensor\n\x8a\x08\x00\x00\x00\x00\x00\x10\x00\x00\x85R.",
    "zeros": b"\x80\x02c__builtin__\nbytearray\n\x8a\x06\x00\x00\x00\x00\x00\x10\x85R.",
    "tuples of tuples": _doubling(b"q\x01h\x01\x86"),
    "lists within themselves": b"\x80\x02]q\x01h\x01a.",
    "deep lists": b"\x80\x02" + b"]" * 500_000 + b"a" * 499_999 + b".",
    "deep tuples": b"\x80\x02)" + b"\x85" * 500_000 + b".",
    "text coded again and again": b"\x80\x02X\x04\x00\x00\x00aaaa" + _CODED * 50 + b".",
    "millions of instructions": b"\x80\x02" + b"N" * 8_000_000 + b".",
    "a text of four gigabytes": b"\x80\x02X\xff\xff\xff\xff.",
    "a dict of keys of one hash": b"\x80\x02}(" + b"".join(map(_key_of_one_hash, range(1, 60_000))) + b"u.",
}


@pytest.mark.parametrize("container", ["zip", "old"])
@pytest.mark.parametrize("bomb", BOMBS)
def test_files_that_grow_are_refused_at_once(bomb, container, tmp_path):
    path = tmp_path / "x.pth"
    if container == "zip":
        zipped(BOMBS[bomb], path)
    else:
        head = b"".join(pickle.dumps(part, 2) for part in (MAGIC, 1001, {"little_endian": True}))
        path.write_bytes(head + BOMBS[bomb] + pickle.dumps([], 2))

    def read():
        from tests.test_checkpoints.test_damaged import _limit_memory

        _limit_memory(1 << 30)
        start = time.perf_counter()
        try:
            read_checkpoint(path)
        finally:
            assert time.perf_counter() - start < 20
        return "read"

    classes, message = forked(read)
    assert "CheckpointError" in classes.split(), f"{classes} {message}"


def test_the_file_is_opened_once(tmp_path, monkeypatch):
    """What was checked is what is loaded, though the name leads to another file by then."""
    from mmvmamba.checkpoints import reader

    for name, value in (("x.pth", 1.0), ("y.pth", 2.0)):
        torch.save({"w": torch.full((2,), value)}, tmp_path / name)
    verify = reader._verify

    def verify_then_swap(*arguments):
        verify(*arguments)
        (tmp_path / "y.pth").replace(tmp_path / "x.pth")

    monkeypatch.setattr(reader, "_verify", verify_then_swap)
    assert read_checkpoint(tmp_path / "x.pth")["state_dict"]["w"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a = 1\nb = c = [1, (2,), {3}, {'x': -1.5}]\n# a remark\n",
        "model = dict(type='VMamba', scales=[1, None], inner=dict(a=list([1]), b=set([2]), c=tuple()))",
        "limit = inf\nother = -nan",
        r"pattern = '\d'",
        # inert where it stands, and honest trainings have it
        "model = dict(dtype=torch.float16, loss=b, size=2 * n, names=frozenset({'a'}), steps=range(3))",
        "a.b = 1\na[0] = 1\na: int = 1\na += 1\na = 1 if 2 else 3\nc = dict(**b)\n",
        "configs/mask_rcnn.py\nmodel = dict(type='MaskRCNN')\n",
        "/home/me/configs/mask_rcnn.py\nmodel = dict(type='MaskRCNN')\n",
        "model:\n  type: VMamba\n",
        "model = dict(head=<class 'Head'>, f=<function f at 0x7f>)",
        "a = {{ fileDirname }}",
        "a = 1\0",
        "'A detector.'\na = 1",
    ],
)
def test_settings_are_kept_as_text(text, tmp_path):
    content = _read({"state_dict": STATE, "meta": {"cfg": text, "config": text, "seed": 1}}, tmp_path)
    assert content["config_text"] == text and content["meta"] == {"seed": 1}


@pytest.mark.parametrize(
    "text",
    [
        "import os",
        "open('x', 'w')",
        "a = open('x')",
        "a = dict(b=[open('x')])",
        "a = (lambda: 1)()",
        "a = [x for x in (1,)]",
        "a = f'{1}'",
        "a = dict.fromkeys([1])",
        "def f(): pass",
        "class A: pass",
        "if 1: a = 1",
        "for a in b: pass",
        "a = (b := 1)",
        "a = [*open('x')]",
        "a[open('x')] = 1",
        "a: open('x') = 1",
        "a = yield",
        "{'type': 'os.system'}",
        "[1]",
        "x: !!python/name:os.system",
        "a = " + "-" * 100_000 + "1",
        "a = '" + "x" * (256 << 10) + "'",
        "x" * (5 << 20),
    ],
)
def test_programs_are_not_settings(text):
    assert problem_with(text)


def test_a_config_that_is_no_text(tmp_path):
    with pytest.raises(UnsafeCheckpoint, match="meta.cfg is a dict"):
        _read({"state_dict": STATE, "meta": {"cfg": {"type": "os.system"}}}, tmp_path)


def test_unreadable_files(tmp_path):
    (tmp_path / "pipe").symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match="is no ordinary file"):
        read_checkpoint(tmp_path / "pipe")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device is there")
def test_weights_of_a_device_that_is_not_here(tmp_path):
    program, records = _tensor()
    zipped(
        program.replace(b"cpu", b"cuda:0").replace(b"X\x03\x00\x00\x00cuda", b"X\x06\x00\x00\x00cuda"),
        tmp_path / "x.pth",
        records=records,
    )
    assert read_checkpoint(tmp_path / "x.pth")["state_dict"]["w"].device.type == "cpu"
    with pytest.raises(CheckpointError, match="Give map_location='cpu'"):
        read_checkpoint(tmp_path / "x.pth", map_location=None)


def test_weights_that_do_not_fit_the_memory(tmp_path):
    torch.save({"w": torch.zeros(40 << 20)}, tmp_path / "x.pth")

    def read():
        from tests.test_checkpoints.test_damaged import _limit_memory

        _limit_memory(64 << 20)
        read_checkpoint(tmp_path / "x.pth")

    classes, message = forked(read)
    assert classes.startswith("CheckpointError") and "does not fit the memory" in message
