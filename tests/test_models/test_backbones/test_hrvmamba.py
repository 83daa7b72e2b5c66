"""What is special to HRVMamba: the network against a restatement in other words, its options, its forms."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from mmvmamba.converters import convert_state_dict, from_upstream, to_upstream_state_dict
from mmvmamba.converters.hrvmamba import UPSTREAM_FUNCTIONS
from mmvmamba.errors import CheckpointMismatch, ConfigError
from mmvmamba.models import HRVMamba
from mmvmamba.models.backbones.hrvmamba import ARCHS
from mmvmamba.ops import use_backend
from mmvmamba.testing import relative_error, requires_extension

PARITY = Path(__file__).parents[2] / "data" / "parity" / "hrvmamba"


def _extra(widths=(16, 8, 32, 16), first=8, modules=(1, 1, 1), blocks=1, last=None, **options):
    """Return upstream's nested dict; ``options`` are those of the blocks and ``last`` those of stage4 alone."""
    one = dict(num_modules=1, num_branches=1, block="BOTTLENECK", num_blocks=[1], num_channels=[first])
    extra = dict(drop_path_rate=0.2, stage1=one)
    for number, count in enumerate(modules, start=2):
        extra[f"stage{number}"] = dict(
            num_modules=count,
            num_branches=number,
            block="HRVmambaBlock",
            num_blocks=[blocks] * number,
            num_channels=list(widths[:number]),
            **options,
        )
    extra["stage4"].update(last or {})
    return extra


SMALL = dict(neck_channels=[8, 12, 16, 20], neck_out_channels=24)

# ---------------------------------------------------------------- the network, restated channel-first from its facts


