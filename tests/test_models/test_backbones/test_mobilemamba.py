"""What is special to MobileMamba: its numbers restated in float64, its options, its head, names and layouts."""

from __future__ import annotations

import math
import re

import pytest
import torch
from mmengine.registry import DefaultScope
from torch.nn import functional as F

from mmvmamba.checkpoints.official import recognise
from mmvmamba.converters import convert_state_dict, from_upstream, to_upstream_state_dict
from mmvmamba.errors import CheckpointMismatch, ConfigError
from mmvmamba.models import MobileMamba, build_mobilemamba_cls_head, fold_batch_norms
from mmvmamba.models.backbones.mobilemamba import ARCHS, MobileMambaArch, split_channels
from mmvmamba.models.layers.wavelet import analyse, by_band, by_pixel, haar_filters, synthesise
from mmvmamba.registry import MODELS
from mmvmamba.testing import relative_error

VARIANTS = [name for name in ARCHS if name != "nano"]


class Restated:
    """The fact sheet's words over upstream's state dict, in float64, channels first."""

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        self.state = {name: value.double() for name, value in state.items()}

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        weight, bias, mean, var = (self.state[f"{name}.{f}"] for f in ("weight", "bias", "running_mean", "running_var"))
        tail = (1,) * (x.ndim - 2)
        return (x - mean.view(-1, *tail)) / (var + 1e-5).sqrt().view(-1, *tail) * weight.view(-1, *tail) + bias.view(
            -1, *tail
        )

    def conv(self, name: str, x: torch.Tensor, stride: int = 1) -> torch.Tensor:
        """A convolution with its norm, its padding half the kernel, depthwise if the weight is."""
        weight = self.state[f"{name}.c.weight"]
        groups = x.shape[1] // weight.shape[1]
        return self.norm(f"{name}.bn", F.conv2d(x, weight, None, stride, weight.shape[-1] // 2, groups=groups))

    def dw(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(f"{name}.m", x)

    def ffn(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(f"{name}.m.pw2", self.conv(f"{name}.m.pw1", x).clamp(min=0))

    def scan(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Row by row, token by token, and the same over the reversed tokens."""
        s = {key.removeprefix(f"{name}."): value for key, value in self.state.items() if key.startswith(f"{name}.")}
        x, z = self.conv(f"{name}.in_proj", x).chunk(2, dim=1)
        b, d, h, w = x.shape
        x = F.conv2d(x, s["conv2d.weight"], s["conv2d.bias"], padding=1, groups=d)
        u = (x * x.sigmoid()).flatten(2)
        merged = torch.zeros_like(u)
        rank = s["dt_projs_weight"].shape[2]
        for k, tokens in enumerate((u, u.flip(2))):
            dt, b_in, c_out = torch.einsum("cd,bdl->bcl", s["x_proj_weight"][k], tokens).split([rank, 1, 1], dim=1)
            delta = torch.einsum("dr,brl->bdl", s["dt_projs_weight"][k], dt) + s["dt_projs_bias"][k][:, None]
            delta = torch.log1p(torch.exp(delta))
            decay, skip = -torch.exp(s["A_logs"][k * d : (k + 1) * d, 0]), s["Ds"][k * d : (k + 1) * d]
            state, outs = u.new_zeros(b, d), []
            for t in range(h * w):
                state = torch.exp(delta[..., t] * decay) * state + delta[..., t] * b_in[..., t] * tokens[..., t]
                outs.append(c_out[..., t] * state + skip * tokens[..., t])
            y = torch.stack(outs, dim=2)
            merged = merged + (y.flip(2) if k else y)
        y = merged.transpose(1, 2)
        centred = y - y.mean(-1, keepdim=True)
        y = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        y = (y * s["out_norm.weight"] + s["out_norm.bias"]).transpose(1, 2).view(b, d, h, w)
        return self.conv(f"{name}.out_proj", y * (z * z.sigmoid()))

    def global_op(self, name: str, x: torch.Tensor) -> torch.Tensor:
        s, (_, g, h, w) = self.state, x.shape
        kernel = s[f"{name}.wavelet_convs.0.weight"]
        padded = F.pad(x, (0, w % 2, 0, h % 2))
        bands = F.conv2d(padded, s[f"{name}.wt_filter"], stride=2, groups=g)
        bands = F.conv2d(bands, kernel, padding=kernel.shape[-1] // 2, groups=4 * g)
        bands = bands * s[f"{name}.wavelet_scale.0.weight"]
        details = F.conv_transpose2d(bands, s[f"{name}.iwt_filter"], stride=2, groups=g)[:, :, :h, :w]
        return s[f"{name}.base_scale.weight"] * self.scan(f"{name}.global_atten", x) + details

    def local_op(self, name: str, x: torch.Tensor) -> torch.Tensor:
        kernel = self.state[f"{name}.dwconv3x3.weight"]
        x = F.conv2d(x, kernel, padding=kernel.shape[-1] // 2, groups=x.shape[1])
        x = self.norm(f"{name}.bn1", x).clamp(min=0)
        return self.norm(f"{name}.bn2", x * self.state[f"{name}.dwconv1x1.weight"].view(-1, 1, 1))

    def block(self, name: str, x: torch.Tensor) -> torch.Tensor:
        attn = f"{name}.mixer.m.attn"
        y = self.ffn(f"{name}.ffn0", self.dw(f"{name}.dw0", x))
        scanned = self.state.get(f"{attn}.global_op.wt_filter")
        g = 0 if scanned is None else scanned.shape[0] // 4
        local = self.state.get(f"{attn}.local_op.dwconv3x3.weight")
        n = 0 if local is None else local.shape[0]
        parts = [self.global_op(f"{attn}.global_op", y[:, :g])] if g else []
        parts += [self.local_op(f"{attn}.local_op", y[:, g : g + n])] if n else []
        mixed = torch.cat([*parts, y[:, g + n :]], dim=1).clamp(min=0)
        y = y + self.conv(f"{attn}.proj.1", mixed)
        return x + self.ffn(f"{name}.ffn1", self.dw(f"{name}.dw1", y))

    def merge(self, name: str, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(f"{name}.conv2", self.conv(f"{name}.conv1", x).clamp(min=0), stride=2).clamp(min=0)
        mean = x.mean((2, 3), keepdim=True)
        for fc in ("fc1", "fc2"):
            mean = F.conv2d(mean, self.state[f"{name}.se.{fc}.weight"], self.state[f"{name}.se.{fc}.bias"])
            mean = mean.clamp(min=0) if fc == "fc1" else mean.sigmoid()
        return self.conv(f"{name}.conv3", x * mean)

    def stages(self, image: torch.Tensor) -> list[torch.Tensor]:
        x = image.double()
        for i in (0, 2, 4, 6):
            x = self.conv(f"patch_embed.{i}", x, stride=2)
            x = x.clamp(min=0) if i < 6 else x
        outs = [x]
        for k in (1, 2, 3):
            count = 1 + max(int(n.split(".")[1]) for n in self.state if n.startswith(f"blocks{k}."))
            for i in range(count):
                name = f"blocks{k}.{i}"
                if k > 1 and i == 1:
                    x = self.merge(name, x)
                elif k > 1 and i < 3:
                    x = self.ffn(f"{name}.1", self.dw(f"{name}.0", x))
                else:
                    x = self.block(name, x)
            outs.append(x)
        return outs

    def logits(self, image: torch.Tensor) -> torch.Tensor:
        pooled = self.stages(image)[-1].mean((2, 3))
        heads = [name for name in ("head", "head_dist") if f"{name}.l.weight" in self.state]
        scores = [
            self.norm(f"{name}.bn", pooled) @ self.state[f"{name}.l.weight"].t() + self.state[f"{name}.l.bias"]
            for name in heads
        ]
        return sum(scores) / len(scores)


def _randomised(model: torch.nn.Module) -> torch.nn.Module:
    """Draw weights with which every part matters; the wavelet filters are not Haar's."""
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name.endswith("running_var"):
                value.uniform_(0.5, 2.0)
            elif name.endswith("_filter"):
                value.add_(0.2 * torch.randn_like(value))
            elif value.is_floating_point():
                scale = value[0].numel() ** -0.5 if value.ndim > 1 and value.shape[0] > 1 else 0.3
                value.copy_(
                    scale * torch.randn_like(value) + float(name.endswith((".weight", "Ds")) and value.ndim == 1)
                )
    return model.eval()


_SMALL = dict(embed_dim=[20, 24, 40], depth=[1, 1, 1])
CASES = {
    "odd": (_SMALL, (2, 3, 90, 130)),
    "one pixel": (_SMALL, (2, 3, 1, 1)),
    "one row": (_SMALL, (1, 3, 1, 100)),
    "deeper, no identity": (dict(embed_dim=[16, 20, 32], depth=[2, 1, 2], local_ratio=[0.5, 0.5, 0.5]), (1, 3, 70, 49)),
    "no local channels": (dict(_SMALL, local_ratio=[0, 0, 0]), (1, 3, 70, 49)),
    "none scanned in two stages": (dict(_SMALL, global_ratio=[0, 0.7, 0.1]), (1, 3, 70, 49)),
    "kernels": (dict(_SMALL, kernels=[1, 3, 9]), (1, 3, 100, 70)),
    "ratios": (
        dict(embed_dim=[40, 36, 64], depth=[1, 1, 1], global_ratio=[0.4, 0.9, 0.5], ssm_ratio=1.5),
        (1, 3, 80, 64),
    ),
    "four channels": (dict(_SMALL, in_chans=4, forward_type="v052d_noz", img_size=64), (1, 4, 65, 66)),
}


@pytest.mark.parametrize("case", CASES)
def test_restated(case):
    kwargs, shape = CASES[case]
    torch.manual_seed(0)
    model = _randomised(from_upstream("mobilemamba", "backbone", {**kwargs, "out_indices": (0, 1, 2, 3)}))
    image = torch.randn(shape)
    expected = Restated(to_upstream_state_dict("mobilemamba", "backbone", model.state_dict())).stages(image)
    for form in (model, fold_batch_norms(model)):
        with torch.no_grad():
            for out, want in zip(form(image), expected, strict=True):
                assert relative_error(out, want) < 1e-4


@pytest.mark.parametrize("distillation", [False, True])
def test_restated_classifier(distillation):
    pytest.importorskip("mmpretrain")
    torch.manual_seed(1)
    kwargs = dict(_SMALL, num_classes=7, distillation=distillation)
    model = _randomised(from_upstream("mobilemamba", "classifier", kwargs))
    state = to_upstream_state_dict("mobilemamba", "classifier", model.state_dict())
    assert ("head_dist.bn.weight" in state) is distillation
    again = convert_state_dict("mobilemamba", "classifier", state)
    assert again.keys() == model.state_dict().keys()
    image = torch.randn(2, 3, 70, 100)
    expected = Restated(state).logits(image)
    for form in (model, fold_batch_norms(model)):
        assert relative_error(form(image), expected) < 1e-4


def test_channel_splits_are_the_published_ones():
    expected = {
        "t2": [(112, 28, 4), (192, 54, 26), (224, 110, 34)],
        "t4": [(144, 32, 0), (256, 73, 39), (272, 134, 42)],
        "s6": [(160, 32, 0), (272, 76, 36), (272, 134, 42)],
        "b1": [(160, 40, 0), (256, 75, 45), (272, 134, 42)],
    }
    for name, splits in expected.items():
        arch = ARCHS[name]
        ratios = zip(arch.dims, arch.global_ratio, arch.local_ratio, strict=True)
        assert [split_channels(*stage) for stage in ratios] == splits
    assert split_channels(40, 0.6, 0.3) == (32, 8, 0)  # a tie, rounded up


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(global_ratio=(-0.1, 0.7, 0.6)), "no negative"),
        (dict(global_ratio=(1.0, 0.7, 0.6), dims=(24, 24, 40)), "32 scanned"),
        (dict(local_ratio=(0.2, 0.2)), "local_ratio"),
        (dict(local_ratio=(-0.2, 0.2, 0.3)), "negative"),
        (dict(kernels=(7, 4, 3)), "kernels"),
        (dict(kernels=(7, 5)), "equal"),
        (dict(dims=(6, 24, 40), global_ratio=(1.5, 0.7, 0.6)), "scanned"),
    ],
)
def test_impossible_options_are_refused(change, words):
    with pytest.raises(ConfigError, match=words):
        MobileMambaArch(**{"dims": (20, 24, 40), "depths": (1, 1, 1), **change})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(forward_type="v2"), "forward_type"),
        (dict(stages=["s", "s", "h"]), "stages"),
        (dict(embed_dim=[20, 24], depth=[1, 1]), "embed_dim"),
        (dict(pretrained="x.pth"), "pretrained"),
        (dict(embed_dims=[20, 24, 40]), "embed_dim"),
        (dict(down_ops=[["subsample", 2], [""], [""]]), "down_ops"),
    ],
)
def test_upstream_arguments_that_cannot_be_are_refused(change, words):
    with pytest.raises(ConfigError, match=words):
        from_upstream("mobilemamba", "backbone", {**_SMALL, **change})


