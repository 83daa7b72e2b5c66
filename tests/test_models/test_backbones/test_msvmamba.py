"""What is special to MSVMamba: the network restated from its fact sheet alone, and its two generations."""

from __future__ import annotations

import dataclasses
import gzip
import json
import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from mmvmamba.converters import from_upstream, to_upstream_state_dict
from mmvmamba.converters.base import load_converter
from mmvmamba.errors import ConfigError
from mmvmamba.models import MSVMamba
from mmvmamba.models.backbones.msvmamba import ARCHS, ConvFFN, MultiScaleSS2D, half_route
from mmvmamba.models.layers import ChannelsLastConv2d, SqueezeExcite, convolve_depthwise
from mmvmamba.ops import ScanOrder
from mmvmamba.testing import relative_error

DATA = Path(__file__).parents[2] / "data" / "parity" / "msvmamba"
V1 = dict(
    ssm_d_state=1, ssm_ratio=2.0, mlp_ratio=0.0, downsample_version="v1", patchembed_version="v1",
    sscore_type="multiscale_4scan_12", convFFN=True, add_se=True, ms_stage=[0, 1], ms_split=[1, 3], ffn_dropout=0.0,
    dims=[8, 20], depths=[1, 2],
)  # fmt: skip
V3 = dict(
    ssm_d_state=1, ssm_ratio=1.0, forward_type="vms_noz", downsample_version="v3", patchembed_version="v2",
    norm_layer="ln2d", convffn=True, add_se=True, conv_ffn_ratio=4, dims=[16, 24], depths=[2, 1],
)  # fmt: skip
#: generation, what differs from the kwargs above, size of the image
CASES = {
    "v1": ("v1", {}, (33, 46)),
    "v1 of one pixel": ("v1", {}, (1, 1)),
    "v1 with states": ("v1", dict(ssm_d_state=3, ssm_dt_rank=2, ssm_conv=5, ssm_conv_bias=False), (20, 29)),
    "v1 without squeeze": ("v1", dict(add_se=False, ssm_act_layer="gelu"), (24, 36)),
    "v1 with the stem of v3": ("v1", dict(patchembed_version="v2", downsample_version="v3"), (24, 36)),
    "v1 with a perceptron": ("v1", dict(convFFN=False, mlp_ratio=3.0, patch_size=2), (14, 11)),
    "v3": ("v3", {}, (33, 46)),
    "v3 of one pixel": ("v3", {}, (1, 1)),
    "v3 gated": ("v3", dict(forward_type="vms", ssm_ratio=1.5, in_chans=2), (21, 30)),
    "v3 otherwise gated": ("v3", dict(forward_type="vms_nozact", conv_ffn_ratio=2, ssm_d_state=2), (21, 30)),
    "v3 other way round": ("v3", dict(full_res_index=2, add_se=False), (27, 22)),
    "v3 channels last": ("v3", dict(norm_layer="ln", downsample_version="v2"), (26, 35)),
    "v3 without a feed-forward part": ("v3", dict(convffn=False, mlp_ratio=0.0), (26, 35)),
}

# ---------------------------------------------------------------- the fact sheet, restated: maps (b, c, h, w), float64


def norm(x, state, name):
    return F.layer_norm(x.movedim(1, -1), x.shape[1:2], state[f"{name}.weight"], state[f"{name}.bias"]).movedim(-1, 1)


def conv(x, state, name, **options):
    return F.conv2d(x, state[f"{name}.weight"], state.get(f"{name}.bias"), **options)


def scan(tokens, state, group):
    """Scan (b, d, l) with one set of parameters, a step at a time."""
    projection, dt_weight = state["x_proj_weight"][group], state["dt_projs_weight"][group]
    d, rank = dt_weight.shape
    a = -state["A_logs"][group * d : (group + 1) * d].exp()
    n = a.shape[1]
    h, outs = tokens.new_zeros(tokens.shape[0], d, n), []
    for u in tokens.unbind(2):
        low, b_in, c_out = (u @ projection.T).split([rank, n, n], dim=1)
        delta = F.softplus(low @ dt_weight.T + state["dt_projs_bias"][group])
        h = (delta[..., None] * a).exp() * h + (delta * u)[..., None] * b_in[:, None]
        outs.append((h * c_out[:, None]).sum(2) + state["Ds"][group * d : (group + 1) * d] * u)
    return torch.stack(outs, 2)


