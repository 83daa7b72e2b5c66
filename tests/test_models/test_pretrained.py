"""Reading weights: every layout in use, every way a file can be wrong."""

import sys
import types

import pytest
import torch
from mmengine.logging import HistoryBuffer

from mmvmamba.errors import CheckpointError, CheckpointMismatch
from mmvmamba.models.pretrained import read_weights

STATE = {"backbone.a": torch.ones(2), "head.b": torch.zeros(3)}


class Foreign:
    """A class that no weight file should need."""


@pytest.fixture
def yacs(monkeypatch):
    """The package yacs in miniature, for the time of writing a file."""
    module = types.ModuleType("yacs.config")

    class CfgNode(dict):
        def __init__(self, entries):
            super().__init__(entries)
            self.__dict__["__immutable__"] = False

    CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"
    module.CfgNode = CfgNode
    monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", module)
    return CfgNode


@pytest.mark.parametrize("layout", [lambda s: s, lambda s: {"state_dict": s}, lambda s: {"model": s, "epoch": 3}],
                         ids=["bare", "state_dict", "model"])  # fmt: skip
@pytest.mark.parametrize("zipped", [True, False])
def test_layouts(layout, zipped, tmp_path):
    torch.save(layout(STATE), tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    read = read_weights(str(tmp_path / "x.pth"))
    assert list(read) == list(STATE)
    assert list(read_weights(str(tmp_path / "x.pth"), "backbone")) == ["a"]
    assert list(read_weights(str(tmp_path / "x.pth"), "head.")) == ["b"]
    with pytest.raises(CheckpointMismatch, match=r"begins with prefix 'neck\.'.*'backbone', 'head'"):
        read_weights(str(tmp_path / "x.pth"), "neck")


@pytest.mark.parametrize("zipped", [True, False])
def test_official_files_with_their_configuration(yacs, zipped, tmp_path, monkeypatch):
    config = yacs({"MODEL": yacs({"NAME": "vssm1"}), "EPOCHS": 300})
    torch.save({"model": STATE, "config": config}, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    monkeypatch.delitem(sys.modules, "yacs.config")
    monkeypatch.delitem(sys.modules, "yacs")
    assert torch.equal(read_weights(str(tmp_path / "x.pth"))["backbone.a"], torch.ones(2))


def test_files_of_a_training_with_mmengine(tmp_path):
    history = HistoryBuffer()
    history.update(1.0)
    torch.save({"state_dict": STATE, "message_hub": {"log_scalars": {"loss": history}}}, tmp_path / "x.pth")
    assert list(read_weights(str(tmp_path / "x.pth"))) == list(STATE)


def _text(path):
    path.write_text("<!DOCTYPE html>\n<title>Not Found</title>")


def _cut(path):
    torch.save(STATE, path)
    path.write_bytes(path.read_bytes()[:-200])


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "does not exist, expected a file. Train or download it first"),
        (lambda path: path.mkdir(), "is a folder"),
        (lambda path: path.write_bytes(b""), "has 0 bytes"),
        (_text, "is an HTML page beginning '<!DOCTYPE html>"),
        (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1"), "is a text file beginning"),
        (lambda path: path.write_bytes(b"\x00\xff\x01\x02"), "begins with the bytes"),
        (_cut, "probably cut off"),
        (lambda path: path.write_bytes(b"\x80\x02}q"), "cannot be read"),
        (lambda path: torch.save({"model": STATE, "args": Foreign()}, path), r"holds objects of \S*Foreign, expected"),
        (lambda path: torch.save([torch.ones(1)], path), "holds a list, expected a dict of tensors"),
        (lambda path: torch.save({"weights": STATE}, path), r"'weights' \(dict\) are no tensors"),
        (lambda path: torch.save({"model": {}}, path), "the state dict is empty"),
    ],
)
def test_unusable_files(write, message, tmp_path):
    path = tmp_path / "x.pth"
    write(path)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_weights(str(path))
    assert str(path) in str(caught.value)


def test_nothing_in_a_file_is_executed(tmp_path):
    class Malicious:
        def __reduce__(self):
            return (eval, (f"open({str(tmp_path / 'executed')!r}, 'w')",))

    torch.save({"model": STATE, "x": Malicious()}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="eval"):
        read_weights(str(tmp_path / "x.pth"))
    assert not (tmp_path / "executed").exists()
