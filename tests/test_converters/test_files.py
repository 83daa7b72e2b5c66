"""Official files become ours and come back, bit for bit, in every form that VMamba's ever had.

What holds of every family is in test_families.py.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from mmvmamba.apis.weights import check_weights
from mmvmamba.checkpoints import manifest_path, read_checkpoint, read_manifest
from mmvmamba.checkpoints.matching import differing, load
from mmvmamba.checkpoints.official import adapt, recognise
from mmvmamba.checkpoints.weights_file import write_safetensors
from mmvmamba.converters import from_upstream, to_upstream_state_dict
from mmvmamba.converters.base import load_converter
from mmvmamba.converters.files import convert_file, restore_file
from mmvmamba.errors import CheckpointError, CheckpointMismatch, ConfigError, CorruptCheckpoint, HashMismatch, SaveError
from mmvmamba.models.backbones import FAMILIES
from tests.test_checkpoints.official_files import (
    classifier_file,
    random_state,
    runner_file,
    with_old_names,
    with_pointwise_convolutions,
)

ROOT = Path(__file__).parents[2]
KEY_LISTS = sorted((ROOT / "tests/data/parity/vmamba").glob("*.keys.json.gz"))
SMALL = {
    "v2": dict(depths=[1, 1], dims=8, ssm_d_state=1, forward_type="v05_noz", patchembed_version="v2",
               downsample_version="v3", norm_layer="ln2d", ssm_conv_bias=False),
    "v0": dict(depths=[1, 1], dims=8, forward_type="v0", mlp_ratio=0.0, patchembed_version="v1",
               downsample_version="v1", norm_layer="ln"),
}  # fmt: skip


def _name(path):
    return f"{path.parent.name}-{path.name.split('.')[0]}"


def _variant(path):
    return path.name.split(".")[0].replace("vanilla_vmamba", "vanilla").removeprefix("vmamba_").replace("_", "-")


def _keys(path):
    return json.loads(gzip.decompress(path.read_bytes()))


def _same_bits(a, b):
    """Whether two state dicts have the same names, dtypes, shapes and bytes."""
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and a[name].shape == b[name].shape and torch.equal(a[name], b[name])
        for name in a
    )


def _backbone(kind):
    return from_upstream("vmamba", "backbone", {**SMALL[kind], "out_indices": (0, 1)})


def _official(kind, form="backbone"):
    """Return random entries of a small network under the present official names."""
    state = to_upstream_state_dict("vmamba", "backbone", _backbone(kind).state_dict())
    if form == "classifier":
        state = {name: value for name, value in state.items() if not name.startswith("outnorm")}
        state.update(random_state({"classifier.norm.weight": (16,), "classifier.norm.bias": (16,)}, seed=1))
        state.update(random_state({"classifier.head.weight": (5, 16), "classifier.head.bias": (5,)}, seed=2))
    return random_state({name: value.shape for name, value in state.items()})


def test_every_variant_has_its_key_list():
    assert {_variant(path) for path in KEY_LISTS} == set(load_converter("vmamba").released)


@pytest.mark.parametrize("path", KEY_LISTS, ids=_name)
def test_every_variant_is_recognised(path):
    """From names and shapes alone, in every form and under old names; not with an entry of another shape."""
    meta = _keys(path)
    state = {name: torch.empty(shape, device="meta") for name, (shape, _) in meta["keys"].items()}
    found = recognise(state)
    assert (found.family, found.variant, found.form, found.upstream) == ("vmamba", _variant(path), "classifier", True)
    assert str(found) == f"VMamba {_variant(path)} (classifier)"
    detector = {f"backbone.{name}": value for name, value in state.items() if not name.startswith("classifier.")}
    detector["roi_head.bbox_head.fc_cls.weight"] = torch.empty(81, 1024, device="meta")
    for form, one in {
        "classifier": [with_old_names(state), with_pointwise_convolutions(state), adapt(dict(state))],
        "detector": [detector, with_old_names(detector, "backbone.")],
        "backbone": [{name.removeprefix("backbone."): v for name, v in detector.items() if "head" not in name}],
        "segmentor": [{**detector, "decode_head.conv_seg.weight": torch.empty(1, device="meta")}],
    }.items():
        for entries in one:
            again = recognise(entries)
            assert (again.variant, again.form) == (_variant(path), form)
    wider = dict(state, **{"layers.0.blocks.0.op.A_logs": torch.empty(1, 1, device="meta")})
    assert recognise(wider).variant is None
    assert "VMamba with depths" in str(recognise(wider))


@pytest.mark.parametrize("path", KEY_LISTS, ids=_name)
def test_official_file_of_every_variant(path, tmp_path):
    """Of the real size, as upstream's training writes it: the whole file loads and comes back as it was."""
    pytest.importorskip("mmpretrain")
    meta = _keys(path)
    state = random_state({name: shape for name, (shape, _) in meta["keys"].items()})
    old = "vanilla" in path.name  # the first releases are the ones with old names
    stored = with_old_names(state) if old else with_pointwise_convolutions(state)
    torch.save({"model": stored, "epoch": 3}, tmp_path / "official.pth")
    with torch.device("meta"):
        model = from_upstream(meta["family"], meta["form"], meta["kwargs"])
    model.to_empty(device="cpu")
    count, match = len(meta["keys"]), check_weights(model, str(tmp_path / "official.pth"))
    assert f"{_variant(path)}): {count}/{count} tensors from" in match.line()
    load(model, match)
    assert not differing(model, match)
    own = to_upstream_state_dict(meta["family"], meta["form"], model.state_dict())
    assert _same_bits(own, state)

    done = convert_file(tmp_path / "official.pth", tmp_path / "ours.safetensors")
    assert f"VMamba {_variant(path)} (classifier): {count}/{count} tensors" in done.line()
    restore_file(tmp_path / "ours.safetensors", tmp_path / "back.pth")
    back = torch.load(tmp_path / "back.pth", weights_only=True)["model"]
    assert list(back) == list(stored)
    assert _same_bits(back, stored)


