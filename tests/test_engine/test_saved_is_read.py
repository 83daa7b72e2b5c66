"""What the checkpoint hook writes, the reader reads: whatever a training or its config holds (or the save says no)."""

from __future__ import annotations

import enum
import random
from collections import Counter, OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("mmengine")

from mmengine.hooks import Hook

from mmvmamba.checkpoints import read_checkpoint
from mmvmamba.engine.plain_form import make_plain, restore
from mmvmamba.errors import SaveError
from tests.test_engine.tiny_training import tiny_runner


class Colour(enum.IntEnum):
    RED = 1


class Foreign:
    """Something that no checkpoint may hold; its name is the same in every process (pytest-xdist compares them)."""

    def __repr__(self) -> str:
        return "Foreign()"


def _with_notes() -> torch.Tensor:
    tensor = torch.ones(2)
    tensor.no_weight_decay = True
    return tensor


def _nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


LEAVES: list[Any] = [
    *(0, -1, True, None, 1 << 31, 1 << 63, 1 << 100, 1 << 3000, 0.5, float("nan"), 1j, "", "text", b"", b"bytes"),
    *(torch.float16, torch.qint8, torch.device("cuda", 1), torch.device("meta"), torch.Size([2, 3]), Path("a/b")),
    *(np.float32(1), np.arange(3), np.array(["a"]), np.datetime64("2026-11-21"), Colour.RED, Foreign(), range(3), abs),
    *(_nested(20), _nested(61), {1, 2}, {1.5}, {(1, 2)}, frozenset({"a"}), {b"a"}, Counter("aab"), defaultdict(list)),
    *(torch.ones(2).expand(1000, 2), torch.eye(2).to_sparse(), torch.empty(2, device="meta"), torch.ones(4)[1:3]),
    *(torch.ones(2, dtype=torch.complex64).conj(), torch.nn.Parameter(torch.ones(2))),
    *(torch.tensor(1, dtype=torch.uint8),),
    *(torch.zeros(2).to(torch.float8_e4m3fnuz), torch.zeros(2).to(torch.float8_e4m3fn), torch.ones(0, 3)),
    *(torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), _with_notes()),
    *(torch.ones(2, requires_grad=True) * 2,),
]  # fmt: skip
KEYS: list[Any] = [
    *("key", 1, 1 << 31, 1 << 62, 1 << 63, True, None, 0.5, float("inf"), (1, "a"), ((1,), 2), tuple(range(20))),
    *(b"key", frozenset({1}), np.int64(7), Colour.RED, torch.float32),
]


def _saved_and_read(value: Any, tmp_path: Path) -> dict[str, Any] | None:
    """Return what is read of a checkpoint that holds a value, or None if it was refused when it was to be saved."""
    checkpoint = {"state_dict": OrderedDict(w=torch.ones(64)), "meta": {"epoch": 1}, "extra": value}
    try:
        make_plain(checkpoint)
    except SaveError as error:
        if "checkpoint entry extra" not in str(error):
            raise
        return None
    torch.save(checkpoint, tmp_path / "x.pth")
    torch.load(tmp_path / "x.pth", weights_only=True)
    content = read_checkpoint(tmp_path / "x.pth")
    restore(content)
    return content


@pytest.mark.parametrize("number", range(len(LEAVES)), ids=lambda number: repr(LEAVES[number])[:30])
def test_a_value_is_read_or_refused_when_it_is_saved(number, tmp_path):
    # The second file is large: a tensor that shows its values many times counts with all of them.
    for value in (LEAVES[number], {"a": [LEAVES[number]], "b": torch.zeros(100)}):
        _saved_and_read(value, tmp_path)


@pytest.mark.parametrize("number", range(len(KEYS)), ids=lambda number: repr(KEYS[number])[:30])
def test_a_key_is_read_or_refused_when_it_is_saved(number, tmp_path):
    content = _saved_and_read({KEYS[number]: 1}, tmp_path)
    if content is not None:
        assert content["extra"] == {KEYS[number]: 1}


