"""The ViT-adapter: any size of image, training, weights; what it computes is in the parity cases of two families."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.model import convert_sync_batchnorm
from torch import Tensor
from torch.nn import functional as F

from mmvmamba.checkpoints.official import adapt, recognise
from mmvmamba.converters import convert_state_dict, from_upstream
from mmvmamba.engine.optimizers import SSMOptimWrapperConstructor
from mmvmamba.errors import CheckpointMismatch, ConfigError, OpInputError
from mmvmamba.models import PlainMamba, Vim, ViTAdapter
from mmvmamba.models.adapters.parts import SpatialPrior
from mmvmamba.models.layers.deformable_attention import DeformableAttention, cell_centres
from mmvmamba.registry import MODELS

pytest.importorskip("mmcv", reason="the attention is mmcv's")
ROOT = Path(__file__).parents[2]
PARITY = ROOT / "tests" / "data" / "parity" / "plainmamba"
TRUNK = dict(type="mmvmamba.PlainMamba", arch="nano", final_norm=False, out_norms=False)
SMALL = dict(spatial_channels=8, num_heads=4)


def _adapter(trunk=None, **options):
    return ViTAdapter(dict(TRUNK, **(trunk or {})), **{**SMALL, **options})


def _spread(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            noise = torch.randn(value.shape, generator=generator)
            value.add_(noise.abs() if "running_var" in name else 0.1 * noise)


# ---------------------------------------------------------------- sizes


@pytest.mark.parametrize("size", [(1, 1), (33, 64), (64, 33), (40, 100), (96, 32)], ids=str)
def test_shapes_and_backward_at_any_size(size):
    model = _adapter().train()
    outs = model(torch.randn(2, 3, *size))
    assert [out.shape[1:] for out in outs] == [
        (channels, -(-size[0] // stride), -(-size[1] // stride))
        for channels, stride in zip(model.stage_channels, model.stage_strides, strict=True)
    ]
    assert all(out.is_contiguous() for out in outs)
    sum(out.pow(2).mean() for out in outs).backward()
    wanting = {name for name, p in model.named_parameters() if p.requires_grad}
    assert wanting == {name for name, p in model.named_parameters() if p.grad is not None}
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_an_empty_batch_has_empty_maps():
    outs = _adapter()(torch.randn(0, 3, 40, 64))
    assert [tuple(out.shape) for out in outs] == [(0, 32, 10, 16), (0, 32, 5, 8), (0, 32, 3, 4), (0, 32, 2, 2)]
    sum(out.sum() for out in outs).backward()


@pytest.mark.parametrize("build", [PlainMamba, Vim], ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("size", [(40, 100), (33, 70), (64, 96)], ids=str)
def test_any_size_is_the_padded_image_cropped(build, size):
    """What upstream computes of an image that a detector's preprocessor has padded to multiples of 32."""
    options = {"cls_token": "none"} if build is Vim else {}
    model = ViTAdapter(build("nano", **options), **SMALL).double().eval()
    _spread(model)
    image = torch.randn(2, 3, *size, dtype=torch.float64)
    padded = F.pad(image, (0, -size[1] % 32, 0, -size[0] % 32))
    with torch.no_grad():
        for out, whole in zip(model(image), model(padded), strict=True):
            assert torch.equal(out, whole[:, :, : out.shape[2], : out.shape[3]])


def test_the_convolutions_of_an_oblong_image_are_a_part_of_those_of_a_padded_square():
    """Up to where they see the edge: behind it a norm makes something of the padding."""
    prior = SpatialPrior(3, 4, 6).double().eval()
    _spread(prior)
    image = torch.randn(1, 3, 64, 160, dtype=torch.float64)
    square = F.pad(image, (0, 0, 0, 96))
    for i, (own, padded) in enumerate(zip(prior(image), prior(square), strict=True)):
        # A cell of stride 4 sees 10 pixels beyond its own, one of stride s another s / 2 for every halving.
        rows = (64 - 10) // (4 * 2**i) - 1
        if rows > 0:
            torch.testing.assert_close(own[:, :rows], padded[:, :rows], rtol=1e-12, atol=1e-12)
        assert own.shape[1] == 16 // 2**i and padded.shape[1] == 40 // 2**i


def _sample(value: Tensor, x: float, y: float) -> Tensor:
    """Return the bilinear sample (p,) of a map (h, w, p) at a place in cells, zeros outside."""
    out = value.new_zeros(value.shape[-1])
    column, row = int(np.floor(x - 0.5)), int(np.floor(y - 0.5))
    for i in (row, row + 1):
        for j in (column, column + 1):
            if 0 <= i < value.shape[0] and 0 <= j < value.shape[1]:
                out = out + value[i, j] * (1 - abs(y - 0.5 - i)) * (1 - abs(x - 0.5 - j))
    return out


