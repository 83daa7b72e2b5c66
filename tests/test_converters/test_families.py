"""What holds of the official files of every family; a new one is tested by its key lists in tests/data/parity."""

from __future__ import annotations

import functools
import gzip
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmvmamba.apis.weights import check_weights
from mmvmamba.checkpoints.matching import differing, load
from mmvmamba.checkpoints.official import adapt, recognise
from mmvmamba.converters import convert_state_dict, from_upstream, to_upstream_state_dict
from mmvmamba.converters.base import load_converter
from mmvmamba.converters.files import convert_file, restore_file
from mmvmamba.errors import CheckpointMismatch
from mmvmamba.models.backbones import FAMILIES
from tests.test_checkpoints.official_files import random_state

PARITY = Path(__file__).parents[1] / "data" / "parity"
KEY_LISTS = sorted(PARITY.glob("*/*.keys.json.gz"))
CLASSIFIERS = [path for path in KEY_LISTS if "_backbone" not in path.name]
#: Classifiers with the very names and shapes of another family's of that size, whose weights there are.
TAKEN_FOR = {"shufflemamba_tiny": "vim", "shufflemamba_small": "vim", "shufflemamba_base": "vim"}
#: The others.
TOLD = [path for path in CLASSIFIERS if path.name.split(".")[0] not in TAKEN_FOR]
#: Families whose upstream has feature extractors that are no released classifier inside: other norms, other tokens.
WITH_OTHER_TRUNKS = ("shufflemamba",)


def _name(path: Path) -> str:
    return f"{path.parent.name}-{path.name.split('.')[0]}"


@functools.cache
def _keys(path: Path) -> dict[str, Any]:
    return json.loads(gzip.decompress(path.read_bytes()))


def _entries(path: Path) -> dict[str, torch.Tensor]:
    return {name: torch.empty(shape, device="meta") for name, (shape, _) in _keys(path)["keys"].items()}


def _variant(path: Path) -> str:
    """Return our name for the variant of a key list, whose own names it or upstream's function, with what is added."""
    stem, family = path.name.split(".")[0], path.parent.name
    released = load_converter(family).released
    words = {name: f"{family}_{name.replace('-', '_')}" for name in released}
    fits = {name: max((len(word) for word in (words[name], kwargs.get("function", words[name]))
                       if f"{stem}_".startswith(f"{word}_")), default=0)
            for name, kwargs in released.items()}  # fmt: skip
    longest = max(fits.values())
    (variant,) = [name for name, length in fits.items() if length == longest > 0]
    return variant


@functools.cache
def _smallest(family: str) -> Path:
    """Return the key list of the family's smallest classifier."""
    return min((path for path in TOLD if path.parent.name == family), key=lambda path: _keys(path)["num_params"])


@pytest.mark.parametrize("family", FAMILIES)
def test_released_are_the_variants_with_a_key_list_and_an_arch(family):
    variants = {_variant(path) for path in CLASSIFIERS if path.parent.name == family}
    assert variants == set(load_converter(family).released) == set(load_converter(family).sketches)
    for variant in variants:
        with torch.device("meta"):
            ours = FAMILIES[family](variant)
            theirs = from_upstream(family, "backbone", load_converter(family).released[variant])
        names = [{n: v.shape for n, v in m.state_dict().items() if "outnorm" not in n} for m in (ours, theirs)]
        assert names[0] == names[1]
        assert [m.rate for m in ours.modules() if hasattr(m, "rate")] == pytest.approx(
            [m.rate for m in theirs.modules() if hasattr(m, "rate")]
        )


