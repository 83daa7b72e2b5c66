"""What is special to MambaOut: its numbers restated in float64, its options, its head, and names of timm."""

from __future__ import annotations

import math

import pytest
import torch
from mmengine.registry import DefaultScope
from torch.nn import functional as F

from mmvmamba.converters import convert_state_dict, from_upstream, to_upstream_state_dict
from mmvmamba.converters.base import load_converter
from mmvmamba.errors import CheckpointMismatch, ConfigError
from mmvmamba.models import MambaOut, build_mambaout_cls_head
from mmvmamba.models.backbones import mambaout
from mmvmamba.models.backbones.mambaout import ARCHS, GatedCNNBlock, MambaOutArch
from mmvmamba.models.layers.onednn import is_plain_eager, use_onednn_linear
from mmvmamba.ops import use_backend
from mmvmamba.registry import MODELS
from mmvmamba.testing import relative_error, requires_extension

VARIANTS = [name for name in ARCHS if name != "nano"]


class Restated:
    """The fact sheet's words over upstream's state dict, in float64, channels-first but where it says otherwise."""

    def __init__(self, state: dict[str, torch.Tensor], conv_ratio: float = 1.0) -> None:
        self.state = {name: value.double() for name, value in state.items()}
        self.conv_ratio = conv_ratio

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Norm over the last dimension, eps 1e-6."""
        centred = x - x.mean(-1, keepdim=True)
        x = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return x * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("...c,dc->...d", x, self.state[f"{name}.weight"]) + self.state[f"{name}.bias"]

    def halve(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """A 3x3 convolution of stride 2 of a map (b, h, w, c), one tap after another."""
        b, h, w, _ = x.shape
        rows, columns = math.ceil(h / 2), math.ceil(w / 2)
        weight = self.state[f"{name}.weight"]
        padded = x.new_zeros(b, 2 * rows + 1, 2 * columns + 1, x.shape[3])
        padded[:, 1 : h + 1, 1 : w + 1] = x
        out = self.state[f"{name}.bias"].expand(b, rows, columns, -1)
        for i in range(3):
            for j in range(3):
                tap = padded[:, i : i + 2 * rows : 2, j : j + 2 * columns : 2]
                out = out + torch.einsum("bhwc,dc->bhwd", tap[:, :rows, :columns], weight[:, :, i, j])
        return out

    def depthwise(self, name: str, x: torch.Tensor) -> torch.Tensor:
        weight = self.state[f"{name}.weight"]
        side = weight.shape[-1]
        padded = F.pad(x, (0, 0, side // 2, side // 2, side // 2, side // 2))
        out = self.state[f"{name}.bias"].expand_as(x)
        for i in range(side):
            for j in range(side):
                out = out + padded[:, i : i + x.shape[1], j : j + x.shape[2]] * weight[:, 0, i, j]
        return out

    @staticmethod
    def gelu(x: torch.Tensor) -> torch.Tensor:
        return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))

    def block(self, name: str, x: torch.Tensor) -> torch.Tensor:
        c = x.shape[-1]
        hidden, convolved = int(8 / 3 * c), int(self.conv_ratio * c)
        y = self.linear(f"{name}.fc1", self.norm(f"{name}.norm", x))
        gate, rest, v = y[..., :hidden], y[..., hidden : 2 * hidden - convolved], y[..., 2 * hidden - convolved :]
        v = self.depthwise(f"{name}.conv", v)
        return x + self.linear(f"{name}.fc2", self.gelu(gate) * torch.cat([rest, v], -1))

    def stages(self, image: torch.Tensor) -> list[torch.Tensor]:
        x = image.double().permute(0, 2, 3, 1)
        outs = []
        for i in range(1 + max(int(n.split(".")[1]) for n in self.state if n.startswith("stages."))):
            layer = f"downsample_layers.{i}"
            if i == 0:
                x = self.gelu(self.norm(f"{layer}.norm1", self.halve(f"{layer}.conv1", x)))
                x = self.norm(f"{layer}.norm2", self.halve(f"{layer}.conv2", x))
            else:
                x = self.norm(f"{layer}.norm", self.halve(f"{layer}.conv", x))
            for j in range(1 + max(int(n.split(".")[2]) for n in self.state if n.startswith(f"stages.{i}."))):
                x = self.block(f"stages.{i}.{j}", x)
            outs.append(x)
        return outs

    def logits(self, image: torch.Tensor) -> torch.Tensor:
        x = self.norm("norm", self.stages(image)[-1].mean((1, 2)))
        return self.linear("head.fc2", self.norm("head.norm", self.gelu(self.linear("head.fc1", x))))


def _randomised(model: torch.nn.Module) -> torch.nn.Module:
    """Draw weights with which every part matters."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            else:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