@pytest.mark.parametrize("ratio", [1.0, 0.5])
def test_deformable_attention_restated(ratio):
    """Point by point in float64 on maps that are not square."""
    grids, heads, points = [(2, 6), (3, 2)], 2, 3
    attention = DeformableAttention(8, heads, len(grids), points, ratio).double()
    _spread(attention)
    queries, places = torch.randn(1, 6, 8, dtype=torch.float64), cell_centres([(2, 3)])
    values = torch.randn(1, 18, 8, dtype=torch.float64)
    inner = int(8 * ratio)
    offsets = attention.sampling_offsets(queries)[0].view(6, heads, len(grids), points, 2)
    weights = attention.attention_weights(queries)[0].view(6, heads, -1).softmax(-1).view(6, heads, len(grids), points)
    maps = attention.value_proj(values)[0].split([12, 6])
    out = torch.zeros(6, heads, inner // heads, dtype=torch.float64)
    for query in range(6):
        for head in range(heads):
            for level, (rows, columns) in enumerate(grids):
                value = maps[level].view(rows, columns, heads, -1)[:, :, head]
                for point in range(points):
                    dx, dy = offsets[query, head, level, point].tolist()
                    x, y = (float(c) for c in places[query])
                    sample = _sample(value, x * columns + dx, y * rows + dy)
                    out[query, head] = out[query, head] + weights[query, head, level, point] * sample
    want = attention.output_proj(out.flatten(1))[None]
    torch.testing.assert_close(attention(queries, places, values, grids), want, rtol=1e-6, atol=1e-6)


def test_places_are_the_centres_of_cells():
    want = [[1 / 6, 1 / 4], [1 / 2, 1 / 4], [5 / 6, 1 / 4], [1 / 6, 3 / 4], [1 / 2, 3 / 4], [5 / 6, 3 / 4]]
    torch.testing.assert_close(cell_centres([(2, 3)]), torch.tensor(want))


# ---------------------------------------------------------------- options


def test_one_map_per_entry_of_out_indices():
    whole = _adapter().eval()
    image = torch.randn(1, 3, 64, 96)
    for out_indices in ((1, 2, 3), (0,), (2,)):
        part = _adapter(out_indices=out_indices).train()
        part.load_state_dict(whole.state_dict())
        sum(out.sum() for out in part(image)).backward()
        wanting = {name for name, p in part.named_parameters() if p.requires_grad}
        assert wanting == {name for name, p in part.named_parameters() if p.grad is not None}
        part.eval().load_state_dict(whole.state_dict())
        for i, out in zip(out_indices, part(image), strict=True):
            assert torch.equal(out, whole(image)[i])


def test_features_of_each_interaction():
    """The two published forms share all parameters, and differ."""
    last, each = _adapter().eval(), _adapter(trunk_features="each").eval()
    each.load_state_dict(last.state_dict())
    image = torch.randn(1, 3, 64, 64)
    for i, (a, b) in enumerate(zip(last(image), each(image), strict=True)):
        assert torch.allclose(a, b) is (i == 3)


def test_a_fresh_injector_leaves_the_trunk_alone():
    model = _adapter().eval()
    alone = PlainMamba("nano", out_indices=(3,), final_norm=False).eval()
    alone.load_state_dict(model.backbone.state_dict())
    seen: list[Tensor] = []
    model.interactions[3].extractor.register_forward_pre_hook(lambda _, args: seen.append(args[2]))
    image = torch.randn(1, 3, 64, 96)
    model(image)
    torch.testing.assert_close(seen[0].transpose(1, 2).unflatten(2, (4, 6)), alone(image)[0])


def test_bad_arguments():
    for options, words in (
        (dict(interaction_indexes=[[0, 1], [1, 3]]), "expected pairs .* in rising order, of layers 0 to 3"),
        (dict(interaction_indexes=[[0, 4]]), "of layers 0 to 3"),
        (dict(interaction_indexes=[[0, 3]], trunk_features="each"), "has 1 parts, expected 4"),
        (dict(trunk_features="all"), "trunk_features is 'all'"),
        (dict(norm="layer_norm"), "norm is 'layer_norm'"),
        (dict(num_heads=5), "num_heads is 5"),
        (dict(ffn_ratio=0.0), "hidden is 0"),
        (dict(out_indices=(4,)), "expected distinct stages from 0 to 3"),
        (dict(num_head=4), r"ViTAdapter: unknown argument 'num_head'.*Did you mean 'num_heads'\?"),
        (dict(trunk=dict(out_indices=(1,))), "behind which layers are not trained"),
        (dict(trunk=dict(arch=dict(dim=8, depth=3))), "interaction_indexes is None for a trunk of 3 layers"),
    ):
        with pytest.raises(ConfigError, match=words):
            _adapter(**options)
    with pytest.raises(ConfigError, match="backbone is a VMamba, expected a columnar backbone"):
        ViTAdapter(dict(type="mmvmamba.VMamba", arch="nano"))
    with pytest.raises(ConfigError, match="has 1 class tokens, expected none"):
        ViTAdapter(dict(type="mmvmamba.Vim", arch="nano"))
    with pytest.raises(OpInputError, match="expected height and width of at least 1"):
        _adapter()(torch.zeros(1, 3, 0, 32))


# ---------------------------------------------------------------- training


def test_freezing_the_trunk():
    model = _adapter(dict(frozen_stages=2, norm_eval=True)).train()
    assert not model.backbone.patch_embed.training and not model.backbone.layers[1].training
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen and all(name.startswith(("backbone.patch", "backbone.pos", "backbone.layers.0", "backbone.layers.1"))
                          for name in frozen)  # fmt: skip
    sum(out.pow(2).mean() for out in model(torch.randn(2, 3, 64, 64))).backward()


def test_norm_eval_and_foreign_norms():
    model = _adapter(norm_eval=True).train()
    assert not model.norm1.training and not model.spm.stem[1].training and model.backbone.patch_embed.stem[1].training
    with pytest.raises(ConfigError, match="became SyncBatchNorm"):
        convert_sync_batchnorm(_adapter(norm="batch_norm")).train()


def test_synchronised_norms_of_two_processes(tmp_path):
    """Of one and of three images: output, gradients and running statistics are those of one norm of all four."""
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    script = Path(__file__).parent / "synchronised_norm.py"
    command = [sys.executable, "-W", "ignore", "-m", "mmvmamba.loopback", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(script), str(tmp_path)], cwd=tmp_path, capture_output=True, text=True, timeout=180, check=False,
        env={**environment, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.glob("same*")} == {"same0", "same1"}


def test_no_weight_decay_and_learning_rates_of_layers():
    model = MODELS.build(dict(type="mmvmamba.ViTAdapter", backbone=TRUNK, **SMALL))
    spared = model.no_weight_decay()
    names = dict(model.named_parameters())
    assert spared <= set(names)
    wanted = {"level_embed", "interactions.0.injector.gamma", "norm4.bias", "spm.stem.1.weight", "backbone.pos_embed"}
    assert wanted | {"backbone.layers.0.mamba.A_log", "backbone.layers.3.mamba.direction_Bs"} <= spared
    assert {"up.weight", "spm.stem.0.weight", "interactions.0.injector.attn.value_proj.weight"}.isdisjoint(spared)
    assert model.get_layer_depth("backbone.backbone.pos_embed", "backbone.") == (0, 6)
    assert model.get_layer_depth("backbone.backbone.layers.2.norm.weight", "backbone.") == (3, 6)
    assert model.get_layer_depth("backbone.spm.fc1.weight", "backbone.") == (5, 6)
    build = SSMOptimWrapperConstructor(
        dict(type="OptimWrapper", optimizer=dict(type="AdamW", lr=1.0, weight_decay=0.1)), dict(layer_decay_rate=0.5)
    )
    groups = build(torch.nn.ModuleDict({"backbone": model})).optimizer.param_groups
    rate = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert rate[id(names["backbone.layers.2.mamba.in_proj.weight"])] == (0.25, 0.1)
    assert rate[id(names["backbone.layers.2.norm.weight"])] == (0.25, 0.0)
    assert rate[id(names["level_embed"])] == (1.0, 0.0)


def test_recomputation_changes_nothing():
    grads = []
    for with_cp in (False, True):
        torch.manual_seed(0)
        model = _adapter(dict(with_cp=with_cp)).train()
        torch.manual_seed(1)
        sum(out.pow(2).mean() for out in model(torch.randn(2, 3, 64, 32))).backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_half_precision_is_close():
    model, image = _adapter().eval(), torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected = model(image)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model(image)
        narrow = copy.deepcopy(model).bfloat16()(image.bfloat16())
    for a, b, want in zip(mixed, narrow, expected, strict=True):
        assert b.dtype == torch.bfloat16
        assert float((a.float() - want).abs().max() / want.abs().max()) < 0.05
        assert float((b.float() - want).abs().max() / want.abs().max()) < 0.08


def test_compiles_and_exports():
    torch._dynamo.reset()
    trunk = dict(arch=dict(dim=8, depth=1, num_convs=0, d_state=2))
    model = _adapter(trunk, interaction_indexes=[[0, 0]], extra_extractors=0).eval()
    image = torch.randn(2, 3, 33, 41)
    with torch.no_grad():
        want = model(image)
        for other in (
            torch.compile(model, fullgraph=True, backend="aot_eager"),
            torch.export.export(model, (image,)).module(),
        ):
            for out, expected in zip(other(image), want, strict=True):
                torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- weights


def test_a_classifier_starts_the_trunk(tmp_path):
    source = PlainMamba("nano", out_indices=(3,))
    state = {f"backbone.{name}": value for name, value in source.state_dict().items()}
    torch.save({"state_dict": {**state, "head.fc.weight": torch.zeros(10, 32)}}, tmp_path / "cls.pth")
    init = dict(type="Pretrained", checkpoint=str(tmp_path / "cls.pth"))
    model = _adapter(dict(init_cfg=init))
    before = model.spm.fc1.weight.clone()
    model.init_weights()
    own = model.backbone.state_dict()
    assert own and all(torch.equal(value, source.state_dict()[name]) for name, value in own.items())
    assert torch.equal(before, model.spm.fc1.weight)


def _official_detector() -> tuple[dict[str, Tensor], dict]:
    """Return what a detector of upstream with the adapter of the parity case would have, and that case."""
    meta = json.loads((PARITY / "adapter_l1.json").read_text())
    with np.load(PARITY / "adapter_l1.npz") as data:
        state = {f"backbone.{name[3:]}": torch.from_numpy(data[name]) for name in data.files if name.startswith("sd:")}
    state = {name: value.float() if value.is_floating_point() else value for name, value in state.items()}
    return {**state, "roi_head.bbox_head.fc_cls.weight": torch.zeros(81, 8)}, meta


def test_an_official_detector_loads(tmp_path):
    state, meta = _official_detector()
    found = recognise(state)
    assert (found.family, found.form, found.prefix, found.adapter) == ("plainmamba", "detector", "backbone.", True)
    ours = adapt(dict(state))
    again = recognise(ours)
    assert (again.prefix, again.adapter, again.upstream, found.upstream) == ("backbone.", True, False, True)
    assert "backbone.backbone.layers.0.norm.weight" in ours and "backbone.norm1.weight" in ours
    want = convert_state_dict(
        "plainmamba", "adapter", {n.removeprefix("backbone."): v for n, v in state.items() if n.startswith("backbone.")}
    )
    torch.save({"state_dict": state, "meta": {}}, tmp_path / "detector.pth")
    model = from_upstream("plainmamba", "adapter", meta["kwargs"])
    model.init_cfg = dict(type="Pretrained", checkpoint=str(tmp_path / "detector.pth"), prefix="backbone.")
    model.init_weights()
    assert all(torch.equal(value, want[name]) for name, value in model.state_dict().items())
    torch.save({"state_dict": {n: v for n, v in state.items() if "injector" not in n}}, tmp_path / "part.pth")
    model._is_init = False
    model.init_cfg = dict(model.init_cfg, checkpoint=str(tmp_path / "part.pth"))
    with pytest.raises(CheckpointMismatch, match=r"entries missing \['interactions.0.injector"):
        model.init_weights()


def test_files_of_detectors_there_and_back(tmp_path):
    from mmvmamba.converters.files import convert_file, restore_file

    state, _ = _official_detector()
    torch.save({"state_dict": state, "meta": {}}, tmp_path / "detector.pth")
    done = convert_file(tmp_path / "detector.pth", tmp_path / "ours.pth")
    ours = torch.load(tmp_path / "ours.pth", weights_only=True)["state_dict"]
    assert done.tensors == len(state) and "backbone.spm.fc1.weight" in ours
    # Without the note of its origin, as a detector that was trained here is.
    torch.save({"state_dict": ours, "meta": {}}, tmp_path / "trained.pth")
    for name in ("ours.pth", "trained.pth"):
        restore_file(tmp_path / name, tmp_path / f"back_{name}")
        back = torch.load(tmp_path / f"back_{name}", weights_only=True)["state_dict"]
        assert set(back) == set(state) and all(torch.equal(back[key], value) for key, value in state.items())
