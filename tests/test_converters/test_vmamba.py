"""Translation of upstream's arguments and names; that the numbers agree is shown by tests/test_models."""

import pytest
import torch

from mmvmamba.converters import convert_state_dict, from_upstream, to_upstream_state_dict
from mmvmamba.converters.vmamba import parse_forward_type
from mmvmamba.errors import CheckpointMismatch, ConfigError

SMALL = dict(depths=[1, 1], dims=8, ssm_d_state=1)


def _backbone_state(**kwargs):
    model = from_upstream("vmamba", "backbone", {**SMALL, "out_indices": (0, 1), **kwargs})
    return to_upstream_state_dict("vmamba", "backbone", model.state_dict())


@pytest.mark.parametrize("form", ["classifier", "backbone"])
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(ssm_ratioo=1.0), r"unknown argument 'ssm_ratioo'.*Did you mean 'ssm_ratio'"),
        (dict(forward_type="v05_noz_onnone"), "forward_type is 'v05_noz_onnone'.*Reorder"),
        (dict(forward_type="v05_oact_noz"), "Reorder or correct the suffixes"),
        (dict(forward_type="v05_noz_nozact"), "Reorder or correct the suffixes"),
        (dict(forward_type="v05_onnone_onsoftmax"), "forward_type"),
        (dict(forward_type="v0_noz"), "forward_type is 'v0_noz'"),
        (dict(forward_type="m0_noz"), "forward_type is 'm0_noz'"),
        (dict(forward_type="v06"), "Did you mean 'v0"),
        (dict(forward_type=""), "forward_type is ''"),
        (dict(forward_type="v0", norm_layer="ln2d"), "expected 'ln'"),
        (dict(norm_layer="gn"), "norm_layer is 'gn', expected one of 'ln'"),
        (dict(downsample_version="v4"), "downsample_version is 'v4'"),
        (dict(patchembed_version="v3"), "patchembed_version is 'v3'"),
        (dict(patchembed_version="v2", patch_size=3), "expected an even number"),
        (dict(ssm_init="v3"), "ssm_init is 'v3'"),
        (dict(ssm_act_layer="mish"), "ssm_act_layer is 'mish'"),
        (dict(function="vmamba_tiny_s1l9"), "Did you mean 'vmamba_tiny_s1l8'"),
    ],
    ids=str,
)
def test_unknown_arguments_raise(form, kwargs, message):
    with pytest.raises(ConfigError, match=message):
        from_upstream("vmamba", form, {**SMALL, **({"out_indices": (1,)} if form == "backbone" else {}), **kwargs})


def test_unknown_family_and_form_raise():
    with pytest.raises(ConfigError, match=r"family is 'vmambo'.*Did you mean 'vmamba'"):
        from_upstream("vmambo", "backbone", {})
    with pytest.raises(ConfigError, match=r"form is 'backbones'.*Did you mean 'backbone'"):
        convert_state_dict("vmamba", "backbones", {})


def test_backbone_takes_a_head_argument_but_no_file():
    from_upstream("vmamba", "backbone", {**SMALL, "num_classes": 7, "out_indices": (1,), "pretrained": None})
    with pytest.raises(ConfigError, match="pretrained is 'x.pth'"):
        from_upstream("vmamba", "backbone", {**SMALL, "pretrained": "x.pth", "out_indices": (1,)})
    with pytest.raises(ConfigError, match="unknown argument 'out_indices'"):
        from_upstream("vmamba", "classifier", {**SMALL, "out_indices": (1,)})


@pytest.mark.parametrize("no32", ["", "_no32"])
@pytest.mark.parametrize("oact", ["", "_oact"])
@pytest.mark.parametrize("noz", ["", "_noz"])
@pytest.mark.parametrize("nozact", ["", "_nozact"])
@pytest.mark.parametrize("out", ["", "_onnone", "_ondwconv3", "_oncnorm", "_onsoftmax", "_onsigmoid"])
def test_forward_type_grammar(out, nozact, noz, oact, no32):
    options = parse_forward_type("v05" + out + nozact + noz + oact + no32)
    assert options["gated"] is (noz == "")
    assert options["gate_act"] is (nozact == "")
    assert options["out_act"] is (oact != "")
    assert (options["out_norm"] == "layer_norm") is (out == "")


def test_function_can_be_modified():
    with torch.device("meta"):
        model = from_upstream("vmamba", "backbone", {"function": "vmamba_tiny_s1l8", "out_indices": (3,)})
    assert model.out_indices == (3,)