CASES = {
    "odd": (dict(depths=[1, 2, 1, 1], dims=[8, 12, 18, 26]), (2, 3, 45, 61)),
    "one pixel": (dict(depths=[1, 1, 2, 1], dims=[6, 10, 14, 20]), (2, 3, 1, 1)),
    "one row": (dict(depths=[1, 1], dims=[6, 10]), (1, 3, 1, 23)),
    "kernel 3": (dict(depths=[1, 1], dims=[8, 16], kernel_size=3), (1, 3, 20, 17)),
    "kernel 1": (dict(depths=[1, 1], dims=[8, 16], kernel_size=1), (1, 3, 20, 17)),
    "half convolved": (dict(depths=[2, 1], dims=[10, 15], conv_ratio=0.5), (2, 3, 21, 30)),
    "more convolved": (dict(depths=[1, 1], dims=[9, 12], conv_ratio=2.6), (1, 3, 21, 30)),
    "one stage of four channels": (dict(depths=2, dims=12, in_chans=4), (1, 4, 19, 18)),
}


@pytest.mark.parametrize("backend", ["reference", pytest.param("compiled", marks=requires_extension())])
@pytest.mark.parametrize("case", CASES)
def test_stages_and_logits_are_those_of_the_fact_sheet(case: str, backend: str) -> None:
    pytest.importorskip("mmpretrain")
    kwargs, size = CASES[case]
    torch.manual_seed(0)
    classifier = _randomised(from_upstream("mambaout", "classifier", {**kwargs, "num_classes": 7}))
    state = to_upstream_state_dict("mambaout", "classifier", classifier.state_dict())
    backbone = from_upstream("mambaout", "backbone", kwargs).eval()
    backbone.load_state_dict(convert_state_dict("mambaout", "backbone", state))
    restated = Restated(state, kwargs.get("conv_ratio", 1.0))
    image = torch.randn(size)
    with use_backend(backend), torch.no_grad():
        outs, logits = backbone(image), classifier(image)
    expected = restated.stages(image)
    for out, wanted in zip(outs, expected, strict=True):
        assert relative_error(out.permute(0, 2, 3, 1), wanted) < 1e-5
    assert relative_error(logits, restated.logits(image)) < 1e-5


def _block(conv_ratio: float = 1.0) -> GatedCNNBlock:
    torch.manual_seed(0)
    arch = MambaOutArch((24,), (1,), conv_ratio=conv_ratio)
    return _randomised(GatedCNNBlock(24, arch, 0.0))


def _joins_maps(block: GatedCNNBlock, x: torch.Tensor) -> bool:
    """Whether a call joins the passed and the convolved channels, which the walk in chunks does not."""
    with torch.profiler.profile() as profile:
        block(x)
    return any(event.key == "aten::cat" for event in profile.key_averages())