WALKS = {
    "row": lambda x: x.flatten(2),
    "row_reversed": lambda x: x.flatten(2).flip(2),
    "column": lambda x: x.transpose(2, 3).flatten(2),
    "column_reversed": lambda x: x.transpose(2, 3).flatten(2).flip(2),
}


def unwalk(tokens, route, h, w):
    tokens = tokens.flip(2) if route.endswith("reversed") else tokens
    return tokens.unflatten(2, (h, w)) if route.startswith("row") else tokens.unflatten(2, (w, h)).transpose(2, 3)


def ss2d(x, state, arch):
    act = getattr(F, arch.ssm_act)
    x = torch.einsum("bchw,dc->bdhw", x, state["in_proj.weight"])
    x, z = x.chunk(2, 1) if arch.gated else (x, None)
    size = x.shape[2:]
    full = act(conv(x, state, "conv2d", padding=arch.conv_kernel // 2, groups=x.shape[1]))
    half = act(conv(x, state, "conv2d_b1", stride=2, padding=3, groups=x.shape[1]))
    h, w = half.shape[2:]
    v1 = arch.generation == "v1"
    of_full = scan(WALKS[arch.full_route](full), state, 1 if v1 else 0)
    of_half = scan(torch.cat([WALKS[route](half) for route in arch.half_routes], 2), state, 0 if v1 else 1)
    if v1:
        of_full, of_half = norm(of_full, state, "out_norm"), norm(of_half, state, "out_norm")
    parts = [unwalk(p, r, h, w) for p, r in zip(of_half.split(h * w, 2), arch.half_routes, strict=True)]
    y = unwalk(of_full, arch.full_route, *size)
    if v1:
        y = y + F.interpolate(sum(parts), size=size, mode="bilinear", align_corners=False)
    else:
        rows = [math.floor(i * h / size[0]) for i in range(size[0])]
        columns = [math.floor(i * w / size[1]) for i in range(size[1])]
        y = norm(y + sum(parts)[:, :, rows][:, :, :, columns], state, "out_norm")
    if arch.squeeze_excite:
        scale = (F.relu(y.mean((2, 3)) @ state["se.fc.0.weight"].T) @ state["se.fc.2.weight"].T).sigmoid()
        y = y * scale[:, :, None, None]
    if z is not None:
        y = y * (act(z) if arch.gate_act else z)
    return torch.einsum("bdhw,cd->bchw", y, state["out_proj.weight"])


def feed_forward(x, state, arch):
    if arch.ffn == "mlp":
        hidden = torch.einsum("bchw,dc->bdhw", x, state["mlp.fc1.weight"]) + state["mlp.fc1.bias"][:, None, None]
        return (
            torch.einsum("bdhw,cd->bchw", F.gelu(hidden), state["mlp.fc2.weight"])
            + state["mlp.fc2.bias"][:, None, None]
        )
    hidden = conv(x, state, "convFFN.linear1")
    hidden = F.gelu(hidden + conv(hidden, state, "convFFN.dwc", padding=1, groups=hidden.shape[1]))
    return conv(hidden, state, "convFFN.linear2")


def under(state, prefix):
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def downsample(x, state, arch):
    if arch.downsample == "patch_merging":
        x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))
        x = torch.cat([x[:, :, row::2, column::2] for column in (0, 1) for row in (0, 1)], 1)
        return torch.einsum("bchw,dc->bdhw", norm(x, state, "norm"), state["reduction.weight"])
    padding = 1 if arch.downsample == "conv3x3" else 0
    return norm(conv(x, state, "1", stride=2, padding=padding), state, "3")


def network(image, state, model):
    """Return the outputs of the feature extractor with upstream's weights ``state``."""
    arch, patch, x = model.arch, model.patch_embed.get_submodule("0").stride[0], image
    if arch.patch_embed == "patchify":
        x = F.pad(x, (0, max(0, patch - x.shape[3]), 0, max(0, patch - x.shape[2])))
        x = norm(conv(x, state, "patch_embed.0", stride=patch), state, "patch_embed.2")
    else:
        x = F.gelu(norm(conv(x, state, "patch_embed.0", stride=2, padding=1), state, "patch_embed.2"))
        x = norm(conv(x, state, "patch_embed.5", stride=2, padding=1), state, "patch_embed.7")
    outs = []
    for i, depth in enumerate(arch.depths):
        for j in range(depth):
            block = under(state, f"layers.{i}.blocks.{j}.")
            x = x + ss2d(norm(x, block, "norm"), under(block, "op."), arch)
            if arch.ffn_post_norm:
                x = x + norm(feed_forward(x, block, arch), block, "norm2")
            elif arch.ffn != "none":
                x = x + feed_forward(norm(x, block, "norm2"), block, arch)
        if i in model.out_indices:
            outs.append(norm(x, state, f"outnorm{i}"))
        if i + 1 < len(arch.depths):
            x = downsample(x, under(state, f"layers.{i}.downsample."), arch)
    return outs


