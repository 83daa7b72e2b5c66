"""A checkpoint fits as a whole, with what is named left out, or it is refused and the model is as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.ao.quantization.observer import PerChannelMinMaxObserver

from mmvmamba.checkpoints.matching import check, compare, covers, differing, load, renamed
from mmvmamba.errors import CheckpointMismatch, ConfigError

OWN = {"stem.weight": torch.zeros(4, 3), "stem.bias": torch.zeros(4), "head.fc.weight": torch.zeros(2, 4)}
NAMES = {"what": "Model", "source": "'x.pth'"}


def _stored(**changes):
    stored = {name: torch.ones_like(value) for name, value in OWN.items()}
    stored.update({name.replace("__", "."): value for name, value in changes.items()})
    return {name: value for name, value in stored.items() if value is not None}


def test_what_fits_is_reported():
    match = compare(OWN, _stored(), **NAMES)
    assert match.line() == "Model: 3/3 tensors from 'x.pth'"
    assert list(match.taken) == list(OWN)


def test_problems_are_counted_and_named():
    stored = _stored(
        stem__bias=torch.ones(4).double(), stem__weight=torch.ones(4, 2), head__fc__weight=None, extra=torch.ones(1)
    )
    with pytest.raises(CheckpointMismatch) as caught:
        compare(OWN, stored, **NAMES, advice="Do this.")
    assert str(caught.value) == (
        "checkpoint 'x.pth' does not fit Model: 1 of 3 entries missing ['head.fc.weight'], 1 unexpected ['extra'], "
        "1 of another shape ['stem.weight (4, 2) instead of (4, 3)'], 1 of another dtype "
        "['stem.bias torch.float64 instead of torch.float32']. Do this."
    )
    many = {f"name{i}": torch.zeros(1) for i in range(30)}
    with pytest.raises(CheckpointMismatch, match=r"30 of 30 entries missing \['name0', .*'name9'\]") as caught:
        compare(many, {"other": torch.zeros(1)}, **NAMES)
    assert "name10" not in str(caught.value)


def test_nan_is_refused_and_infinity_is_not():
    with pytest.raises(CheckpointMismatch, match=r"1 NaN \['stem.bias'\]"):
        compare(OWN, _stored(stem__bias=torch.tensor([1.0, float("nan"), 0.0, 0.0])), **NAMES)
    compare(OWN, _stored(stem__bias=torch.tensor([1.0, -float("inf"), 0.0, 0.0])), **NAMES)


FLOATS = ("float16", "bfloat16", "float32", "float64")
INTEGERS = ("int8", "uint8", "int16", "int32", "int64")
EXACT = {
    *(("float16", own) for own in FLOATS if own != "bfloat16"),
    *(("bfloat16", own) for own in FLOATS if own != "float16"),
    *((stored, own) for i, stored in enumerate(FLOATS) for own in FLOATS[i:] if i > 1),
    *((stored, own) for i, stored in enumerate(INTEGERS) for own in INTEGERS[i:] if own != "uint8" or i),
}


@pytest.mark.parametrize("stored", [*FLOATS, *INTEGERS, "bool", "complex64"])
@pytest.mark.parametrize("own", [*FLOATS, *INTEGERS, "bool"])
def test_only_dtypes_that_keep_every_value_are_taken(stored, own):
    """The table above is written down independently of the one in the code."""
    arguments = {"a": torch.ones(1).to(getattr(torch, own))}, {"a": torch.ones(1).to(getattr(torch, stored))}
    if (stored, own) in EXACT or stored == own:
        compare(*arguments, **NAMES)
    else:
        with pytest.raises(CheckpointMismatch, match=f"a torch.{stored} instead of torch.{own}"):
            compare(*arguments, **NAMES)


@pytest.mark.parametrize(
    ("entry", "covered"),
    [("head", True), ("head.", True), ("head.fc", True), ("head.fc.weight", True), ("he*", True),
     ("head.*.weight", True), ("he", False), ("head.f", False), ("head.fc.weight.x", False), ("fc", False),
     ("*.bias", False)],
)  # fmt: skip
def test_beginnings_are_whole_parts(entry, covered):
    assert covers(entry, "head.fc.weight") is covered


@pytest.mark.parametrize(
    ("changes", "skipped", "unused"),
    [
        (dict(head__fc__weight=torch.ones(7, 4)), ("head.fc.weight",), ()),
        (dict(head__fc__weight=None), ("head.fc.weight",), ()),
        (dict(head__fc__weight=None, head__other=torch.ones(1)), ("head.fc.weight",), ("head.other",)),
        (dict(head__other=torch.ones(1)), (), ("head.other",)),
        (dict(head__fc__weight=torch.ones(2, 4, dtype=torch.int64)), ("head.fc.weight",), ()),
    ],
)
def test_what_is_named_may_be_missing(changes, skipped, unused):
    match = compare(OWN, _stored(**changes), allow_missing=["head"], **NAMES)
    assert (match.skipped, match.unused) == (skipped, unused)
    assert list(match.taken) == [name for name in OWN if name not in skipped]
    assert all(name in match.line() for name in (*skipped, *unused))
    with pytest.raises(CheckpointMismatch):
        compare(OWN, _stored(**changes), **NAMES)


def test_one_name_is_taken_whole_or_not_at_all():
    match = compare(OWN, _stored(stem__bias=torch.ones(9)), allow_missing=["stem"], **NAMES)
    assert match.skipped == ("stem.weight", "stem.bias")
    assert list(match.taken) == ["head.fc.weight"]


def test_names_of_nothing_are_refused():
    with pytest.raises(ConfigError, match=r"'haed' is the beginning of no name.*Did you mean 'head'\?"):
        compare(OWN, _stored(), allow_missing=["haed"], **NAMES)
    with pytest.raises(ConfigError, match="allow_missing is 'head', expected a sequence"):
        compare(OWN, _stored(), allow_missing="head", **NAMES)
    with pytest.raises(CheckpointMismatch, match="nothing in it is for Model"):
        compare(OWN, {"z": torch.ones(1)}, allow_missing=["stem", "head", "z"], **NAMES)


class _Renaming(nn.Module):
    """A module that knows an older name of its parameter, and the older layout of its batch norm."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))
        self.norm = nn.BatchNorm1d(3)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        if prefix + "kernel" in state_dict:
            state_dict[prefix + "weight"] = state_dict.pop(prefix + "kernel").reshape(self.weight.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _old_file(**changes):
    state = _Renaming().state_dict()
    del state["norm.num_batches_tracked"]
    state.pop("weight")
    state["kernel"] = torch.full((1, 3), 5.0)
    return {f"a.{name}": value for name, value in {**state, **changes}.items()}


def test_modules_convert_what_they_know():
    """Without touching the model: only ``load`` does."""
    model = nn.ModuleDict({"a": _Renaming()})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    match = check(model, _old_file(), source="'x.pth'")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert (len(match.taken), match.total) == (6, 6)
    assert differing(model, match) == ["a.weight"]
    load(model, match)
    assert torch.equal(model["a"].weight, torch.full((3,), 5.0))
    assert differing(model, match) == []
    with pytest.raises(CheckpointMismatch, match=r"_Renaming 'a' cannot convert.*RuntimeError"):
        check(model, _old_file(kernel=torch.zeros(4)), source="'x.pth'")
    with pytest.raises(CheckpointMismatch, match=r"1 unexpected \['a.norm.other'\]"):
        check(model, _old_file(**{"norm.other": torch.zeros(4)}), source="'x.pth'")


#: What nothing but this test may ask PyTorch for.
LENIENT = {"strict": False}


def test_it_says_what_loading_does():
    """Missing and unexpected names are those that PyTorch's own loading reports, whichever is left out."""
    model = nn.ModuleDict({"a": _Renaming(), "b": nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))})
    full = model.state_dict()
    for dropped in full:
        stored = {name: value for name, value in full.items() if name != dropped}
        missing, unexpected = model.load_state_dict({**stored, "odd": torch.ones(1)}, **LENIENT)
        assert unexpected == ["odd"]
        assert missing == ([] if dropped.endswith("num_batches_tracked") else [dropped])
        if not missing:  # as before PyTorch 0.4.1
            assert len(check(model, stored, source="'x.pth'").taken) == 13
            continue
        with pytest.raises(CheckpointMismatch, match=rf"1 of 13 entries missing \['{dropped}'\]\. "):
            check(model, stored, source="'x.pth'")