def _convolve(state, name, x, stride=1):
    weight = state[f"{name}.weight"]
    groups = x.shape[1] // weight.shape[1]
    return F.conv2d(x, weight, state.get(f"{name}.bias"), stride, weight.shape[2] // 2, groups=groups)


def _batch_norm(state, name, x):
    mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
    return F.batch_norm(x, mean, var, state[f"{name}.weight"], state[f"{name}.bias"], False, 0.0, 1e-5)


def _conv_bn(state, conv, norm, x, stride=1):
    return _batch_norm(state, norm, _convolve(state, conv, x, stride))


def _layer_norm(state, name, x):
    """Over the channels of a map (b, c, h, w)."""
    y = F.layer_norm(x.movedim(1, -1), x.shape[1:2], state[f"{name}.weight"], state[f"{name}.bias"], 1e-5)
    return y.movedim(-1, 1)


def _linear(state, name, x):
    """Over the channels of a map (b, c, h, w)."""
    return F.linear(x.movedim(1, -1), state[f"{name}.weight"], state.get(f"{name}.bias")).movedim(-1, 1)


def _bottleneck(state, name, x):
    y = _conv_bn(state, f"{name}.conv1", f"{name}.bn1", x).relu()
    y = _conv_bn(state, f"{name}.conv2", f"{name}.bn2", y).relu()
    y = _conv_bn(state, f"{name}.conv3", f"{name}.bn3", y)
    if f"{name}.downsample.0.weight" in state:
        x = _conv_bn(state, f"{name}.downsample.0", f"{name}.downsample.1", x)
    return (y + x).relu()


def _tent(distance):
    return (1 - distance.abs()).relu()


def _aggregate(x, numbers, groups):
    """Deformable aggregation as a product with a matrix of all places by all pixels."""
    b, d, h, w = x.shape
    columns, rows = torch.arange(w, dtype=x.dtype), torch.arange(h, dtype=x.dtype)
    outs = []
    for group in range(groups):
        own = numbers[:, 27 * group : 27 * (group + 1)]
        values = x[:, d // groups * group : d // groups * (group + 1)].flatten(2)
        total = 0
        for i in range(3):
            for j in range(3):
                p = 3 * i + j
                at_x = columns - 1 + i + own[:, 2 * p]
                at_y = rows[:, None] - 1 + j + own[:, 2 * p + 1]
                along_x = _tent(at_x.reshape(b, h * w, 1) - columns)
                along_y = _tent(at_y.reshape(b, h * w, 1) - rows)
                matrix = (along_y[..., None] * along_x[:, :, None]).flatten(2)
                total = total + own[:, 18 + p].reshape(b, 1, -1) * (values @ matrix.transpose(1, 2))
        outs.append(total.view(b, -1, h, w))
    return torch.cat(outs, 1)


def _route(x, k):
    """Put a map (b, d, h, w) in the order of route k: (b, d, l)."""
    x = (x.transpose(2, 3) if k % 2 else x).flatten(2)
    return x.flip(2) if k >= 2 else x


def _back(y, k, size):
    y = y.flip(2) if k >= 2 else y
    return y.unflatten(2, size[::-1]).transpose(2, 3) if k % 2 else y.unflatten(2, size)


def _scan(state, name, x):
    """Step by step."""
    (b, d, *size), rank = x.shape, state[f"{name}.dt_projs_weight"].shape[2]
    n = state[f"{name}.A_logs"].shape[1]
    rates = -state[f"{name}.A_logs"].exp().view(4, d, n)
    total = 0
    for k in range(4):
        u = _route(x, k)
        dt, into, out = torch.split(state[f"{name}.x_proj_weight"][k] @ u, [rank, n, n], 1)
        steps = state[f"{name}.dt_projs_weight"][k] @ dt + state[f"{name}.dt_projs_bias"][k][:, None]
        steps = F.softplus(steps)
        h, ys = x.new_zeros(b, d, n), []
        for t in range(u.shape[2]):
            step = steps[:, :, t, None]
            h = (step * rates[k]).exp() * h + step * into[:, None, :, t] * u[:, :, t, None]
            ys.append((h * out[:, None, :, t]).sum(2))
        y = torch.stack(ys, 2) + state[f"{name}.Ds"].view(4, d)[k][:, None] * u
        total = total + _back(y, k, size)
    return total


def _op(state, name, x, act):
    x = _linear(state, f"{name}.in_proj", x)
    seen = x
    if f"{name}.conv2d.offset_mask_dw.weight" in state:
        seen = _convolve(state, f"{name}.conv2d.offset_mask_dw", x)
    numbers = _linear(state, f"{name}.conv2d.offset_mask", seen)
    x = act(_aggregate(x, numbers, state[f"{name}.dt_projs_weight"].shape[2]))
    y = _layer_norm(state, f"{name}.out_norm", _scan(state, name, x))
    if f"{name}.se.fc.0.weight" in state:
        weights = F.linear(y.mean((2, 3)), state[f"{name}.se.fc.0.weight"]).relu()
        y = y * F.linear(weights, state[f"{name}.se.fc.2.weight"]).sigmoid()[..., None, None]
    return _linear(state, f"{name}.out_proj", y)


def _block(state, name, x, acts):
    inner = x + _convolve(state, f"{name}.cpe1", x) if f"{name}.cpe1.weight" in state else x
    parts = _layer_norm(state, f"{name}.norm0", inner).chunk(4, 1)
    y = torch.cat([_convolve(state, f"{name}.conv2d.{i}", part) for i, part in enumerate(parts)], 1)
    x = x + F.gelu(F.channel_shuffle(y, 4))
    x = x + _op(state, f"{name}.op", _layer_norm(state, f"{name}.norm", x), acts[0])
    if f"{name}.cpe2.weight" in state:
        x = x + _convolve(state, f"{name}.cpe2", x)
    hidden = acts[1](_linear(state, f"{name}.mlp.fc1", _layer_norm(state, f"{name}.norm2", x)))
    return x + _linear(state, f"{name}.mlp.fc2", hidden)


def _fuse(state, name, maps, i):
    total = 0
    for j, x in enumerate(maps):
        term, here = x, f"{name}.fuse_layers.{i}.{j}"
        if j > i:
            term = _conv_bn(state, f"{here}.0", f"{here}.1", x)
            term = F.interpolate(term, scale_factor=2 ** (j - i), mode="bilinear")
            term = F.interpolate(term, size=maps[i].shape[2:], mode="bilinear")
        for step in range(i - j):
            term = _conv_bn(state, f"{here}.{step}.0", f"{here}.{step}.1", term, 2)
            term = _conv_bn(state, f"{here}.{step}.2", f"{here}.{step}.3", term)
            term = term if step == i - j - 1 else term.relu()
        total = total + term
    return total.relu()


def restated(state, image, extra, acts=(F.silu, F.gelu)):
    """Return what upstream's feature extractors do, from upstream's names; norms and neck if they are there."""
    x = _conv_bn(state, "conv1", "bn1", image, 2).relu()
    x = _conv_bn(state, "conv2", "bn2", x, 2).relu()
    x = _bottleneck(state, "layer1.0", x)
    maps = [x]
    for number in (2, 3, 4):
        new = f"transition{number - 1}.{number - 1}.0"
        maps.append(_conv_bn(state, f"{new}.0", f"{new}.1", maps[-1], 2).relu())
        if number == 2 and "transition1.0.0.weight" in state:
            maps[0] = _conv_bn(state, "transition1.0.0", "transition1.0.1", maps[0]).relu()
        for module in range(extra[f"stage{number}"]["num_modules"]):
            name = f"stage{number}.{module}"
            for i in range(number):
                for block in range(extra[f"stage{number}"]["num_blocks"][0]):
                    maps[i] = _block(state, f"{name}.branches.{i}.{block}", maps[i], acts)
            rows = [i for i in range(number) if any(key.startswith(f"{name}.fuse_layers.{i}.") for key in state)]
            maps = [_fuse(state, name, maps, i) for i in rows]
    if any(key.startswith("neck.") for key in state):
        increased = [_bottleneck(state, f"neck.increase_layers.{i}.0", x) for i, x in enumerate(maps)]
        maps = [increased[0]]
        for i in range(3):
            name = f"neck.downsample_layers.{i}"
            maps.append(_conv_bn(state, f"{name}.conv", f"{name}.bn", maps[-1], 2).relu() + increased[i + 1])
        maps[3] = _conv_bn(state, "neck.final_layer.conv", "neck.final_layer.bn", maps[3]).relu()
    if not any(key.startswith("outnorm") for key in state):
        return maps
    return [_layer_norm(state, f"outnorm{i}", x) for i, x in enumerate(maps) if f"outnorm{i}.weight" in state]


def _model(form, kwargs):
    """Return a model in which nothing is at its initial value."""
    torch.manual_seed(0)
    model = from_upstream("hrvmamba", form, kwargs).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(
                torch.randn_like(parameter) * (0.3 if parameter.ndim == 1 else 1.0 / math.sqrt(parameter[0].numel()))
            )
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 2.0)
    return model


CASES = {
    "odd sizes": ("backbone_seg", dict(extra=_extra()), (33, 51)),
    "one pixel": ("backbone", dict(extra=_extra()), (1, 1)),
    "a row": ("backbone", dict(extra=_extra((8, 16, 16, 8), 16)), (3, 70)),
    "two modules of two": ("backbone", dict(extra=_extra((8, 8, 8, 8), 4, (2, 1, 2), 2)), (16, 24)),
    "a width of 80": ("backbone", dict(extra=_extra((8, 80, 16, 8))), (20, 28)),
    "se_lpu": ("backbone", dict(extra=_extra(), form="se_lpu"), (29, 38)),
    "some outputs": ("backbone", dict(extra=_extra(), out_indices=[1, 2]), (32, 32)),
    "other blocks": (
        "backbone",
        dict(
            extra=_extra(
                (16, 16, 32, 16), ssm_ratio=4.0, ssm_dt_rank=2, ssm_d_state=3, ssm_act_layer="relu", mlp_ratio=1.5,
                mlp_act_layer="silu",
            )
        ),
        (24, 20),
    ),
    "pose": ("backbone_pose", dict(extra=_extra(last=dict(multiscale_output=True))), (40, 24)),
    "pose, one map": ("backbone_pose", dict(extra=_extra()), (32, 64)),
    "branches with norms": ("backbone", dict(extra=_extra(), neck_channels=None), (24, 40)),
}  # fmt: skip


@pytest.mark.parametrize("backend", ["reference", pytest.param("compiled", marks=requires_extension())])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_restatement(name, backend):
    """Outputs, input gradient and every parameter's, in float64; outputs in float32 besides."""
    form, options, size = CASES[name]
    kwargs = {**SMALL, **options} if "neck_channels" not in options else options
    model = _model(form, kwargs)
    image = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    ours = {key: value for key, value in model.named_parameters() if value.requires_grad}
    state = to_upstream_state_dict("hrvmamba", form, {**model.state_dict(), **ours})
    acts = (torch.relu, F.silu) if name == "other blocks" else (F.silu, F.gelu)
    want = restated(state, image, kwargs["extra"], acts)
    with use_backend(backend):
        found = model(image)
        assert [relative_error(a, b) < 1e-10 for a, b in zip(found, want, strict=True)] == [True] * len(want)
        inputs = [image, *ours.values()]
        of_found = torch.autograd.grad(sum(out.pow(2).mean() for out in found), inputs)
    of_want = torch.autograd.grad(sum(out.pow(2).mean() for out in want), inputs)
    wrong = [key for key, a, b in zip(["image", *ours], of_found, of_want, strict=True) if relative_error(a, b) > 1e-7]
    assert not wrong
    # Norms over few channels amplify rounding, the restatement's as well.
    narrow = restated({key: value.float() for key, value in state.items()}, image.float(), kwargs["extra"], acts)
    noise = max(relative_error(a.detach(), b.detach()) for a, b in zip(narrow, want, strict=True))
    with use_backend(backend), torch.no_grad():
        for out, expected in zip(model.float()(image.detach().float()), want, strict=True):
            assert relative_error(out, expected.detach()) < max(1e-4, 4 * noise)


# ---------------------------------------------------------------- the network


def test_stochastic_depth_rises_along_the_rows_of_all_branches():
    model = HRVMamba("small", out_indices=(0,))
    found = [
        [round(block.drop_path.rate, 6) for unit in stage.units for block in unit.branches[0]]
        for stage in model.layers[1:]
    ]
    assert [rate for rates in found for rate in rates] == [round(0.2 * i / 13, 6) for i in range(14)]
    last = model.layers[3].units[1].branches
    assert {tuple(block.drop_path.rate for block in branch) for branch in last} == {(0.2 * 12 / 13, 0.2)}


def test_layer_depths():
    model = HRVMamba("nano-plain")
    depth = {name: model.get_layer_depth(name)[0] for name in dict(model.named_parameters())}
    assert depth["patch_embed.1.conv.weight"] == 0 and depth["layers.0.blocks.1.conv3.conv.weight"] == 2
    assert depth["layers.1.transition.1.conv.weight"] == 2
    assert [depth[f"layers.1.units.0.branches.1.{i}.norm0.weight"] for i in (0, 1)] == [3, 4]
    assert depth["layers.2.units.3.branches.2.1.norm0.weight"] == 12
    assert depth["layers.2.units.1.fuse.1.0.0.0.conv.weight"] == 8
    assert depth["layers.3.units.1.branches.3.1.op.Ds"] == 16
    assert depth["neck.final.conv.weight"] == depth["outnorm3.weight"] == 17


def test_outputs_have_the_channels_that_are_told():
    model = HRVMamba("nano", out_indices=(1, 3))
    assert [out.shape[1] for out in model.eval()(torch.randn(1, 3, 32, 32))] == [32, 96]
    model = HRVMamba("nano", out_indices=(1, 3), out_type="branches")
    assert [out.shape[1] for out in model.eval()(torch.randn(1, 3, 32, 32))] == [80, 32]
    assert model.neck is None and not hasattr(model, "outnorm1")
    assert (HRVMamba("base").stage_channels, HRVMamba("base").stage_strides) == ((128, 256, 512, 2048), (4, 8, 16, 32))


def test_a_classifier_starts_every_form(tmp_path):
    """What a pose estimator does not have is left out by name, all else is strict."""
    source = HRVMamba("nano", out_indices=(3,), out_norms=False)
    trunk = to_upstream_state_dict("hrvmamba", "backbone", source.state_dict())
    torch.save({"model": {**trunk, "head.weight": torch.zeros(3, 96), "head.bias": torch.zeros(3)}}, tmp_path / "c.pth")
    for options in (dict(), dict(out_type="branches"), dict(out_type="branches", out_indices=(0,))):
        model = HRVMamba("nano", init_cfg=dict(type="Pretrained", checkpoint=str(tmp_path / "c.pth")), **options)
        model.init_weights()
        own = {name: value for name, value in model.state_dict().items() if not name.startswith("outnorm")}
        assert own and all(torch.equal(value, source.state_dict()[name]) for name, value in own.items())
    torch.save({"model": {**trunk, "stage4.0.branches.0.0.norm3.weight": torch.zeros(1)}}, tmp_path / "c.pth")
    with pytest.raises(CheckpointMismatch, match="norm3"):
        HRVMamba(
            "nano", out_type="branches", init_cfg=dict(type="Pretrained", checkpoint=str(tmp_path / "c.pth"))
        ).init_weights()


def test_branches_without_fused_outputs_have_no_rows_for_them():
    names = set(HRVMamba("nano", out_type="branches", out_indices=(0,)).state_dict())
    every = set(HRVMamba("nano", out_type="branches").state_dict())
    assert {name.split(".")[:6][5] for name in every - names} == {"1", "2", "3"}
    assert all(name.startswith("layers.3.units.0.fuse.") for name in every - names) and names < every


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(dims=[24, 16]), "24 inner channels|48 channels in 2 groups"),
        (dict(dims=[6, 16]), "expected multiples of 4"),
        (dict(dims=[16], depths=[1], modules=[1], neck_dims=[8]), "at least two branches"),
        (dict(modules=[1, 2]), r"modules is \(1, 2\) for depths \(1, 1\)"),
        (dict(modules=[1]), "expected equal lengths"),
        (dict(neck_dims=[8, 10]), r"neck_dims is \(8, 10\), expected multiples of 4"),
        (dict(stem_dim=0), "stem_dim is 0"),
        (dict(dt_rank=3), "in 3 groups"),
        (dict(conv_kernel=5), "unknown key 'conv_kernel'"),
    ],
    ids=str,
)
def test_bad_options(options, message):
    arch = dict(dims=[16, 8], depths=[1, 1], modules=[1, 1], neck_dims=[8, 8], neck_out_dim=8, stem_dim=8) | options
    with pytest.raises(ConfigError, match=message):
        HRVMamba(arch, out_indices=(0,))
    with pytest.raises(ConfigError, match=r"out_type is 'branch', expected one of .*Did you mean 'branches'\?"):
        HRVMamba("nano", out_type="branch")