def stirred(model):
    """Move every parameter off its initial value, far enough that each part of a scan matters."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.1 if parameter.ndim < 2 or "A_logs" in name else 2 * parameter[0].numel() ** -0.5
            parameter.add_(torch.randn_like(parameter) * scale)
            if name.endswith("dt_projs_bias"):
                parameter.add_(3.0)
    return model


@pytest.mark.parametrize("case", CASES)
def test_is_what_the_fact_sheet_says(case):
    """Outputs and input gradient in float64, for options and sizes that the parity data does not have."""
    generation, differences, size = CASES[case]
    kwargs = {**(V1 if generation == "v1" else V3), **differences, "out_indices": [0, 1]}
    model = stirred(from_upstream("msvmamba", f"{generation}_backbone", kwargs).double().eval())
    state = to_upstream_state_dict("msvmamba", f"{generation}_backbone", model.state_dict())
    image = torch.randn(2, kwargs.get("in_chans", 3), *size, dtype=torch.float64)
    grads = []
    for run in (model, lambda x: network(x, state, model)):
        x = image.clone().requires_grad_()
        outs = run(x)
        sum(out.pow(2).mean() for out in outs).backward()
        grads.append((outs, x.grad))
    (ours, of_ours), (theirs, of_theirs) = grads
    assert [out.shape for out in ours] == [out.shape for out in theirs]
    assert all(relative_error(a.detach(), b.detach()) <= 1e-9 for a, b in zip(ours, theirs, strict=True))
    assert relative_error(of_ours, of_theirs) <= 1e-8


# ---------------------------------------------------------------- parts


def test_the_half_map_is_one_walk():
    x = torch.empty(1, 2, 3, 1)
    routes = (ScanOrder.ROW_REVERSED, ScanOrder.COLUMN)
    assert half_route(x, routes).tolist() == [[5, 4, 3, 2, 1, 0, 0, 3, 1, 4, 2, 5]]
    assert half_route(x, routes, apart=True).tolist() == [[5, 4, 3, 2, 1, 0, 6, 9, 7, 10, 8, 11]]


@pytest.mark.parametrize("arch", ["nano", "nano-v3"])
def test_a_route_that_comes_back_keeps_its_state(arch):
    """The second route over the half map begins with the state that the first one left."""
    torch.manual_seed(0)
    op = MultiScaleSS2D(8, ARCHS[arch]).eval()
    op.dt_projs_bias.data.add_(3)
    short = MultiScaleSS2D(8, dataclasses.replace(ARCHS[arch], half_routes=("column", "column_reversed"))).eval()
    short.load_state_dict(op.state_dict())
    only = MultiScaleSS2D(8, dataclasses.replace(ARCHS[arch], half_routes=("row_reversed",))).eval()
    only.load_state_dict(op.state_dict())
    x = torch.randn(1, 6, 6, op.inner)
    with torch.no_grad():
        none = op._scan_set(
            op._convolve(x),
            op.full_set,
            [p[op.full_set : op.full_set + 1] for p in op.scan_parameters(x.dtype)],
            (op.full_route,),
        )
        none = op.out_norm(none) if op.norms_tokens else none
        together, apart = (
            (op.convolve_and_scan(x) - none),
            short.convolve_and_scan(x) + only.convolve_and_scan(x) - 2 * none,
        )
    assert relative_error(together, apart) > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_convolution_and_sum_of_the_feed_forward_part_are_one(dtype):
    ffn = ConvFFN(8, 16).to(dtype).eval()
    x = torch.randn(2, 5, 7, 16, dtype=dtype)
    with torch.no_grad():
        torch.testing.assert_close(ffn._convolve_and_add(x), x + ffn.dwc(x))
    called = []
    ffn.dwc.register_forward_hook(lambda *_: called.append(True))
    ffn._convolve_and_add(x)
    assert called


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (9, 8)])
def test_a_strided_depthwise_convolution(size):
    conv2d, act = ChannelsLastConv2d(6, 6, 7, stride=2, padding=3, groups=6), torch.nn.SiLU()
    x = torch.randn(2, *size, 12).requires_grad_()
    grads = []
    for run in (lambda y: convolve_depthwise(conv2d, y, act), lambda y: act(conv2d(y))):
        out = run(x[..., 3:9])
        grads.append((out, *torch.autograd.grad(out.pow(2).sum(), (x, conv2d.weight))))
    for ours, want in zip(*grads, strict=True):
        torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-5)


def test_squeeze_excite():
    with pytest.raises(ConfigError, match="reduction is 8 of 7 channels"):
        SqueezeExcite(7, 8)
    se, x = SqueezeExcite(16, 8), torch.randn(2, 3, 4, 16)
    mean = x.mean((1, 2))
    scale = (torch.relu(mean @ se.fc[0].weight.T) @ se.fc[2].weight.T).sigmoid()
    torch.testing.assert_close(se(x), x * scale[:, None, None])


# ---------------------------------------------------------------- the other generation's test-sized arch


def test_v3_recomputes_freezes_and_runs_in_half_precision():
    image = torch.randn(2, 3, 40, 52)
    torch.manual_seed(1)
    plain = MSVMamba("nano-v3").train()
    again = MSVMamba("nano-v3", with_cp=True).train()
    again.load_state_dict(plain.state_dict())
    for model in (plain, again):
        sum(out.pow(2).mean() for out in model(image)).backward()
    for a, b in zip(plain.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    frozen = MSVMamba("nano-v3", frozen_stages=2, out_indices=(1, 2)).train()
    trained = {name.split(".")[1] for name, p in frozen.named_parameters() if p.requires_grad and "layers" in name}
    assert trained == {"2"}
    with torch.no_grad():
        want = plain.eval()(image)
        for out, wide in zip(plain.bfloat16()(image.bfloat16()), want, strict=True):
            assert out.dtype == torch.bfloat16
            assert relative_error(out.float(), wide) < 0.05
    assert [out.shape[0] for out in MSVMamba("nano-v3")(torch.empty(0, 3, 32, 32))] == [0] * 4


def test_v3_compiles_and_exports():
    torch._dynamo.reset()
    arch = dataclasses.replace(ARCHS["nano-v3"], dims=(16,), depths=(1,))
    model, image = MSVMamba(arch, out_indices=(0,)).eval(), torch.randn(2, 3, 33, 41)
    with torch.no_grad():
        want = model(image)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(image)
        exported = torch.export.export(model, (image,)).module()(image)
    for outs in (compiled, exported):
        for out, wide in zip(outs, want, strict=True):
            torch.testing.assert_close(out, wide, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- constructor arguments


CLASSIFIERS = [path for path in sorted(DATA.glob("*.keys.json.gz")) if "_backbone" not in path.name]


@pytest.mark.parametrize("path", CLASSIFIERS, ids=lambda path: path.name.split(".")[0])
def test_upstream_arguments_are_our_arch(path):
    """With the form of the generation, and with the plain form and the name of the released file."""
    meta = json.loads(gzip.decompress(path.read_bytes()))
    function = path.name.split(".")[0]
    (variant,) = [n for n, kwargs in load_converter("msvmamba").released.items() if kwargs["function"] == function]
    kwargs = {name: value for name, value in meta["kwargs"].items() if name != "num_classes"}
    generation = meta["form"].partition("_")[0]
    with torch.device("meta"):
        for form, arguments in ((f"{generation}_backbone", kwargs), ("backbone", {"function": function})):
            assert from_upstream("msvmamba", form, arguments).arch == ARCHS[variant]


@pytest.mark.parametrize(
    ("form", "given", "fields"),
    [
        ("v1_backbone", {}, dict(full_route="row", half_routes=("row_reversed", "column", "column_reversed"))),
        ("v3_backbone", {}, dict(full_route="row", half_routes=("row_reversed", "column", "column_reversed"))),
        ("v3_backbone", dict(full_res_index=2), dict(full_route="row_reversed",
                                                     half_routes=("row", "column", "column_reversed"))),
        ("v3_backbone", dict(forward_type="vms"), dict(gated=True, gate_act=True, out_act=False)),
        ("v3_backbone", dict(forward_type="vms_nozact_oact"), dict(gated=True, gate_act=False, out_act=True)),
        ("v3_backbone", dict(forward_type=["vms_noz"] * 2), dict(gated=False)),
        ("v3_backbone", dict(norm_layer="ln"), dict(ffn_post_norm=False, norm="layer_norm")),
        ("v3_backbone", dict(norm_layer="BN"), dict(ffn_post_norm=True, norm="batch_norm")),
        ("v3_backbone", dict(convffn=False), dict(ffn_post_norm=False, ffn="mlp", ffn_ratio=4.0)),
        ("v1_backbone", dict(add_se=False, ssm_dt_rank=3), dict(squeeze_excite=False, dt_rank=3)),
    ],
    ids=str,
)  # fmt: skip
def test_what_an_upstream_argument_means(form, given, fields):
    """The restatement above goes by our options: this is what says that they are upstream's."""
    base = V1 if form.startswith("v1") else V3
    arch = from_upstream("msvmamba", form, {**base, **given, "out_indices": [0]}).arch
    assert {name: getattr(arch, name) for name in fields} == fields