def test_modules_may_compute_tables_themselves():
    """And look at what they have loaded, as mmcv's ConvAWS2d does."""

    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))
            self.register_buffer("table", torch.arange(4))

        def _load_from_state_dict(self, state_dict, prefix, *args):
            state_dict.pop(prefix + "table", None)
            super()._load_from_state_dict(state_dict, prefix, *args)
            assert float(self.weight.detach().sum()) == 6.0

    model = nn.Sequential(Table())
    match = check(model, {"0.weight": torch.full((2,), 3.0), "0.table": torch.arange(9)}, source="'x.pth'")
    assert match.line() == "Sequential: 1/2 tensors from 'x.pth'; 1 keep their values: 0.table"
    assert float(model[0].weight.detach().sum()) == 2.0
    with pytest.raises(CheckpointMismatch, match=r"1 of 2 entries missing \['0.table'\]"):
        check(model, {"0.weight": torch.full((2,), 3.0)}, source="'x.pth'")


def test_data_parallel_wrappers_are_looked_through():
    model = nn.DataParallel(nn.Linear(2, 2))
    match = check(model, {"weight": torch.ones(2, 2), "bias": torch.ones(2)}, source="'x.pth'")
    load(model, match)
    assert match.what == "Linear"
    assert float(model.module.weight.detach().sum()) == 4.0