@pytest.mark.skipif(not is_plain_eager(), reason="the walk in chunks needs the oneDNN operator of x86")
@pytest.mark.parametrize("conv_ratio", [1.0, 0.5, 64 / 24])
@pytest.mark.parametrize("batch", [1, 2])
@torch.no_grad()
def test_inference_in_chunks_is_the_same(conv_ratio: float, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    block, x = _block(conv_ratio), torch.randn(batch, 37, 41, 24)
    monkeypatch.setattr(mambaout, "chunk_rows", lambda _hidden: 64)  # the last chunk has fewer rows
    assert not _joins_maps(block, x)
    fast = block(x)
    before = x.clone()
    with use_onednn_linear(False):
        assert _joins_maps(block, x)
        wanted = block(x)
    assert relative_error(fast, wanted.double()) < 1e-6 and torch.equal(x, before)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = block(x)
        with use_onednn_linear(False):
            assert narrow.dtype == block(x).dtype
    assert relative_error(narrow, wanted.double()) < 2e-2


@pytest.mark.skipif(not is_plain_eager(), reason="the walk in chunks needs the oneDNN operator of x86")
def test_what_is_watched_or_dropped_is_not_done_in_chunks() -> None:
    x = torch.randn(1, 40, 40, 24)
    assert _joins_maps(_block(), x)  # a gradient is asked for
    with torch.no_grad():
        for name in ("fc1", "act", "fc2", "drop_path"):
            block, seen = _block(), []
            block.get_submodule(name).register_forward_hook(lambda *_, seen=seen: seen.append(1))
            block(x)
            assert seen == [1], name
        block = _block().train()
        block.drop_path.rate = 0.5
        assert _joins_maps(block, x)


@pytest.mark.parametrize("name", VARIANTS)
def test_hidden_channels_are_rounded_down_and_every_norm_has_upstream_s_eps(name: str) -> None:
    with torch.device("meta"):
        model = MambaOut(name)
    hidden = {48: 128, 96: 256, 128: 341, 192: 512, 256: 682, 288: 768, 384: 1024, 512: 1365, 576: 1536, 768: 2048}
    for dim, layer in zip(model.arch.dims, model.layers, strict=True):
        assert {block.fc2.in_features for block in layer.blocks} == {hidden[dim]}
    assert {m.eps for m in model.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-6}


def test_out_norms_are_one_for_every_output_or_none() -> None:
    torch.manual_seed(0)
    raw, normed = MambaOut("nano", out_indices=(1, 3), out_norms=False).eval(), MambaOut("nano", out_indices=(1, 3))
    assert not [name for name in raw.state_dict() if name.startswith("outnorm")]
    missing, unexpected = normed.eval().load_state_dict(raw.state_dict(), strict=False)
    assert (set(missing), unexpected) == ({f"outnorm{i}.{f}" for i in (1, 3) for f in ("weight", "bias")}, [])
    image = torch.randn(1, 3, 40, 40)
    for plain, out in zip(raw(image), normed(image), strict=True):
        wanted = F.layer_norm(plain.permute(0, 2, 3, 1), plain.shape[1:2], eps=1e-6).permute(0, 3, 1, 2)
        torch.testing.assert_close(out, wanted)


def test_initial_weights_and_what_has_no_weight_decay() -> None:
    torch.manual_seed(0)
    model = MambaOut("nano")
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            assert float(parameter.abs().max()) < 0.15 and float(parameter.std()) == pytest.approx(0.02, rel=0.15), name
        elif name.endswith("bias"):
            assert not parameter.any(), name
    assert model.no_weight_decay() == {name for name, p in model.named_parameters() if p.ndim == 1}


@pytest.mark.parametrize(
    ("arch", "told"),
    [
        (dict(kernel_size=4), "kernel_size is 4, expected a positive odd integer"),
        (dict(conv_ratio=0.01), "conv_ratio is 0.01, which has 0 of a stage's 21 hidden channels convolved"),
        (dict(conv_ratio=2.8), "conv_ratio is 2.8, which has 22 of a stage's 21 hidden channels convolved"),
        (dict(dims=[1, 8]), r"dims is \(1, 8\), expected at least 2 channels in the first stage"),
        (dict(dims=[8]), "expected equal lengths"),
    ],
)
def test_bad_archs(arch: dict, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        MambaOut({"dims": [8, 16], "depths": [1, 1], **arch})


@pytest.mark.parametrize(
    ("kwargs", "told"),
    [
        (dict(act_layer="relu"), "act_layer is given, expected it left out or None"),
        (dict(pretrained=True), "pretrained is True, expected None"),
        (dict(depths=[1] * 5, dims=[8] * 5), "expected at most 4 stages"),
        (dict(function="mambaout_huge"), "function is 'mambaout_huge', expected one of mambaout_femto"),
        (dict(drop_path=0.1), r"unknown argument 'drop_path'.*Did you mean 'drop_path_rate'\?"),
    ],
)
@pytest.mark.parametrize("form", ["classifier", "backbone"])
def test_upstream_arguments_that_mean_nothing_here(form: str, kwargs: dict, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        from_upstream("mambaout", form, kwargs)


def test_upstream_arguments_without_effect() -> None:
    same = from_upstream("mambaout", "backbone", dict(depths=[1], dims=[8], norm_layer=None, pretrained=False))
    assert same.arch == MambaOut(dict(depths=[1], dims=[8]), out_indices=(0,)).arch


def _as_timm(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return upstream's entries under the names of timm."""
    renamed = {}
    for name, value in state.items():
        parts = name.split(".")
        if parts[0] == "downsample_layers":
            name = ".".join(["stem", *parts[2:]] if parts[1] == "0" else ["stages", parts[1], "downsample", *parts[2:]])
        elif parts[0] == "stages":
            name = ".".join([*parts[:2], "blocks", *parts[2:]])
        elif parts[0] == "norm":
            name = "head." + name
        else:
            name = (
                {"fc1": "head.pre_logits.fc", "norm": "head.pre_logits.norm", "fc2": "head.fc"}[parts[1]]
                + "."
                + parts[2]
            )
        renamed[name] = value
    return renamed


def test_weights_under_the_names_of_timm() -> None:
    pytest.importorskip("mmpretrain")
    classifier = from_upstream("mambaout", "classifier", dict(depths=[1, 1, 1, 1], dims=[8, 12, 16, 20], num_classes=5))
    state = to_upstream_state_dict("mambaout", "classifier", _randomised(classifier).state_dict())
    timm = _as_timm(state)
    assert not set(timm) & (set(state) - {"head.norm.weight", "head.norm.bias"})
    for form in ("classifier", "backbone"):
        ours, theirs = (convert_state_dict("mambaout", form, entries) for entries in (state, timm))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert all(load_converter("mambaout").knows("classifier", name) for name in timm)


def test_entries_of_no_mambaout_are_refused() -> None:
    state = MambaOut(dict(depths=[1], dims=[8]), out_indices=(0,), out_norms=False).state_dict()
    with pytest.raises(CheckpointMismatch, match="1 of 17 entries are no entries of a MambaOut feature extractor"):
        convert_state_dict("mambaout", "backbone", {**state, "layers.0.blocks.0.gamma": torch.ones(8)})
    with pytest.raises(ConfigError, match="fill_out_norms is"):
        convert_state_dict("mambaout", "classifier", state, fill_out_norms=(0,))
    with pytest.raises(CheckpointMismatch, match="fill_out_norms names stage 1"):
        convert_state_dict("mambaout", "backbone", state, fill_out_norms=(0, 1))
    with pytest.raises(CheckpointMismatch, match=r"no entry 'layers\.\*'"):
        convert_state_dict("mambaout", "classifier", {})


def test_the_head_trains_by_its_config() -> None:
    pytest.importorskip("mmpretrain")
    from mmpretrain.structures import DataSample

    with DefaultScope.overwrite_default_scope("mmpretrain"):
        head = MODELS.build(
            dict(type="mmvmamba.MambaOutClsHead", num_classes=3, in_channels=6, dropout=0.5, topk=(1, 2))
        )
    samples = [DataSample().set_gt_label(label) for label in (0, 2)]
    pooled = torch.randn(2, 6, requires_grad=True)
    head.train().loss((pooled,), samples)["loss"].backward()
    assert pooled.grad.any() and all(p.grad is not None for p in head.parameters())
    assert not torch.equal(head((pooled,)), head((pooled,)))  # dropout
    head.eval()
    assert torch.equal(head((pooled,)), head.fc2(head.pre_logits((None, pooled))))
    assert {int(sample.pred_label) for sample in head.predict((pooled,))} <= {0, 1, 2}


@pytest.mark.parametrize(("name", "value"), [("num_classes", 0), ("in_channels", 2.0)])
def test_bad_numbers_of_the_head(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"MambaOutClsHead: {name} is {value!r}, expected an integer"):
        build_mambaout_cls_head(**{"num_classes": 3, "in_channels": 4, name: value})