@pytest.mark.parametrize("path", KEY_LISTS, ids=_name)
def test_every_file_is_recognised(path):
    """Family, variant and form from names and shapes alone, inside a detector or segmentor too."""
    family, converter, state = path.parent.name, load_converter(path.parent.name), _entries(path)
    form = "classifier" if "classifier" in _keys(path)["form"] else "backbone"
    if not _keys(path)["form"].endswith(("classifier", "backbone")):
        # With more around the backbone, or for another size of image: family and size are what can be told.
        found = recognise(state)
        assert found.family == family and found.sketch in set(converter.sketches.values())
        return
    found = recognise(state)
    if form == "backbone" and family in WITH_OTHER_TRUNKS:
        assert (found.family, found.variant, found.form) == (family, None, form)
        return
    family, variant = TAKEN_FOR.get(path.name.split(".")[0], family), _variant(path)
    converter = load_converter(family)
    assert (found.family, found.variant, found.form) == (family, variant, form)
    assert str(found) == f"{converter.title} {variant} ({form})"
    again = recognise(adapt(dict(state)))  # under our names
    assert (again.family, again.variant, again.form) == (family, variant, form)
    part = {f"backbone.{name}": value for name, value in state.items() if not re.fullmatch(converter.head, name)}
    heads = {"detector": "roi_head.bbox_head.fc_cls.weight", "segmentor": "decode_head.conv_seg.weight"}
    for form, head in heads.items():
        inside = recognise({**part, head: torch.empty(81, 1024, device="meta")})
        assert (inside.family, inside.variant, inside.form) == (family, variant, form)
    matrix = next(name for name, value in state.items() if re.search(r"\.0\.", name) and value.ndim > 1)
    other = recognise({**state, matrix: torch.empty(1, 1, 1, 1, device="meta")})
    assert (other.family, other.variant) == (family, None)
    assert f"{converter.title} with depths" in str(other)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_official_file_of_real_size(family, tmp_path):
    """The smallest: loads into a classifier and starts a detector's backbone, and comes back as it was."""
    pytest.importorskip("mmpretrain")
    path = _smallest(family)
    meta, converter = _keys(path), load_converter(family)
    state = random_state({name: shape for name, (shape, _) in meta["keys"].items()})
    state |= {name: torch.tensor(7) for name in state if name.endswith("num_batches_tracked")}
    torch.save({"model": state, "epoch": 3}, tmp_path / "official.pth")
    with torch.device("meta"):
        model = from_upstream(meta["family"], meta["form"], meta["kwargs"])
    model.to_empty(device="cpu")
    match = check_weights(model, str(tmp_path / "official.pth"))
    assert f"{len(state)}/{len(state)} tensors from" in match.line()
    load(model, match)
    assert not differing(model, match)
    own = to_upstream_state_dict(meta["family"], meta["form"], model.state_dict())
    assert list(own) == list(state) and all(torch.equal(own[name], value) for name, value in state.items())

    done = convert_file(tmp_path / "official.pth", tmp_path / "ours.safetensors")
    assert f"{converter.title} {_variant(path)} (classifier): {len(state)}/{len(state)} tensors" in done.line()
    restore_file(done.target, tmp_path / "back.pth")
    back = torch.load(tmp_path / "back.pth", weights_only=True)["model"]
    assert list(back) == list(state) and all(torch.equal(back[name], value) for name, value in state.items())

    init = dict(type="Pretrained", checkpoint=str(tmp_path / "official.pth"))
    backbone = FAMILIES[family](_variant(path), init_cfg=init)
    backbone.init_weights()
    taken = to_upstream_state_dict(family, "backbone", backbone.state_dict())
    trunk = {name: value for name, value in state.items() if not re.fullmatch(converter.head, name)}
    assert all(torch.equal(taken[name], value) for name, value in trunk.items())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("out_indices", [(0, 1, 2), [1, 2]], ids=str)
def test_a_classifier_starts_the_feature_extractor_of_the_same_arguments(family, out_indices):
    """Strictly, as ``convert_state_dict`` promises of its result."""
    for path in sorted((PARITY / family).glob("*.json")):
        meta = json.loads(path.read_text())
        if not meta["form"].endswith("classifier") or "permutations" in meta["kwargs"]:
            continue
        form = meta["form"].replace("classifier", "backbone")
        backbone = from_upstream(family, form, {**meta["kwargs"], "out_indices": out_indices})
        with np.load(path.with_suffix(".npz")) as data:
            state = {name[3:]: torch.from_numpy(data[name]).float() for name in data.files if name.startswith("sd:")}
        backbone.load_state_dict(convert_state_dict(family, form, state, fill_out_norms=out_indices), strict=True)
        taken = to_upstream_state_dict(family, form, backbone.state_dict())
        trunk = {name for name in state if not re.fullmatch(load_converter(family).head, name)}
        if family in WITH_OTHER_TRUNKS:
            trunk -= {"cls_token", "pos_embed"}
        assert trunk and all(torch.equal(taken[name], state[name]) for name in trunk)
        break
    else:
        raise AssertionError(f"no case of a classifier of {family}")


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_of_another_family_or_variant_are_refused_naming_both(family, tmp_path):
    """Of every other family the smallest official file, and of this one another variant."""
    own = _smallest(family)
    others = [_smallest(other) for other in FAMILIES if other != family]
    of_its_own = [path for path in TOLD if path.parent.name == family and path != own]
    others.append(min(of_its_own, key=lambda path: _keys(path)["num_params"]))
    with torch.device("meta"):
        model = FAMILIES[family](_variant(own))
    model.to_empty(device="cpu")
    for path in others:
        state = {name: torch.zeros(shape) for name, (shape, _) in _keys(path)["keys"].items()}
        torch.save({"model": state}, tmp_path / "other.pth")
        del state
        titles = [load_converter(each.parent.name).title for each in (path, own)]
        model.init_cfg = dict(type="Pretrained", checkpoint=str(tmp_path / "other.pth"))
        model._is_init = False
        both = rf"the checkpoint is {titles[0]} {_variant(path)} \(.*the model is {titles[1]} {_variant(own)} \("
        with pytest.raises(CheckpointMismatch, match=both):
            model.init_weights()