def test_a_plain_form_tells_the_generations_by_their_arguments():
    kwargs = {"v1": V1, "v3": V3}
    for generation, own in kwargs.items():
        assert from_upstream("msvmamba", "backbone", {**own, "out_indices": [1]}).arch.generation == generation


@pytest.mark.parametrize(
    ("form", "wrong", "words"),
    [
        ("v1_backbone", dict(sscore_type="None"), "sscore_type is 'None'.*VMamba"),
        ("v1_backbone", dict(ms_stage=[0]), r"ms_stage is \[0\], expected \[0, 1\]"),
        ("v1_backbone", dict(ms_split=[3, 1]), r"ms_split is \[3, 1\]"),
        ("v1_backbone", dict(ms_split=(1, 2)), r"ms_split is \[1, 2\], expected \[1, 3\].*fails at fewer"),
        ("v1_backbone", dict(sep_norm=True), "sep_norm is True"),
        ("v1_backbone", dict(ssm_rank_ratio=1.0), "ssm_rank_ratio is 1.0"),
        ("v1_backbone", dict(mlp_ratio=2.0), "mlp_ratio is 2.0.*both"),
        ("v1_backbone", dict(forward_type="v2nozact"), "forward_type is 'v2nozact'"),
        ("v1_backbone", dict(ssm_conv=1), "ssm_conv is 1"),
        ("v1_backbone", dict(convffn=True), "unknown argument 'convffn'.*convFFN"),
        ("v1_backbone", dict(pretrained="file.pth"), "pretrained is 'file.pth'"),
        ("v3_backbone", dict(forward_type="v05"), "forward_type is 'v05', expected 'vms'"),
        ("v3_backbone", dict(forward_type=["vms", "axis"]), r"forward_type is \['vms', 'axis'\]"),
        ("v3_backbone", dict(full_res_index=3), "full_res_index is 3.*wrongly"),
        ("v3_backbone", dict(posembed=True), "posembed is True"),
        ("v3_classifier", dict(out_indices=[0]), "unknown argument 'out_indices'"),
    ],
)
def test_an_option_that_is_not_known_here_is_refused(form, wrong, words):
    kwargs = V1 if form.startswith("v1") else V3
    with pytest.raises(ConfigError, match=words):
        from_upstream("msvmamba", form, {**kwargs, **wrong})


def test_options_without_effect_are_taken():
    plain = {**V1, "out_indices": [1]}
    kwargs = {**plain, "up_sample": "conv", "lpu": True, "grid_size": 7, "b1_ratio": 2, "recurrent": True}
    assert from_upstream("msvmamba", "backbone", kwargs).arch == from_upstream("msvmamba", "v1_backbone", plain).arch


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (dict(generation="v2"), "generation is 'v2'"),
        (dict(half_routes=["rows"]), "half_routes is 'rows'"),
        (dict(half_routes=[]), "half_routes is ()"),
        (dict(ffn="gated"), "ffn is 'gated'"),
        (dict(ffn_ratio=0.0), "ConvFFN: hidden is 0"),
        (dict(out_norm="softmax"), "out_norm is 'softmax' with generation='v1'"),
    ],
)
def test_a_wrong_arch_is_refused(wrong, words):
    with pytest.raises(ConfigError, match=words):
        MSVMamba(dict(dims=[16], depths=[1], **wrong), out_indices=(0,))
