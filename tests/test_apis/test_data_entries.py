"""Entries of data sets that are of another type than their readers take end in an error of ours, whatever they are."""

from __future__ import annotations

import copy

import pytest

from mmvmamba.apis import check_data, load_config
from mmvmamba.apis.dataset_checks import DataCheck
from mmvmamba.errors import ConfigError, MMVMambaError
from tests.nano_models import digits_config, on_digits

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")
pytest.importorskip("mmpretrain")

#: What a command line or a slip can make of any entry.
ODD = (5, True, "", "x", "a\0b", "x" * 5000, ["a", "b"], {"a": 1}, [[1]])
ENTRIES = (
    "type", "data_root", "ann_file", "data_prefix", "data_prefix.img", "data_prefix.img_path",
    "data_prefix.seg_map_path", "metainfo", "metainfo.classes", "backend_args", "img_suffix", "seg_map_suffix",
    "ignore_index", "pipeline",
)  # fmt: skip


def _with(cfg, entry, value):
    """Return a copy with an entry of the training data changed."""
    changed = copy.deepcopy(cfg)
    outer, _, inner = entry.partition(".")
    dataset = changed.train_dataloader.dataset
    if inner:
        before = dataset.get(outer)
        dataset[outer] = {**(before if isinstance(before, dict) else {}), inner: value}
    else:
        dataset[outer] = value
    return changed


@pytest.mark.parametrize("task", ["det", "seg", "cls"])
def test_odd_values_are_refused_as_a_command_line_should(task, small_digits):
    cfg = on_digits(load_config(str(digits_config(task))), small_digits)
    check_data(cfg, ["train"])
    refused = 0
    for entry in ENTRIES:
        for value in ODD:
            for check in (check_data, DataCheck(options=None).config):
                try:
                    check(_with(cfg, entry, value), ["train"])
                except MMVMambaError:  # any other class is the fault this test looks for
                    refused += 1
    assert refused > 80  # each task passes over entries that only others have


@pytest.mark.parametrize(
    ("entry", "value", "said"),
    [
        ("data_root", ["a", "b"], r"train_dataloader.dataset.data_root is \['a', 'b'\], expected a path as text"),
        ("data_prefix.img", 3, "train_dataloader.dataset.data_prefix.img is 3, expected a path as text"),
        ("metainfo", "x", "train_dataloader.dataset.metainfo is 'x', expected entries with names"),
        ("type", "", "train_dataloader.dataset: type is '', which is no data set of mmdet"),
    ],
)
def test_the_entry_is_named(entry, value, said, small_digits):
    cfg = on_digits(load_config(str(digits_config("det"))), small_digits)
    with pytest.raises(ConfigError, match=said):
        check_data(_with(cfg, entry, value), ["train"])


def test_a_loader_must_have_entries():
    with pytest.raises(ConfigError, match="train_dataloader is 5, expected entries with names"):
        check_data({"train_dataloader": 5}, ["train"])