def test_what_is_accepted_is_read(tmp_path):
    """A few hundred random heaps of all these."""
    read = 0
    for seed in range(300):
        draw = random.Random(seed)

        def value(depth: int, draw: random.Random = draw) -> Any:
            kind = draw.choice(["leaf", "leaf", "list", "tuple", "dict", "ordered"]) if depth < 4 else "leaf"
            if kind == "leaf":
                return draw.choice(LEAVES)
            if kind in ("dict", "ordered"):
                made = {draw.choice(KEYS[:6]): value(depth + 1) for _ in range(draw.randrange(3))}
                return made if kind == "dict" else OrderedDict(made)
            return (list if kind == "list" else tuple)(value(depth + 1) for _ in range(draw.randrange(3)))

        read += _saved_and_read(value(0), tmp_path) is not None
    assert read > 100


def test_ordinary_values_are_not_refused(tmp_path):
    kept = {1.5: (1, 2), None: {3}, True: 1j, (1, "a"): torch.float16, 1 << 40: b"x"}
    assert _saved_and_read(kept, tmp_path)["extra"] == kept
    expanded = torch.ones(2).expand(1000, 2)
    assert torch.equal(_saved_and_read([expanded], tmp_path)["extra"][0], expanded)


def test_notes_stay_where_a_tensor_of_a_state_dict_changes():
    state = torch.nn.BatchNorm1d(2).state_dict()
    state["running_mean"] = torch.zeros(1).expand(2)
    checkpoint = {"state_dict": state}
    make_plain(checkpoint)
    assert checkpoint["state_dict"] is not state and checkpoint["state_dict"]._metadata[""] == {"version": 2}


@pytest.mark.parametrize("key", ["state_dict", "ema_state_dict"])
def test_weights_that_are_nan_are_not_saved(key):
    with pytest.raises(SaveError, match=rf"{key}\.mask holds NaN, expected.*lower learning rate"):
        make_plain({key: {"mask": torch.tensor([0.0, torch.nan])}})
    make_plain({key: {"mask": torch.tensor([0.0, -torch.inf])}})


@pytest.mark.parametrize(
    "settings",
    [
        dict(type="Toy", dtype=torch.float16),
        dict(kind=frozenset({1}), span=range(3), z=1 + 2j, path=Path("a")),
        dict(module=torch.nn.Linear(2, 2), function=abs, cls=Colour),
        dict(text="!!python/name:os.system", long="x" * 300_000),
    ],
    ids=["dtype", "kinds", "objects", "long"],
)
def test_a_config_with_more_than_settings_does_not_stop_a_resume(settings, tmp_path):
    from mmengine.config import Config

    text = Config(dict(model=settings)).pretty_text if "module" not in settings else f"model = {settings!r}"
    checkpoint = {"state_dict": {"w": torch.ones(2)}, "meta": {"cfg": text}, "message_hub": {"runtime_info": {}}}
    make_plain(checkpoint)
    torch.save(checkpoint, tmp_path / "x.pth")
    kept = read_checkpoint(tmp_path / "x.pth")["config_text"]
    assert kept == text or kept.startswith("# The config was left out: its text ")


class Puts(Hook):
    """Store something, behind the checkpoint hook."""

    priority = "LOWEST"

    def __init__(self, value: Any) -> None:
        self.value = value

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        if runner.iter > 4:
            checkpoint["late"] = self.value


@pytest.mark.parametrize("value", [abs, torch.eye(2).to_sparse(), _nested(80), {frozenset({1}): 1}], ids=repr)
def test_a_file_that_could_not_be_read_takes_nobodys_place(value, tmp_path):
    """A hook that comes later may put in what it likes: the file is proved before the old ones go."""
    runner = tiny_runner(tmp_path, dict(interval=1, max_keep_ckpts=2), length=3, hooks=[Puts(value)])
    with pytest.raises(SaveError, match=r"epoch_2.pth.* was not kept, because no training could go on from it"):
        runner.train()
    assert sorted(path.name for path in tmp_path.glob("*_*.pth*")) == ["epoch_1.pth", "epoch_1.pth.json"]
    assert (tmp_path / "last_checkpoint").read_text().endswith("epoch_1.pth")
    assert not list(tmp_path.glob(".*unfinished")) and read_checkpoint(tmp_path / "epoch_1.pth")
