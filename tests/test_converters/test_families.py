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
from mmvmamba.models.backbones.columnar import ColumnarBackbone
from tests.test_checkpoints.official_files import random_state

PARITY = Path(__file__).parents[1] / "data" / "parity"
KEY_LISTS = sorted(PARITY.glob("*/*.keys.json.gz"))
COLUMNAR = [family for family, cls in FAMILIES.items() if issubclass(cls, ColumnarBackbone)]
#: Family -> one whose names are the same.
ALIKE = {"shufflemamba": "vim"}
CLASSIFIERS = [path for path in KEY_LISTS if "_backbone" not in path.name]


def _name(path: Path) -> str:
    return f"{path.parent.name}-{path.name.split('.')[0]}"


@functools.cache
def _keys(path: Path) -> dict[str, Any]:
    return json.loads(gzip.decompress(path.read_bytes()))


def _entries(path: Path) -> dict[str, torch.Tensor]:
    return {name: torch.empty(shape, device="meta") for name, (shape, _) in _keys(path)["keys"].items()}


def _variant(path: Path) -> str | None:
    """Return our name for the variant of a key list, whose own names it or upstream's function, with what is added.

    None where it is of no released classifier's network: ShuffleMamba's feature extractors have other norms and tokens.
    """
    stem, family = path.name.split(".")[0], path.parent.name
    released = load_converter(family).released
    words = {name: f"{family}_{name.replace('-', '_')}" for name in released}
    fits = {name: max((len(word) for word in (words[name], kwargs.get("function", words[name]))
                       if f"{stem}_".startswith(f"{word}_")), default=0)
            for name, kwargs in released.items()}  # fmt: skip
    longest = max(fits.values())
    if not longest:
        return None
    (variant,) = [name for name, length in fits.items() if length == longest]
    return variant


def _is_released(path: Path) -> bool:
    """Return whether the key list is of a classifier, or of one without its head."""
    return path in CLASSIFIERS or (_keys(path)["form"] == "backbone" and path.parent.name not in COLUMNAR)


@functools.cache
def _same_names_and_shapes(path: Path) -> tuple[tuple[str, str], ...]:
    """Return the families and variants of all classifiers that nothing in a state dict tells from this one.

    Some train one network at several sizes of images, and ShuffleMamba is Vim trained in another way.
    """
    keys = dict(sorted(_keys(path)["keys"].items()))
    released = [other for other in KEY_LISTS if _is_released(other)]
    twins = [other for other in released if dict(sorted(_keys(other)["keys"].items())) == keys]
    return tuple((other.parent.name, _variant(other)) for other in twins)


@functools.cache
def _is_told(path: Path) -> bool:
    """Return whether a network can be told from all of other families."""
    return len({family for family, _ in _same_names_and_shapes(path)}) == 1


@functools.cache
def _smallest(family: str) -> Path:
    """Return the key list of the family's smallest classifier that can be told from all of other families."""
    return min(
        (path for path in CLASSIFIERS if path.parent.name == family and _is_told(path)),
        key=lambda path: _keys(path)["num_params"],
    )


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
    if not _is_released(path):
        # With more around the backbone, or for another size of image: family and size are what can be told.
        found = recognise(state)
        assert found.family in (family, ALIKE.get(family)) and found.sketch in set(converter.sketches.values())
        return
    found = recognise(state)
    if _variant(path) is None:
        assert (found.family, found.variant, found.form) == (family, None, form)
        return
    assert (found.family, found.variant) in _same_names_and_shapes(path) and found.form == form
    assert str(found) == f"{load_converter(found.family).title} {found.variant} ({form})"
    again = recognise(adapt(dict(state)))  # under our names
    assert (again.family, again.variant, again.form) == (found.family, found.variant, form)
    part = {f"backbone.{name}": value for name, value in state.items() if not re.fullmatch(converter.head, name)}
    heads = {"detector": "roi_head.bbox_head.fc_cls.weight", "segmentor": "decode_head.conv_seg.weight"}
    for form, head in heads.items():
        inside = recognise({**part, head: torch.empty(81, 1024, device="meta")})
        assert (inside.family, inside.variant) in _same_names_and_shapes(path) and inside.form == form
    matrix = next(name for name, value in state.items() if re.search(r"\.0\.", name) and value.ndim > 1)
    other = recognise({**state, matrix: torch.empty(1, 1, 1, 1, device="meta")})
    assert other.family in {twin for twin, _ in _same_names_and_shapes(path)} and other.variant is None
    assert re.search(rf"^{load_converter(other.family).title} with (depths|depth|dim) ", str(other))


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
    assert f"{converter.title} {_variant(path)} (classifier): {len(state)}/{len(state)} tensors" in done.line() or (
        len(_same_names_and_shapes(path)) > 1
    )
    assert f"(classifier): {len(state)}/{len(state)} tensors" in done.line()
    restore_file(done.target, tmp_path / "back.pth")
    back = torch.load(tmp_path / "back.pth", weights_only=True)["model"]
    assert list(back) == list(state) and all(torch.equal(back[name], value) for name, value in state.items())

    init = dict(type="Pretrained", checkpoint=str(tmp_path / "official.pth"))
    backbone = FAMILIES[family](_variant(path), init_cfg=init)
    backbone.init_weights()
    taken = to_upstream_state_dict(family, "backbone", backbone.state_dict())
    bare = {name.removeprefix("backbone."): value for name, value in state.items()
            if not re.fullmatch(converter.head, name)}  # fmt: skip
    # A position embedding loses the row of the class token, or is for another grid.
    other = {name for name, value in bare.items() if taken[name].shape != value.shape}
    assert other <= {"pos_embed"} and bare
    assert all(torch.equal(taken[name], value) for name, value in bare.items() if name not in other)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("out_indices", [(0, 1, 2), [1, 2]], ids=str)
