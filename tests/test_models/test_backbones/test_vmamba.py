"""What is special to VMamba."""

import pytest
import torch

from mmvmamba.errors import CheckpointMismatch, ConfigError
from mmvmamba.models import VMamba
from mmvmamba.models.backbones.vmamba import ARCHS, SCANS, VMambaArch
from mmvmamba.models.layers.ss2d import OUT_NORMS
from mmvmamba.testing import relative_error

#: Parameters with out norms, counted from the official key lists (test_parity.py) less the classification head.
VARIANTS = [name for name in ARCHS if name != "nano"]


@pytest.mark.parametrize("name", VARIANTS)
def test_variant_agrees_with_the_official_one(name):
    """The arch called ``name`` is the released variant of that name."""
    from mmvmamba.converters import from_upstream

    prefix, _, rest = name.partition("-")
    function = f"vanilla_vmamba_{rest}" if prefix == "vanilla" else f"vmamba_{prefix}_{rest}"
    with torch.device("meta"):
        ours, theirs = VMamba(name), from_upstream("vmamba", "backbone", {"function": function})
    assert ours.arch == theirs.arch


def test_drop_path_rises_linearly():
    model = VMamba("nano", drop_path_rate=0.4)
    rates = [block.drop_path.rate for layer in model.layers for block in layer.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


def test_nano_is_small():
    assert sum(p.numel() for p in VMamba("nano").parameters()) < 2_000_000


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (5, 9), (17, 33)], ids=str)
def test_rounding_down_stems_work_at_every_size(size):
    """Where upstream's unpadded convolutions would find no pixel, zeros are added; elsewhere they round down."""
    model = VMamba(dict(dims=[8, 16, 24], depths=[1, 1, 1], patch_embed="patchify", downsample="conv2x2"),
                   out_indices=(0, 1, 2))  # fmt: skip
    expected = [max(1, n // 4) for n in size]
    for out in model(torch.randn(1, 3, *size)):
        assert list(out.shape[2:]) == expected
        expected = [max(1, n // 2) for n in expected]


@pytest.mark.parametrize("downsample", ["patch_merging", "conv2x2", "conv3x3"])
@pytest.mark.parametrize(
    ("stem", "patch_size"),
    [("patchify", size) for size in (1, 2, 3, 4, 5, 8, 16)] + [("overlapping", size) for size in (2, 4, 6, 8, 16)],
)
def test_the_smallest_images_work_with_every_stem(stem, patch_size, downsample):
    arch = dict(dims=[8, 8], depths=[1, 1], mlp_ratio=0.0, patch_embed=stem, downsample=downsample)
    model = VMamba(arch, out_indices=(0, 1), patch_size=patch_size).eval()
    for size in ((1, 1), (1, 2), (3, 1), (2, 2), (3, 3), (2, 40)):
        with torch.no_grad():
            for out in model(torch.randn(1, 3, *size)):
                assert out.isfinite().all()
                assert min(out.shape[2:]) >= 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "options",
    [*(dict(out_norm=name) for name in OUT_NORMS), *(dict(scan=name) for name in SCANS), dict(norm="batch_norm"),
     dict(gated=True, conv_bias=True, d_state=4, patch_embed="patchify", downsample="patch_merging"),
     dict(out_act=True), dict(gated_mlp=True)],
    ids=lambda options: "-".join(map(str, options.values())),
)  # fmt: skip
def test_half_models_keep_their_dtype_and_are_close(options, dtype):
    torch.manual_seed(0)
    model = VMamba(dict(dims=[16, 32], depths=[1, 1], **options), out_indices=(0, 1)).eval()
    image = torch.randn(1, 3, 24, 32)
    with torch.no_grad():
        expected = model(image)
        narrow = model.to(dtype)(image.to(dtype))
    for out, want in zip(narrow, expected, strict=True):
        assert out.dtype == dtype
        assert relative_error(out.float(), want) < (0.08 if dtype == torch.bfloat16 else 0.02)


def test_position_embedding_is_added_and_resized():
    model = VMamba("nano", pos_embed_size=(8, 8)).eval()
    bare = VMamba("nano").eval()
    bare.load_state_dict({k: v for k, v in model.state_dict().items() if k != "pos_embed"})
    for size in ((32, 32), (40, 24)):
        image = torch.randn(1, 3, *size)
        assert not torch.equal(model(image)[0], bare(image)[0])
    other = VMamba("nano", pos_embed_size=(4, 6))
    other.load_state_dict(model.state_dict(), strict=True)
    expected = torch.nn.functional.interpolate(model.pos_embed, (4, 6), mode="bicubic", align_corners=False)
    torch.testing.assert_close(other.pos_embed.data, expected.data)


def test_post_norm_norms_the_branch():
    torch.manual_seed(0)
    arch = dict(dims=[8], depths=[1], patch_embed="patchify", post_norm=True, mlp_ratio=0.0)
    model = VMamba(arch, out_indices=(0,)).eval()
    block = model.layers[0].blocks[0]
    x = torch.randn(1, 3, 4, 8)
    torch.testing.assert_close(block(x), x + block.norm(block.op(x)))


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        (dict(dims=[8, 16], depths=[1]), "expected equal lengths"),
        (dict(dims=[8]), "depths missing"),
        (dict(dims=[8], depths=[0]), "expected positive integers"),
        (dict(dims=[8], depths=[1], scan="crosss"), "Did you mean 'cross'"),
        (dict(dims=[8], depths=[1], out_norm="layernorm"), "Did you mean 'layer_norm'"),
        (dict(dims=[8], depths=[1], norm="ln"), "expected one of 'layer_norm', 'batch_norm'"),
        (dict(dims=[8], depths=[1], conv_kernel=4), "expected an odd number"),
        (dict(dims=[8], depths=[1], d_state=0), "d_state is 0"),
        (dict(dims=[8, 16], depths=[1, 1], downsample="none"), "expected equal channels"),
        (dict(dims=[8], depths=[1], ssm_act="mish"), "activation is 'mish'"),
        (dict(dims=[8], depths=[1], drop_path_rate=1.0), "drop path rate is 1.0"),
    ],
    ids=str,
)
def test_impossible_archs(arch, message):
    with pytest.raises(ConfigError, match=message):
        VMamba(arch, out_indices=(0,))


def test_equal_stages_without_downsampling():
    model = VMamba(dict(dims=[8, 8], depths=[1, 1], downsample="none"), out_indices=(0, 1))
    a, b = model(torch.randn(1, 3, 16, 16))
    assert a.shape == b.shape


def test_arch_object_is_accepted():
    arch = VMambaArch(dims=(8,), depths=(1,))
    assert VMamba(arch, out_indices=(0,)).arch is arch


@pytest.mark.parametrize("old", [False, True], ids=["present names", "old names"])
def test_official_classifiers_load_by_init_cfg(old, tmp_path):
    """Their head is dropped, their linear maps may be 1x1 convolutions, their out norms start afresh."""
    arch = dict(dims=[8, 16], depths=[1, 1], patch_embed="patchify", downsample="patch_merging")
    source = VMamba(arch, out_indices=(0, 1))
    state = {key: value for key, value in source.state_dict().items() if not key.startswith("outnorm")}
    official = {
        key: value[:, :, None, None] if key.endswith(("proj.weight", "fc1.weight", "fc2.weight")) else value
        for key, value in state.items()
    }
    head = {"norm.weight": torch.ones(16), "norm.bias": torch.zeros(16), "head.weight": torch.ones(5, 16)}
    if old:
        for new_name, old_name in (("patch_embed.0", "patch_embed.proj"), ("patch_embed.2", "patch_embed.norm"),
                                   (".op.", ".self_attention."), ("blocks.0.norm.", "blocks.0.ln_1.")):  # fmt: skip
            official = {key.replace(new_name, old_name): value for key, value in official.items()}
        assert not set(official) <= set(state)
    else:
        head = {f"classifier.{key}": value for key, value in head.items()}
    torch.save({"model": {**official, **head}}, tmp_path / "official.pth")
    init = dict(type="Pretrained", checkpoint=str(tmp_path / "official.pth"))
    model = VMamba(arch, out_indices=(0, 1), init_cfg=init)
    model.init_weights()
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    assert torch.equal(model.outnorm1.weight, torch.ones(16))
    if old:
        torch.save({**official, **state}, tmp_path / "official.pth")
        with pytest.raises(CheckpointMismatch, match="mixes old and new names"):
            model.read_pretrained(init["checkpoint"])
