"""Combinations of upstream's arguments, against the plain second implementation, in float64."""

import pytest
import torch

from mmvmamba.converters import from_upstream, to_upstream_state_dict

from .plain_vssm import PlainVSSM

SMALL = dict(depths=[1, 1], dims=6, ssm_d_state=2, patchembed_version="v2", downsample_version="v3")
CASES = {
    "v2_defaults": dict(depths=[1, 1], dims=[8, 12]),
    "gated": dict(forward_type="v05"),
    "nozact": dict(forward_type="v05_nozact", ssm_act_layer="gelu"),
    "gate_uses_ssm_act": dict(forward_type="v3", ssm_act_layer="Sigmoid"),
    "oact": dict(forward_type="v05_oact"),
    "noz_oact_no32": dict(forward_type="v04_noz_oact_no32"),
    "full_order": dict(forward_type="v05_onnone_nozact_noz_oact_no32"),
    "onnone": dict(forward_type="v05_onnone_noz"),
    "ondwconv3": dict(forward_type="v05_ondwconv3_noz"),
    "ondwconv3_ln2d": dict(forward_type="v05_ondwconv3", norm_layer="ln2d"),
    "oncnorm": dict(forward_type="v05_oncnorm_noz", norm_layer="LN2D"),
    "onsoftmax": dict(forward_type="v05_onsoftmax_oact"),
    "onsigmoid": dict(forward_type="v02_onsigmoid"),
    "unidirectional": dict(forward_type="v051d_noz"),
    "bidirectional": dict(forward_type="v052d_noz"),
    "rotated": dict(forward_type="v052d3_noz"),
    "cascade": dict(forward_type="v052dc_noz"),
    "cascade_gated_n16": dict(forward_type="v052dc", ssm_d_state=16),
    "history_32dc": dict(forward_type="v32dc_onnone"),
    "vanilla": dict(forward_type="v0", mlp_ratio=0.0, downsample_version="v1", patchembed_version="v1"),
    "vanilla_ignores_options": dict(forward_type="v0seq", ssm_conv=5, ssm_conv_bias=False, ssm_act_layer="relu"),
    "bn": dict(norm_layer="bn", forward_type="v05_noz"),
    "bn_merging": dict(norm_layer="BN", downsample_version="v1", patchembed_version="v1"),
    "gmlp": dict(gmlp=True, mlp_act_layer="silu", mlp_ratio=1.5),
    "no_mlp": dict(mlp_ratio=0.0, forward_type="v05_noz"),
    "no_ssm": dict(ssm_ratio=0.0),
    "negative_ssm_ratio": dict(ssm_ratio=-1, forward_type="v05"),
    "no_conv": dict(ssm_conv=0, forward_type="v05_noz"),
    "conv5": dict(ssm_conv=5, ssm_conv_bias=False),
    "rank": dict(ssm_dt_rank=3, ssm_ratio=1.5),
    "stem_v1_down_v2": dict(patchembed_version="v1", downsample_version="v2"),
    "stem_v1_down_v3_p2": dict(patchembed_version="v1", patch_size=2),
    "stem_v2_p2": dict(patch_size=2, downsample_version="v1"),
    "stem_v2_p8": dict(patch_size=8),
    "no_patch_norm_v1": dict(patch_norm=False, patchembed_version="v1"),
    "no_patch_norm_v2": dict(patch_norm=False, norm_layer="bn"),
    "pos_embed": dict(posembed=True, imgsize=20),
    "gray_three_stages": dict(in_chans=1, depths=[1, 2, 1], dims=[4, 6, 10]),
    "init_v1": dict(ssm_init="v1"),
    "init_v2": dict(ssm_init="v2", use_checkpoint=True),
}


def _randomise(model):
    """Move every entry of the state dict off its initial value, running statistics included."""
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                noise = torch.randn_like(value) * (0.05 if "dt_projs_bias" in name else 0.3)
                value.copy_((value + noise).abs() + 0.5 if name.endswith("running_var") else value + noise)


def _compare(form, kwargs, training, size):
    torch.manual_seed(0)
    model = from_upstream("vmamba", form, kwargs).double().train(training)
    _randomise(model)
    upstream = to_upstream_state_dict("vmamba", form, model.state_dict())
    leaves = {k: v.clone().requires_grad_(v.is_floating_point()) for k, v in upstream.items()}
    image = torch.randn(2, kwargs.get("in_chans", 3), *size, dtype=torch.float64)
    image_plain = image.clone().requires_grad_()
    image.requires_grad_()
    expected = PlainVSSM(form, kwargs, leaves, training)(image_plain)
    outs = model(image)
    outs = [outs] if isinstance(outs, torch.Tensor) else list(outs)
    assert len(outs) == len(expected)
    weights = [torch.randn_like(out) for out in expected]
    sum((out * w).sum() for out, w in zip(outs, weights, strict=True)).backward()
    sum((out * w).sum() for out, w in zip(expected, weights, strict=True)).backward()
    for out, want in zip(outs, expected, strict=True):
        torch.testing.assert_close(out, want, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(image.grad, image_plain.grad, rtol=1e-7, atol=1e-8)
    grads = {k: torch.zeros_like(p) if p.grad is None else p.grad for k, p in model.named_parameters()}
    for name, grad in to_upstream_state_dict("vmamba", form, grads).items():
        want = leaves[name].grad
        torch.testing.assert_close(grad, torch.zeros_like(grad) if want is None else want, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("name", CASES)
def test_backbone_equals_plain(name):
    """Outputs and all gradients of the feature extractor agree with the plain implementation."""
    kwargs = {**SMALL, **CASES[name]}
    kwargs["out_indices"] = tuple(range(len(kwargs["depths"])))
    _compare("backbone", kwargs, training=False, size=(11, 14))


@pytest.mark.parametrize("name", ["bn", "bn_merging", "no_patch_norm_v2", "gmlp"])
def test_backbone_equals_plain_in_training(name):
    """Batch statistics are those of BatchNorm2d on the permuted map."""
    kwargs = {**SMALL, **CASES[name], "out_indices": (1,), "drop_path_rate": 0.0}
    _compare("backbone", kwargs, training=True, size=(11, 14))


@pytest.mark.parametrize("name", ["gated", "bn", "pos_embed", "vanilla", "cascade"])
def test_classifier_equals_plain(name):
    """Logits and all gradients of the classifier agree with the plain implementation."""
    pytest.importorskip("mmpretrain")
    _compare("classifier", {**SMALL, **CASES[name], "num_classes": 5}, training=False, size=(20, 20))


def test_batch_norm_running_statistics_follow_upstream():
    """The running statistics after a training step are those of BatchNorm2d on the channel-first map."""
    kwargs = {**SMALL, "norm_layer": "bn", "out_indices": (0, 1), "drop_path_rate": 0.0}
    model = from_upstream("vmamba", "backbone", kwargs).train()
    image = torch.randn(2, 3, 11, 14)
    state = model.state_dict()
    conv = [state["patch_embed.0.weight"], state["patch_embed.0.bias"]]
    reference = torch.nn.BatchNorm2d(3)
    reference(torch.nn.functional.conv2d(image, *conv, stride=2, padding=1))
    model(image)
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(model.state_dict()[f"patch_embed.2.{name}"], value)