def test_upstream_defaults_and_what_its_configs_say():
    """Which is not what any released model has: the scan of the default is half as wide."""
    with torch.device("meta"):
        plain = from_upstream("mobilemamba", "backbone", {}).arch
        released = from_upstream("mobilemamba", "backbone", dict(function="MobileMamba_S6")).arch
    assert (plain.dims, plain.depths, plain.ssm_ratio) == ((192, 384, 448), (1, 2, 2), 1)
    assert released == ARCHS["s6"]
    told = dict(_SMALL, down_ops=[["subsample", 2], ["subsample", 2], [""]], sync_bn=True, num_classes=80, img_size=192)
    assert from_upstream("mobilemamba", "backbone", told).arch.dims == (20, 24, 40)


def test_arguments_of_the_neck_that_change_nothing():
    neck = dict(in_channels=[20, 24, 40], out_channels=8, num_outs=4)
    neutral = dict(
        end_level=-1,
        conv_cfg=None,
        norm_cfg=None,
        act_cfg=None,
        upsample_cfg=dict(mode="nearest"),
        no_norm_on_lateral=True,
        extra_convs_on_inputs=False,
    )
    for extra, source in ((False, None), ("on_lateral", "on_lateral"), (True, "on_output")):
        told = {**neck, **neutral, "add_extra_convs": extra}
        model = from_upstream("mobilemamba", "backbone_neck", dict(backbone=_SMALL, neck=told))
        assert model.neck.add_extra_convs == source
    for change in (dict(end_level=1), dict(norm_cfg=dict(type="BN")), dict(upsample_cfg=dict(mode="bilinear"))):
        with pytest.raises(ConfigError, match=f"neck: {next(iter(change))} is"):
            from_upstream("mobilemamba", "backbone_neck", dict(backbone=_SMALL, neck={**neck, **change}))