def test_two_branches_are_a_network():
    arch = dict(dims=[16, 8], depths=[1, 1], modules=[1, 1], neck_dims=[8, 12], neck_out_dim=20, stem_dim=8)
    outs = HRVMamba(arch, out_indices=(0, 1)).eval()(torch.randn(1, 3, 20, 36))
    assert [tuple(out.shape) for out in outs] == [(1, 8, 5, 9), (1, 20, 3, 5)]


# ---------------------------------------------------------------- upstream's arguments and files


def test_functions_are_the_key_lists():
    assert {path.name.split(".")[0] for path in PARITY.glob("*.gz")} < set(UPSTREAM_FUNCTIONS)


@pytest.mark.parametrize("name", ["nano", "tiny", "small", "base"])
def test_variants_are_upstreams(name):
    """The widths, depths and stochastic depth that the key list of the classifier has."""
    import gzip

    kwargs = json.loads(gzip.decompress((PARITY / f"hrvmamba_{name}.keys.json.gz").read_bytes()))["kwargs"]
    with torch.device("meta"):
        found = from_upstream("hrvmamba", "backbone", kwargs)
    assert found.arch == ARCHS[name if name in ARCHS and name != "nano" else f"{name}-plain"]


@pytest.mark.parametrize(
    ("form", "kwargs", "message"),
    [
        ("classifier", dict(), "extra is missing"),
        ("classifier", dict(extra=_extra(gmlp=True)), "gmlp is True, expected False"),
        ("classifier", dict(extra=_extra(forward_type="v3")), "forward_type is 'v3'"),
        ("classifier", dict(extra=_extra(ssm_conv=5)), "nine points"),
        ("classifier", dict(extra=_extra(ssm_init="v3")), "ssm_init is 'v3'"),
        ("classifier", dict(extra=_extra(dstate=2)), "unknown argument 'dstate'"),
        ("classifier", dict(extra=_extra(last=dict(mlp_ratio=4.0))), r"stage4.*another mlp_ratio"),
        ("classifier", dict(extra=_extra(last=dict(num_channels=[8, 8, 32, 16]))), "branches keep their width"),
        ("classifier", dict(extra=_extra(last=dict(num_blocks=[1, 1, 1, 2]))), r"num_blocks \(1, 1, 1, 2\)"),
        ("classifier", dict(extra=_extra(last=dict(block="BASIC"))), "expected block 'HRVmambaBlock'"),
        ("classifier", dict(extra=_extra(last=dict(multiscale_output=False))), "multiscale_output is False"),
        ("classifier", dict(extra=_extra(), norm_cfg=dict(type="GN")), "expected type 'BN' or 'SyncBN'"),
        ("classifier", dict(extra={"stage1": {}}), "extra lacks stage2, stage3, stage4"),
        ("classifier", dict(extra=3), "extra is 3"),
        ("classifier", dict(extra={**_extra(), "stage3": None}), "extra lacks stage3"),
        ("classifier", dict(extra=_extra(last=dict(num_channels=16))), "num_channels is 16, expected a list"),
        ("classifier", dict(extra=_extra(), num_classes=0), "num_classes is 0, expected a positive integer"),
        ("classifier", dict(extra=_extra(), form="pise"), r"form is 'pise'.*Did you mean 'pose'\?"),
        ("classifier_se_lpu", dict(extra=_extra(), form="cls"), "expected 'se_lpu'"),
        ("classifier", dict(extra=_extra(), pretrained="file"), "pretrained is 'file'"),
        ("classifier", dict(function="hrvmamba_large"), "function is 'hrvmamba_large'"),
    ],
    ids=str,
)
def test_bad_arguments(form, kwargs, message):
    with pytest.raises(ConfigError, match=message):
        from_upstream("hrvmamba", form, kwargs)