def test_left_over_entries_raise():
    state = _backbone_state()
    with pytest.raises(CheckpointMismatch, match=r"1 of \d+ entries.*layers.0.blocks.0.op.Es"):
        convert_state_dict("vmamba", "backbone", {**state, "layers.0.blocks.0.op.Es": torch.zeros(1)})
    with pytest.raises(CheckpointMismatch, match=r"classifier\.norm\.weight"):
        convert_state_dict("vmamba", "backbone", {**state, "classifier.norm.weight": torch.zeros(1)})
    with pytest.raises(CheckpointMismatch, match="'model'.*no tensors"):
        convert_state_dict("vmamba", "backbone", {"model": state})
    with pytest.raises(CheckpointMismatch, match="strip the prefix"):
        convert_state_dict("vmamba", "backbone", {f"backbone.{key}": value for key, value in state.items()})


def test_old_names_become_the_new_ones():
    kwargs = dict(forward_type="v0", mlp_ratio=0.0, downsample_version="v1", patchembed_version="v1")
    new = _backbone_state(**kwargs)
    old = {
        key.replace("patch_embed.0", "patch_embed.proj")
        .replace("patch_embed.2", "patch_embed.norm")
        .replace(".op.", ".self_attention.")
        .replace(".norm.", ".ln_1." if "blocks" in key and ".op." not in key else ".norm."): value
        for key, value in new.items()
    }
    assert set(old) != set(new)
    converted = convert_state_dict("vmamba", "backbone", old)
    assert set(converted) == set(new)
    assert all(torch.equal(converted[key], new[key]) for key in new)
    with pytest.raises(CheckpointMismatch, match="mixes old and new names"):
        convert_state_dict("vmamba", "backbone", {**old, **new})


def test_old_classifier_names():
    pytest.importorskip("mmpretrain")
    model = from_upstream("vmamba", "classifier", {**SMALL, "num_classes": 3})
    new = to_upstream_state_dict("vmamba", "classifier", model.state_dict())
    old = {key.removeprefix("classifier."): value for key, value in new.items()}
    model.load_state_dict(convert_state_dict("vmamba", "classifier", old), strict=True)


@pytest.mark.parametrize("norm", ["ln2d", "bn"])
def test_classifier_weights_for_a_backbone(norm):
    pytest.importorskip("mmpretrain")
    kwargs = {**SMALL, "norm_layer": norm}
    classifier = from_upstream("vmamba", "classifier", kwargs)
    upstream = to_upstream_state_dict("vmamba", "classifier", classifier.state_dict())
    backbone = from_upstream("vmamba", "backbone", {**kwargs, "out_indices": (0, 1)})
    converted = convert_state_dict("vmamba", "backbone", upstream, fill_out_norms=(0, 1))
    backbone.load_state_dict(converted, strict=True)
    assert torch.equal(backbone.outnorm1.weight, torch.ones(16))
    assert torch.equal(backbone.outnorm0.bias, torch.zeros(8))
    with pytest.raises(CheckpointMismatch, match="names stage 2"):
        convert_state_dict("vmamba", "backbone", upstream, fill_out_norms=(0, 1, 2))


def test_pointwise_convolution_weights_load():
    model = from_upstream("vmamba", "backbone", {**SMALL, "out_indices": (1,)})
    state = to_upstream_state_dict("vmamba", "backbone", model.state_dict())
    as_convolutions = {
        key: value[:, :, None, None] if key.endswith(("proj.weight", "fc1.weight", "fc2.weight")) else value
        for key, value in state.items()
    }
    model.load_state_dict(convert_state_dict("vmamba", "backbone", as_convolutions), strict=True)


def test_position_embedding_of_another_size_loads():
    state = _backbone_state(posembed=True, imgsize=32)
    model = from_upstream("vmamba", "backbone", {**SMALL, "out_indices": (0, 1), "posembed": True, "imgsize": 48})
    model.load_state_dict(convert_state_dict("vmamba", "backbone", state), strict=True)
    assert model.pos_embed.shape[2:] == (12, 12)


def test_classifier_is_built_under_any_default_scope():
    """MMPretrain's parts are found although the process works in mmdet's scope, and without any scope."""
    pytest.importorskip("mmdet")
    pytest.importorskip("mmpretrain")
    from mmengine.registry import DefaultScope

    for scope in ("mmdet", "mmseg", None):
        with DefaultScope.overwrite_default_scope(scope):
            model = from_upstream("vmamba", "classifier", dict(depths=[1, 1], dims=8, num_classes=3))
            assert type(model.head.loss_module).__module__.startswith("mmpretrain.")
            assert type(model.data_preprocessor).__module__.startswith("mmpretrain.")