def test_neck_arguments_are_checked():
    neck = dict(in_channels=[20, 24, 40], out_channels=8, num_outs=4, num_extra_trans_convs=1)
    model = from_upstream("mobilemamba", "backbone_neck", dict(backbone=_SMALL, neck=neck))
    assert [tuple(out.shape[1:]) for out in model.eval()(torch.randn(1, 3, 64, 96))] == [
        (8, 8, 12), (8, 4, 6), (8, 2, 3), (8, 1, 2)
    ]  # fmt: skip
    for change in (dict(in_channels=[20, 24, 41]), dict(pre_nrom=True)):
        with pytest.raises(ConfigError, match="neck"):
            from_upstream("mobilemamba", "backbone_neck", dict(backbone=_SMALL, neck={**neck, **change}))


def test_the_stem_is_stage_0():
    model = MobileMamba("nano", out_indices=(0, 1, 2, 3)).eval()
    assert model.stage_channels == (20, 20, 24, 40) and model.stage_strides == (16, 16, 32, 64)
    stem, *_ = model(torch.randn(1, 3, 40, 70))
    assert stem.shape == (1, 20, 3, 5)
    frozen = MobileMamba("nano", frozen_stages=2)
    trained = {name.split(".blocks.")[0] for name, p in frozen.named_parameters() if p.requires_grad}
    assert not [name for name in trained if name.startswith(("patch_embed", "layers.1"))]
    assert any(name.startswith("layers.2") for name in trained)
    assert MobileMamba("nano").get_layer_depth("layers.1.downsample.merge.conv1.conv.weight") == (1, 6)