def test_linear_maps_stored_as_convolutions_load():
    kwargs = dict(extra=_extra(), **SMALL)
    model = from_upstream("hrvmamba", "backbone", kwargs)
    state = to_upstream_state_dict("hrvmamba", "backbone", model.state_dict())
    wide = {
        name: value[..., None, None]
        if name.endswith(("proj.weight", "fc1.weight", "fc2.weight", "mask.weight"))
        else value
        for name, value in state.items()
    }
    assert sum(value.ndim == 4 for value in wide.values()) > sum(value.ndim == 4 for value in state.values())
    again = from_upstream("hrvmamba", "backbone", kwargs)
    again.load_state_dict(convert_state_dict("hrvmamba", "backbone", wide), strict=True)
    for name, value in again.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])


def test_a_pose_estimator_starts_from_a_classifiers_entries():
    kwargs = dict(extra=_extra(), **SMALL)
    source = from_upstream("hrvmamba", "backbone", {**kwargs, "out_indices": [3]})
    state = to_upstream_state_dict("hrvmamba", "backbone", source.state_dict())
    state = {name: value for name, value in state.items() if not name.startswith("outnorm")}
    model = from_upstream("hrvmamba", "backbone_pose", kwargs)
    model.load_state_dict(convert_state_dict("hrvmamba", "backbone_pose", state, fill_out_norms=(0,)), strict=True)
    with pytest.raises(CheckpointMismatch, match="names output 4"):
        convert_state_dict("hrvmamba", "backbone", state, fill_out_norms=(4,))
