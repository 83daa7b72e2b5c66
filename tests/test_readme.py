"""The examples of the README run."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from importlib import import_module
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


def code_block(containing: str) -> str:
    """Return the one Python block of the README that holds a text."""
    blocks = [b for b in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S) if containing in b]
    assert len(blocks) == 1, f"{len(blocks)} Python blocks of README.md hold {containing!r}"
    return blocks[0]


def test_own_mmdet_config(tmp_path: Path) -> None:
    """The config builds a detector that takes a training step."""
    pytest.importorskip("mmdet")
    from mmdet.structures import DetDataSample
    from mmengine.config import Config
    from mmengine.optim import build_optim_wrapper
    from mmengine.registry import MODELS, init_default_scope
    from mmengine.structures import InstanceData

    text = code_block("# my_config.py")
    assert len(text.strip().splitlines()) <= 10
    config_file = tmp_path / "my_config.py"
    config_file.write_text(text)
    cfg = Config.fromfile(config_file)
    init_default_scope("mmdet")
    cfg.model.backbone.arch = "nano"  # the same road, shorter
    cfg.model.neck.in_channels = [32, 64, 128, 256]
    model = MODELS.build(cfg.model).train()
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper)
    assert type(model.backbone).__name__ == "VMamba"

    from mmdet.structures.mask import BitmapMasks

    sample = DetDataSample(metainfo=dict(img_shape=(64, 96), ori_shape=(64, 96), pad_shape=(64, 96),
                                         batch_input_shape=(64, 96), scale_factor=(1.0, 1.0)))  # fmt: skip
    masks = torch.zeros(1, 64, 96, dtype=torch.uint8)
    masks[:, 10:40, 20:60] = 1
    sample.gt_instances = InstanceData(
        bboxes=torch.tensor([[20.0, 10.0, 60.0, 40.0]]),
        labels=torch.tensor([3]),
        masks=BitmapMasks(masks.numpy(), 64, 96),
    )
    losses, _ = model.parse_losses(model(torch.randn(1, 3, 64, 96), [sample], mode="loss"))
    before = model.backbone.layers[0].blocks[0].op.in_proj.weight.detach().clone()
    optimizer.update_params(losses)
    assert losses.isfinite()
    assert not torch.equal(before, model.backbone.layers[0].blocks[0].op.in_proj.weight)


def test_channels_of_every_arch() -> None:
    """Every arch of every family is in one row of the table, that of its channels."""
    pytest.importorskip("mmengine")
    from mmvmamba.models import FAMILIES

    rows = re.findall(r"^\| ((?:\d+, )+\d+) \| (.*) \|$", (ROOT / "README.md").read_text(), re.M)
    patterns = {
        pattern: tuple(map(int, dims.split(", "))) for dims, row in rows for pattern in re.findall("`(.+?)`", row)
    }
    used = set()
    for name, family in FAMILIES.items():
        for arch in import_module(f"mmvmamba.models.backbones.{name}").ARCHS:
            with torch.device("meta"):
                backbone = family(arch)
            channels = tuple(backbone.stage_channels[i] for i in backbone.out_indices)
            found = [pattern for pattern in patterns if fnmatchcase(f"{family.__name__} {arch}", pattern)]
            assert [patterns[pattern] for pattern in found] == [channels], (name, arch)
            used |= set(found)
    assert used == set(patterns)


@pytest.mark.parametrize("containing", ["from mmvmamba.converters import", "from mmvmamba.ops import"])
def test_python_examples(containing: str, capsys: pytest.CaptureFixture[str]) -> None:
    if "converters" in containing:
        pytest.importorskip("mmpretrain")
    exec(compile(code_block(containing), "README.md", "exec"), {})  # noqa: S102
    if "ops" in containing:
        assert "reference" in capsys.readouterr().out


def test_nothing_is_left_to_fill_in() -> None:
    text = (ROOT / "README.md").read_text()
    assert not re.findall(r"\b[A-Z]+_(?:TEXT|TABLE|NOTE|SETUP)\b", text)
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (ROOT / target).is_file(), target
