"""What a checkpoint holds becomes tensors, numbers and texts, and comes back with the same types and bits."""

from __future__ import annotations

import io
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("mmengine")

from mmengine.logging import HistoryBuffer

from mmvmamba.engine.plain_form import make_plain, restore
from mmvmamba.errors import CorruptCheckpoint, SaveError


def _there_and_back(checkpoint: dict[str, Any]) -> dict[str, Any]:
    make_plain(checkpoint)
    file = io.BytesIO()
    torch.save(checkpoint, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    restore(loaded)
    return loaded


def test_histories_come_back_bit_for_bit():
    values = [0.1, float("nan"), -0.0, 1e-320]
    history = HistoryBuffer(values, [1, 2, 3, 4], max_length=7)
    whole = HistoryBuffer([1, 2], [1, 1])
    hub = dict(
        log_scalars=OrderedDict(loss=history, step=whole, none=HistoryBuffer()), runtime_info={}, resumed_keys={}
    )
    found = _there_and_back({"message_hub": hub})["message_hub"]["log_scalars"]
    for name, buffer in hub["log_scalars"].items():
        assert isinstance(found[name], HistoryBuffer) and found[name].max_length == buffer.max_length
        for ours, theirs in zip(found[name].data, buffer.data, strict=True):
            assert (ours.dtype, ours.tobytes()) == (theirs.dtype, theirs.tobytes())


@pytest.mark.parametrize(
    "value",
    [
        np.float32(0.1), np.float64(0.1), np.int8(-3), np.uint16(65535), np.bool_(True), np.complex64(1 + 2j),
        np.arange(6.0, dtype=np.float16).reshape(2, 3)[:, ::2], np.zeros((0, 3), np.int64), np.array(5),
        np.array(["person", "a"]), np.str_("name"), np.array([1, 2], ">i4"),
    ],
    ids=repr,
)  # fmt: skip
def test_numpy_comes_back(value):
    found = _there_and_back({"meta": {"x": [value]}})["meta"]["x"][0]
    assert type(found) is type(value) and np.array_equal(found, value)
    assert np.asarray(found).dtype == np.asarray(value).dtype.newbyteorder("=")


def test_other_kinds_become_plain():
    found = _there_and_back({
        "a": Path("x/y"), "b": frozenset({1}), "c": {np.int64(3): torch.__version__}, "d": (1, None, 2.5, b"x"),
        "e": torch.float16,
    })  # fmt: skip
    expected = {"a": "x/y", "b": {1}, "c": {3: str(torch.__version__)}, "d": (1, None, 2.5, b"x"), "e": torch.float16}
    assert found == expected
    assert type(found["c"][3]) is str


def test_notes_of_a_state_dict_are_kept():
    state = torch.nn.BatchNorm1d(2).state_dict()
    found = _there_and_back({"state_dict": state})["state_dict"]
    assert found._metadata == state._metadata and found._metadata[""]["version"] == 2


def test_config_text_leaves_the_places_where_mmengine_runs_it():
    live = {"cfg": True, "epoch": True}
    checkpoint = {
        "meta": {"cfg": "a = 1", "config": "b = 2", "epoch": 3},
        "message_hub": dict(log_scalars={}, runtime_info={"cfg": "a = 1", "epoch": 3}, resumed_keys=live),
    }
    make_plain(checkpoint)
    assert checkpoint["meta"] == {"epoch": 3}
    assert checkpoint["message_hub"]["runtime_info"] == {"epoch": 3}
    assert checkpoint["message_hub"]["resumed_keys"] == {"epoch": True}
    assert checkpoint["config_text"] == "a = 1"
    assert live == {"cfg": True, "epoch": True}, "the dict that MMEngine works with has changed"


def test_functions_of_a_scheduler_are_left_to_its_constructor():
    checkpoint = {"param_schedulers": [{"last_step": 3, "anneal_func": abs}]}
    make_plain(checkpoint)
    assert checkpoint == {"param_schedulers": [{"last_step": 3}]}


@pytest.mark.parametrize(
    ("value", "named"), [(object(), r"meta\.x is a builtins\.object"), (np.array([object()]), r"meta\.x .*of object")]
)
def test_what_has_no_plain_form_is_named(value, named):
    with pytest.raises(SaveError, match=f"checkpoint entry {named}"):
        make_plain({"meta": {"x": value}})


@pytest.mark.parametrize(
    "value",
    [
        {"log_history": torch.ones(2, 2), "count_history": torch.ones(2), "max_length": 5},
        {"log_history": torch.ones(3), "count_history": torch.ones(2), "max_length": 5},
        {"log_history": torch.ones(3), "count_history": torch.ones(3), "max_length": 2},
        {"log_history": ["a"], "count_history": [1], "max_length": 2},
        {"numpy_array": "O", "value": torch.ones(1)},
        {"numpy_array": "no type", "value": torch.ones(1)},
        {"numpy_number": "<f8", "value": torch.ones(1)},
        {"numpy_array": "<f4", "value": ["text"]},
    ],
    ids=str,
)
def test_what_only_looks_like_the_plain_form_is_refused(value):
    with pytest.raises(CorruptCheckpoint, match="checkpoint entry hub.x"):
        restore({"hub": {"x": value}})