LAYOUTS = {
    "present": lambda state, prefix: dict(state),
    "old": lambda state, prefix: with_old_names(state, prefix),
    "4-D": lambda state, prefix: with_pointwise_convolutions(state),
    "old, 4-D": lambda state, prefix: with_old_names(with_pointwise_convolutions(state), prefix),
}


# The second generation never had the old names.
PAIRS = [(kind, layout) for kind in SMALL for layout in LAYOUTS if kind == "v0" or "old" not in layout]


@pytest.fixture(params=PAIRS, ids=lambda pair: ", ".join(pair))
def layout(request):
    kind, name = request.param
    return kind, LAYOUTS[name]


@pytest.mark.parametrize("ending", [".safetensors", ".pth"])
def test_classifier_files(layout, ending, tmp_path):
    kind, change = layout
    present = _official(kind, "classifier")
    stored = change(present, "")
    path = classifier_file(tmp_path / "official.pth", stored)
    done = convert_file(path, tmp_path / f"ours{ending}")
    assert set(done.left_out) == {"optimizer", "lr_scheduler", "max_accuracy", "scaler", "epoch", "config", "model_ema",
                                  "max_accuracy_ema"}  # fmt: skip
    assert (done.found.form, done.tensors) == ("classifier", len(stored))
    restore_file(done.target, tmp_path / "back.pth")
    back = torch.load(tmp_path / "back.pth", weights_only=True)["model"]
    assert list(back) == list(stored)
    assert _same_bits(back, stored)
    for checkpoint in (path, done.target, tmp_path / "back.pth"):  # each of the three starts a backbone
        model = _backbone(kind)
        model.init_cfg = dict(type="Pretrained", checkpoint=str(checkpoint))
        model.init_weights()
        own = to_upstream_state_dict("vmamba", "backbone", model.state_dict())
        taken = [name for name in present if not name.startswith("classifier.")]
        assert all(torch.equal(own[name], present[name]) for name in taken)
        assert float(model.outnorm0.weight.detach().sum()) == 8.0


@pytest.mark.parametrize("ending", [".safetensors", ".pth"])
@pytest.mark.parametrize("head", ["roi_head.bbox_head.fc_cls.weight", "decode_head.conv_seg.weight"])
def test_detector_and_segmentor_files(layout, ending, head, tmp_path):
    kind, change = layout
    present = {f"backbone.{name}": value for name, value in _official(kind).items()}
    stored = {
        **change(present, "backbone."),
        head: torch.rand(4, 3),
        "neck.fpn.bn.num_batches_tracked": torch.tensor(7),
    }
    meta = {"classes": ("cat", "dog"), "palette": [[1, 2, 3], [4, 5, 6]]}
    done = convert_file(runner_file(tmp_path / "official.pth", stored, meta), tmp_path / f"ours{ending}")
    assert done.found.form == ("detector" if "roi" in head else "segmentor")
    assert {"meta.epoch", "optimizer", "message_hub", "config_text"} <= set(done.left_out)
    ours = read_checkpoint(done.target)["state_dict"]
    assert {name.removeprefix("backbone.") for name in ours if name.startswith("backbone.")} == set(
        _backbone(kind).state_dict()
    )
    restore_file(done.target, tmp_path / "back.pth")
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert list(back["state_dict"]) == list(stored)
    assert _same_bits(back["state_dict"], stored)
    assert list(back["meta"]["dataset_meta"]["classes"]) == ["cat", "dog"]
    model = _backbone(kind)  # out norms included: the file has one for every stage
    model.init_cfg = dict(type="Pretrained", checkpoint=str(tmp_path / "official.pth"), prefix="backbone.")
    model.init_weights()
    own = {f"backbone.{k}": v for k, v in to_upstream_state_dict("vmamba", "backbone", model.state_dict()).items()}
    assert _same_bits(own, present)