def test_buffers_that_are_not_saved_are_not_asked_for():
    model = nn.Linear(2, 2)
    model.register_buffer("kept", torch.zeros(1))
    model.register_buffer("derived", torch.zeros(1), persistent=False)
    match = check(model, {name: torch.ones_like(value) for name, value in model.state_dict().items()}, source="'x.pth'")
    assert list(match.taken) == ["weight", "bias", "kept"]
    with pytest.raises(CheckpointMismatch, match=r"1 unexpected \['derived'\]"):
        check(model, {**match.taken, "derived": torch.zeros(1)}, source="'x.pth'")


def test_modules_may_take_the_shape_of_the_file():
    """A calibrated observer of quantisation, which has no values before."""
    model, calibrated = nn.Sequential(PerChannelMinMaxObserver()), nn.Sequential(PerChannelMinMaxObserver())
    calibrated(torch.randn(5, 3))
    match = check(model, calibrated.state_dict(), source="'x.pth'")
    assert model[0].min_val.shape == (0,)
    load(model, match)
    assert torch.equal(model[0].min_val, calibrated[0].min_val)
    assert model[0].min_val.shape == (5,)


def test_tensors_without_shapes_are_named():
    model = nn.Sequential(nn.LazyLinear(2))
    with pytest.raises(CheckpointMismatch, match=r"LazyLinear '0' has tensors without shapes yet.*Run it once"):
        check(model, {"0.weight": torch.ones(2, 3), "0.bias": torch.ones(2)}, source="'x.pth'")
    assert model[0].has_uninitialized_params()


@pytest.mark.parametrize("start", ["_orig_mod.", "stem._orig_mod."])
def test_names_of_compiled_modules_are_understood(start):
    model = nn.ModuleDict({"stem": nn.Linear(2, 2)})
    beginning = start if start.startswith("_") else ""
    state = {f"{beginning}stem.{start.removeprefix(beginning).removeprefix('stem.')}{name}": torch.ones(shape)
             for name, shape in (("weight", (2, 2)), ("bias", (2,)))}  # fmt: skip
    match = check(model, state, source="'x.pth'")
    assert list(match.taken) == ["stem.weight", "stem.bias"]
    with pytest.raises(CheckpointMismatch, match=r"_orig_mod.*and 'stem.bias' are both 'stem.bias', expected each"):
        check(model, {**state, "stem.bias": torch.ones(2)}, source="'x.pth'")


def test_names_of_compiled_modules_stay_where_the_model_has_them():
    model = nn.ModuleDict({"stem": torch.compile(nn.Linear(2, 2))})
    assert list(check(model, model.state_dict(), source="'x.pth'").taken) == list(model.state_dict())


class _Turned(nn.Module):
    """A module that stores its weight the other way round since version 2."""

    _version = 2

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0]))

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        if local_metadata.get("version", 1) < 2 and prefix + "weight" in state_dict:
            state_dict[prefix + "weight"] = state_dict[prefix + "weight"].flip(0)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


@pytest.mark.parametrize(("version", "expected"), [(1, [4.0, 3.0]), (2, [3.0, 4.0]), (None, [4.0, 3.0])])
def test_old_entries_are_converted_once(version, expected):
    model = nn.Sequential(_Turned())
    stored = model.state_dict()
    stored["0.weight"] = torch.tensor([3.0, 4.0])
    stored._metadata["0"] = {"version": version}
    if version is None:
        stored = dict(stored)
    load(model, check(model, stored, source="'x.pth'"))
    assert model[0].weight.tolist() == expected


def test_versions_of_modules_are_renamed_with_them():
    state = nn.ModuleDict({"module": nn.ModuleDict({"norm": nn.BatchNorm1d(2)}), "other": _Turned()}).state_dict()
    part = renamed(state, lambda name: name[7:] if name.startswith("module.") else None, "'x.pth'")
    assert part._metadata == {"": {"version": 1}, "norm": {"version": 2}}
    assert list(part) == [f"norm.{name}" for name in nn.BatchNorm1d(2).state_dict()]