def test_filters_are_haar_and_stay():
    model = MobileMamba("nano").train()
    filters = {name: p for name, p in model.named_parameters() if name.endswith("t_filter")}
    assert len(filters) == 8 and not any(p.requires_grad for p in filters.values())
    half = torch.tensor([[[[0.5, 0.5], [-0.5, -0.5]]]])
    assert torch.equal(filters["layers.1.blocks.0.mixer.global_op.wt_filter"][1::4], half.expand(16, 1, 2, 2))


@pytest.mark.parametrize("size", [(2, 2), (6, 4), (10, 2)])
def test_wavelets(size):
    """Haar's way back is the way back; any filters are those of convolutions."""
    x = torch.randn(2, *size, 5, dtype=torch.float64)
    haar = by_pixel(haar_filters(5).double())
    torch.testing.assert_close(synthesise(analyse(x, haar), haar), x)
    filters = torch.randn(20, 1, 2, 2, dtype=torch.float64)
    first = x.permute(0, 3, 1, 2)
    expected = F.conv2d(first, filters, stride=2, groups=5)
    bands = analyse(x, by_pixel(filters))
    torch.testing.assert_close(by_band(expected.transpose(0, 1)).transpose(0, 1), bands.flatten(3).permute(0, 3, 1, 2))
    back = F.conv_transpose2d(expected, filters, stride=2, groups=5).permute(0, 2, 3, 1)
    torch.testing.assert_close(synthesise(bands, by_pixel(filters)), back)