@pytest.mark.parametrize("ending", [".safetensors", ".pth"])
def test_bare_feature_extractors(layout, ending, tmp_path):
    kind, change = layout
    stored = change(_official(kind), "")
    torch.save(stored, tmp_path / "official.pth")
    done = convert_file(tmp_path / "official.pth", tmp_path / f"ours{ending}")
    assert done.found.form == "backbone"
    restore_file(done.target, tmp_path / "back.pth")
    assert _same_bits(torch.load(tmp_path / "back.pth", weights_only=True)["model"], stored)


def test_files_of_a_training_here_go_out_under_present_names(tmp_path):
    """They note no names."""
    pytest.importorskip("mmpretrain")
    model = from_upstream("vmamba", "classifier", {**SMALL["v2"], "num_classes": 5})
    torch.save({"state_dict": model.state_dict(), "meta": {"epoch": 1}}, tmp_path / "trained.pth")
    done = restore_file(tmp_path / "trained.pth", tmp_path / "back.pth")
    assert done.left_out == ("meta.epoch",)
    back = torch.load(tmp_path / "back.pth", weights_only=True)["model"]
    assert _same_bits(back, to_upstream_state_dict("vmamba", "classifier", model.state_dict()))
    assert set(back) == set(_official("v2", "classifier"))


def test_the_average_can_be_asked_for(tmp_path):
    stored = _official("v2", "classifier")
    path = classifier_file(tmp_path / "official.pth", stored)
    convert_file(path, tmp_path / "ours.pth", section="model_ema")
    ours = read_checkpoint(tmp_path / "ours.pth")["state_dict"]
    assert torch.equal(ours["head.fc.bias"], stored["classifier.head.bias"] + 1)


def test_what_a_file_says_of_itself(tmp_path):
    path = classifier_file(tmp_path / "official.pth", _official("v2", "classifier"))
    convert_file(path, tmp_path / "new" / "ours.safetensors")
    with safe_open(tmp_path / "new/ours.safetensors", "pt") as file:
        notes = file.metadata()
    assert (notes["family"], notes["form"], notes["source_file"]) == ("vmamba", "classifier", "official.pth")
    assert notes["variant"] == "with depths (1, 1) and dims (8, 16)"
    manifest = read_manifest(tmp_path / "new" / "ours.safetensors")
    assert manifest.source == {"file": "official.pth", "sha256": notes["source_sha256"]}
    assert manifest.size == (tmp_path / "new/ours.safetensors").stat().st_size
    convert_file(path, tmp_path / "ours.pth", sha256=notes["source_sha256"])
    content = torch.load(tmp_path / "ours.pth", weights_only=True)  # without any allow-list
    assert content["meta"]["mmvmamba"]["source_sha256"] == notes["source_sha256"]
    with pytest.raises(HashMismatch):
        convert_file(path, tmp_path / "other.pth", sha256="0" * 64)
    data = bytearray((tmp_path / "ours.pth").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "ours.pth").write_bytes(data)
    with pytest.raises(CheckpointError):
        restore_file(tmp_path / "ours.pth", tmp_path / "back.pth")
    assert not (tmp_path / "back.pth").exists()


@pytest.mark.parametrize("restore", [False, True])
def test_nothing_is_overwritten(restore, tmp_path):
    path = classifier_file(tmp_path / "official.pth", _official("v2", "classifier"))
    source = convert_file(path, tmp_path / "ours.pth").target if restore else path
    function = restore_file if restore else convert_file
    target = tmp_path / "target.pth"
    for existing in (target, manifest_path(target), source):
        if existing != source:
            existing.write_text("precious")
        before = sorted((p.name, p.read_bytes()) for p in tmp_path.iterdir())
        with pytest.raises(SaveError, match="exists, expected a new name"):
            function(source, source if existing == source else target)
        assert sorted((p.name, p.read_bytes()) for p in tmp_path.iterdir()) == before
        if existing != source:
            existing.unlink()