def test_a_classifier_starts_the_feature_extractor_of_the_same_arguments(family, out_indices):
    """Strictly, as ``convert_state_dict`` promises of its result."""
    for path in sorted((PARITY / family).glob("*.json")):
        meta = json.loads(path.read_text())
        if not meta["form"].endswith("classifier") or "permutations" in meta["kwargs"]:
            continue
        form = meta["form"].replace("classifier", "backbone")
        if family in COLUMNAR:  # whose cases have two or three layers
            layers = len(from_upstream(family, form, meta["kwargs"]).depths)
            out_indices = [i for i in out_indices if i < layers]
        backbone = from_upstream(family, form, {**meta["kwargs"], "out_indices": out_indices})
        with np.load(path.with_suffix(".npz")) as data:
            state = {name[3:]: torch.from_numpy(data[name]).float() for name in data.files if name.startswith("sd:")}
        backbone.load_state_dict(convert_state_dict(family, form, state, fill_out_norms=out_indices), strict=True)
        taken = to_upstream_state_dict(family, form, backbone.state_dict())
        trunk = {name for name in state if not re.fullmatch(load_converter(family).head, name)}
        bare = {name: name.removeprefix("backbone.") for name in trunk}
        if "cls_token" not in taken:  # upstream's feature extractor has none, whatever the arguments
            trunk -= {"cls_token"}
        assert trunk and all(
            torch.equal(taken[bare[name]], state[name])
            for name in trunk
            if taken[bare[name]].shape == state[name].shape
        )
        assert {bare[name] for name in trunk if taken[bare[name]].shape != state[name].shape} <= {"pos_embed"}
        break
    else:
        raise AssertionError(f"no case of a classifier of {family}")


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_of_another_family_or_variant_are_refused_naming_both(family, tmp_path):
    """Of every other family the smallest official file, and of this one another variant."""
    own = _smallest(family)
    others = [_smallest(other) for other in FAMILIES if other != family]
    of_its_own = [path for path in CLASSIFIERS if path.parent.name == family and path != own and _is_told(path)]
    # An embedding of positions on another grid fits by design.
    sketches = load_converter(family).sketches
    others += [path for path in of_its_own if sketches[_variant(path)] != sketches[_variant(own)]][:1]
    with torch.device("meta"):
        model = FAMILIES[family](_variant(own))
    model.to_empty(device="cpu")
    for path in others:
        if (family, _variant(own)) in _same_names_and_shapes(path):
            continue
        state = {name: torch.zeros(shape) for name, (shape, _) in _keys(path)["keys"].items()}
        torch.save({"model": state}, tmp_path / "other.pth")
        del state
        titles = [load_converter(each.parent.name).title for each in (path, own)]
        model.init_cfg = dict(type="Pretrained", checkpoint=str(tmp_path / "other.pth"))
        model._is_init = False
        told = re.escape(_variant(path))
        both = rf"the checkpoint is {titles[0]} {told} \(.*the model is {titles[1]} {_variant(own)} \("
        with pytest.raises(CheckpointMismatch, match=both):
            model.init_weights()