def test_initial_values():
    """Residual branches start as nothing, but the convolutions between stages; the step is near 0.7."""
    model = MobileMamba("t2")
    state = model.state_dict()
    zero = re.compile(r".*(?:blocks\.\d+\.dw[01]|(?:ffn[01]|before\.1|after\.1)\.fc2|mixer\.proj)\.norm\.weight")
    for name, value in state.items():
        if name.endswith("norm.weight"):
            assert torch.equal(value, torch.full_like(value, 0.0 if zero.fullmatch(name) else 1.0)), name
    scan = "layers.1.blocks.0.mixer.global_op.scan."
    assert (state[scan + "A_logs"] == 0).all() and (state[scan + "Ds"] == 1).all()
    for name in ("dt_projs_weight", "dt_projs_bias"):
        assert state[scan + name].min() >= 0 and state[scan + name].max() <= 0.1
    spared = model.no_weight_decay()
    assert scan + "A_logs" in spared and "layers.1.downsample.merge.se.fc1.bias" in spared
    assert "layers.1.blocks.0.mixer.global_op.scale" not in spared and scan + "x_proj_weight" not in spared


def test_published_sizes():
    published = {"t2": 8836890, "t4": 14176090, "s6": 15036632, "b1": 17122849, "b2": 17122849, "b4": 17122849}
    for name in VARIANTS:
        with torch.device("meta"):
            model = MobileMamba(name)
        last = ARCHS[name].dims[-1]
        assert sum(p.numel() for p in model.parameters()) + 1002 * last + 1000 == published[name]


def test_names_of_both_sides_mixed_are_refused():
    state = MobileMamba("nano").state_dict()
    theirs = to_upstream_state_dict("mobilemamba", "backbone", state)
    assert recognise(theirs).family == recognise(state).family == "mobilemamba"
    name = "blocks2.0.0.m.c.weight"
    with pytest.raises(CheckpointMismatch, match="layers.1.downsample.before.0.conv.weight"):
        convert_state_dict(
            "mobilemamba", "backbone", {**theirs, "layers.1.downsample.before.0.conv.weight": theirs[name]}
        )
    with pytest.raises(CheckpointMismatch, match=r"blocks\.0\.dw2"):
        convert_state_dict("mobilemamba", "backbone", {**theirs, "blocks1.0.dw2.m.c.weight": theirs[name]})


def test_head_from_a_config():
    pytest.importorskip("mmpretrain")
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        head = MODELS.build(dict(type="mmvmamba.MobileMambaClsHead", num_classes=3, in_channels=4))
    scores = head.eval()((torch.randn(2, 4),))
    assert scores.shape == (2, 3) and math.isfinite(float(scores.sum()))
    for name, value in (("num_classes", 0), ("in_channels", 1.5)):
        with pytest.raises(ConfigError, match=name):
            build_mobilemamba_cls_head(**{"num_classes": 3, "in_channels": 4, name: value})