def test_what_cannot_be_converted_is_named(tmp_path):
    state = _official("v2", "classifier")
    cases = {
        "layers.0.blocks.0.op.Es": (
            {**state, "layers.0.blocks.0.op.Es": torch.ones(1)},
            r"\['layers.0.blocks.0.op.Es'\]",
        ),
        "resnet": (
            {"conv1.weight": torch.ones(1), "fc.bias": torch.ones(1)},
            rf"no family known here \({', '.join(FAMILIES)}\).*conv1",
        ),
        "mixed": (
            {**with_old_names(_official("v0", "classifier")), **_official("v0", "classifier")},
            "mixes old and new",
        ),
        "inside": ({f"backbone.{k}": v for k, v in {**_official("v2"), "odd": torch.ones(1)}.items()}, r"\['odd'\]"),
    }
    for name, (entries, message) in cases.items():
        torch.save({"model": entries}, tmp_path / f"{name}.pth")
        with pytest.raises(CheckpointMismatch, match=message):
            convert_file(tmp_path / f"{name}.pth", tmp_path / "ours.safetensors")
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".pth"] * len(cases)


def test_wrong_targets_and_sources(tmp_path):
    path = classifier_file(tmp_path / "official.pth", _official("v2", "classifier"))
    with pytest.raises(ConfigError, match=r"expected a name ending in \.safetensors or \.pth"):
        convert_file(path, tmp_path / "ours.bin")
    with pytest.raises(ConfigError, match=r"expected a name ending in \.pth"):
        restore_file(path, tmp_path / "back.safetensors")
    with pytest.raises(CheckpointMismatch, match="has official names already"):
        restore_file(path, tmp_path / "back.pth")
    with pytest.raises(CheckpointError, match="does not exist"):
        convert_file(tmp_path / "nothing.pth", tmp_path / "ours.pth")
    (tmp_path / "page.pth").write_text("<html>")
    with pytest.raises(CorruptCheckpoint, match="HTML"):
        convert_file(tmp_path / "page.pth", tmp_path / "ours.pth")
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveError, match="cannot be made"):
        convert_file(path, tmp_path / "file" / "ours.pth")


@pytest.mark.parametrize(
    "spoil", [lambda names: names.popitem(), lambda names: names.update(odd="odd"), lambda names: _swap(names)]
)
def test_names_noted_wrongly_are_refused(spoil, tmp_path):
    """Whoever edits a file by hand gets no official file with the weights of one layer under the name of another."""
    path = classifier_file(tmp_path / "official.pth", _official("v2", "classifier"))
    content = torch.load(convert_file(path, tmp_path / "ours.pth").target, weights_only=True)
    names = json.loads(content["meta"]["mmvmamba"]["names"])
    spoil(names)
    content["meta"]["mmvmamba"]["names"] = json.dumps(names)
    torch.save(content, tmp_path / "edited.pth")
    with pytest.raises(CheckpointError, match="note of official names|do not come back"):
        restore_file(tmp_path / "edited.pth", tmp_path / "back.pth")
    assert not (tmp_path / "back.pth").exists()


def _swap(names):
    first, second = "layers.0.blocks.0.norm.weight", "layers.0.blocks.0.norm.bias"
    names[first], names[second] = names[second], names[first]


def test_command_line(tmp_path, monkeypatch, capsys):
    path = classifier_file(tmp_path / "official.pth", _official("v2", "classifier"))
    spec = importlib.util.spec_from_file_location("convert_checkpoint", ROOT / "tools/convert_checkpoint.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["convert_checkpoint.py", *map(str, arguments)])
        tool.main()
        return capsys.readouterr().out

    ours, back = tmp_path / "ours.safetensors", tmp_path / "back.pth"
    assert "(classifier): 52/52 tensors from" in run(path, ours)
    assert "(classifier): 52/52 tensors from" in run(ours, back, "--to-upstream")
    assert "52/52" in run(path, tmp_path / "average.pth", "--section", "model_ema")
    with pytest.raises(HashMismatch):
        run(path, tmp_path / "x.pth", "--sha256", "0" * 64)
    with pytest.raises(SystemExit, match="2"):
        run(path, tmp_path / "x.pth", "--to-upstream", "--section", "model_ema")
    refused = subprocess.run(
        [sys.executable, "-W", "ignore", str(ROOT / "tools/convert_checkpoint.py"), str(path), str(ours)],
        cwd=tmp_path, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert refused.returncode == 1
    assert refused.stderr.splitlines()[-1].startswith(f"error: {str(ours)!r} exists")
    assert "Traceback" not in refused.stderr


def test_safetensors_are_told_from_pickles_whatever_their_header_is_long(tmp_path):
    """The length stands first; one of 32 begins with the byte that begins a pickle."""
    for number in range(32):
        path = tmp_path / f"{number}.safetensors"
        write_safetensors(path, {"a": torch.ones(3)}, {"note": "x" * 8 * number}, {})
        assert torch.equal(read_checkpoint(path)["state_dict"]["a"], torch.ones(3))
