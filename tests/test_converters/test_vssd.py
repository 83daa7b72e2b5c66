"""Translation of VSSD's arguments and names; that the numbers agree is shown by tests/test_models."""

import pytest
import torch

from mmvmamba.converters import convert_state_dict, from_upstream, to_upstream_state_dict
from mmvmamba.errors import CheckpointMismatch, ConfigError

SMALL = dict(embed_dim=8, depths=[1, 1, 1, 1], num_heads=[2, 4, 8, 16], d_state=4)


def _backbone_state(**kwargs):
    model = from_upstream("vssd", "backbone", {**SMALL, **kwargs})
    return to_upstream_state_dict("vssd", "backbone", model.state_dict())


@pytest.mark.parametrize("form", ["classifier", "backbone"])
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(ssd_positive_dA=True), r"unknown argument 'ssd_positive_dA'.*Did you mean 'ssd_positve_dA'"),
        (dict(linear_attn_duality=False), "linear_attn_duality is False, expected True.*causal scan"),
        (dict(linear_attn_duality=False, bidirection=True), "linear_attn_duality is False"),
        (dict(simple_patch_embed=True), "simple_patch_embed is True, expected False"),
        (dict(simple_downsample=True), "simple_downsample is True, expected False"),
        (dict(attn_types=["mamba2", "mamba2", "mamba2", "linear"]), "attn_types is 'linear', expected one of 'mamba2'"),
        (dict(attn_types=["mamba2"]), "mixers is .*for each of the 4 stages"),
        (dict(num_heads=[2, 4, 8, 12]), "num_heads is 12 in a stage of 64 channels"),
        (dict(ssd_ngroups=3), "2 heads in 3 groups"),
        (dict(function="vssd_large"), "expected one of vssd_micro, vssd_tiny"),
        (dict(out_indices=(9,)), "out_indices"),
    ],
    ids=str,
)
def test_what_is_not_here_raises(form, kwargs, message):
    with pytest.raises(ConfigError, match=message):
        from_upstream("vssd", form, {**SMALL, **kwargs})


def test_arguments_without_effect_upstream():
    """Upstream's configs pass them; with the causal scan refused above they say nothing."""
    plain = from_upstream("vssd", "backbone", SMALL)
    idle = dict(
        img_size=384,
        patch_size=8,
        qkv_bias=False,
        ssd_expand=7,
        ssd_chunk_size=64,
        bidirection=True,
        num_classes=5,
        pretrained=None,
        key="model_ema",
        attn_types=["mamba2"] * 3 + ["standard"] * 2,
    )
    assert from_upstream("vssd", "backbone", {**SMALL, **idle}).arch == plain.arch


def test_options_that_have_an_effect():
    model = from_upstream(
        "vssd",
        "backbone",
        {**SMALL, "in_chans": 1, "use_checkpoint": True, "drop_rate": 0.1, "drop_path_rate": 0.3, "out_indices": [2]},
    )
    assert (model.in_channels, model.with_cp, model.arch.dropout, model.out_indices) == (1, True, 0.1, (2,))
    assert model.layers[3].blocks[0].drop_path.rate == pytest.approx(0.3)
    with torch.device("meta"):
        assert from_upstream("vssd", "backbone", {"function": "vssd_base", "out_indices": (3,)}).out_indices == (3,)


def test_backbone_takes_no_file_and_classifier_needs_classes():
    with pytest.raises(ConfigError, match="pretrained is 'x.pth'"):
        from_upstream("vssd", "backbone", {**SMALL, "pretrained": "x.pth"})
    with pytest.raises(ConfigError, match="num_classes is 0, expected at least 1"):
        from_upstream("vssd", "classifier", {**SMALL, "num_classes": 0})
    with pytest.raises(ConfigError, match="fill_out_norms is"):
        convert_state_dict("vssd", "classifier", {}, fill_out_norms=(0,))


def test_left_over_entries_raise():
    state = _backbone_state()
    with pytest.raises(CheckpointMismatch, match=r"1 of \d+ entries.*layers.0.blocks.0.attn.E"):
        convert_state_dict("vssd", "backbone", {**state, "layers.0.blocks.0.attn.E": torch.zeros(1)})
    with pytest.raises(CheckpointMismatch, match=r"norm\.weight"):
        convert_state_dict("vssd", "backbone", {**state, "norm.weight": torch.zeros(64)})
    with pytest.raises(CheckpointMismatch, match="no entry 'layers"):
        convert_state_dict("vssd", "classifier", {"norm.weight": torch.zeros(64)})


def test_classifier_weights_for_a_backbone():
    pytest.importorskip("mmpretrain")
    classifier = from_upstream("vssd", "classifier", {**SMALL, "num_classes": 3})
    upstream = to_upstream_state_dict("vssd", "classifier", classifier.state_dict())
    assert [name for name in upstream if not name.startswith(("patch_embed.", "layers."))] == [
        "norm.weight", "norm.bias", "head.weight", "head.bias"]  # fmt: skip
    backbone = from_upstream("vssd", "backbone", {**SMALL, "out_indices": (0, 3)})
    backbone.load_state_dict(convert_state_dict("vssd", "backbone", upstream, fill_out_norms=(0, 3)), strict=True)
    assert torch.equal(backbone.outnorm3.weight, torch.ones(64))
    assert torch.equal(backbone.outnorm0.bias, torch.zeros(8))
    with pytest.raises(CheckpointMismatch, match="names stage 4"):
        convert_state_dict("vssd", "backbone", upstream, fill_out_norms=(0, 4))
