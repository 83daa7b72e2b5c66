"""What is special to EfficientVMamba, and all of it against a second reading of the fact sheet in float64."""

import math

import pytest
import torch
from torch.nn import functional as F

from mmvmamba.converters import convert_state_dict, from_upstream, to_upstream_state_dict
from mmvmamba.errors import CheckpointMismatch, ConfigError
from mmvmamba.models import EfficientVMamba
from mmvmamba.models.backbones.efficientvmamba import ARCHS, ES2D, EfficientVMambaArch, merge_grids, split_grids
from mmvmamba.models.layers import PointwiseConv2d
from mmvmamba.ops import use_backend
from mmvmamba.testing import relative_error

# ---------------------------------------------------------------- the fact sheet, restated on upstream's state dict


class Restated:
    """The network channel-first, pixel by pixel and step by step, from upstream's names alone; evaluation mode."""

    def __init__(self, state, depths, out_indices, patch_size=4):
        self.state = {name: value.double() for name, value in state.items()}
        self.depths, self.out_indices, self.patch_size = depths, out_indices, patch_size

    def get(self, name):
        return self.state.get(name)

    def conv(self, x, name, **options):
        return F.conv2d(x, self.get(f"{name}.weight"), self.get(f"{name}.bias"), **options)

    def linear(self, x, name):
        return F.linear(x, self.get(f"{name}.weight"), self.get(f"{name}.bias"))

    def norm(self, x, name):
        """Layer norm over the channels of (b, c, h, w), or nothing where there is none."""
        weight = self.get(f"{name}.weight")
        if weight is None:
            return x
        x = x.permute(0, 2, 3, 1)
        return F.layer_norm(x, x.shape[-1:], weight, self.get(f"{name}.bias")).permute(0, 3, 1, 2)

    def batch_norm(self, x, name):
        mean, var = self.get(f"{name}.running_mean"), self.get(f"{name}.running_var")
        return F.batch_norm(x, mean, var, self.get(f"{name}.weight"), self.get(f"{name}.bias"))

    def scan_grid(self, x, name, k):
        """Scan a list of pixels (b, e), one step after the other, with the parameters of grid k."""
        a = -self.get(f"{name}.A_logs").exp().view(4, -1, 16)[k]
        skip = self.get(f"{name}.Ds").view(4, -1)[k]
        weight, bias = self.get(f"{name}.dt_projs_weight")[k], self.get(f"{name}.dt_projs_bias")[k]
        state, ys = x[0].new_zeros(*x[0].shape, 16), []
        for u in x:
            dt, b_in, c_out = (u @ self.get(f"{name}.x_proj_weight")[k].t()).split([weight.shape[1], 16, 16], -1)
            delta = F.softplus(dt @ weight.t() + bias)
            state = (delta[..., None] * a).exp() * state + (delta * u)[..., None] * b_in[:, None, :]
            ys.append((state * c_out[:, None, :]).sum(-1) + skip * u)
        return ys

    def atrous(self, x, name):
        h, w = x.shape[2:]
        x = F.pad(x, (0, w % 2, 0, h % 2))
        rows, columns = x.shape[2:]
        y = x.new_zeros(x.shape)
        routes = [
            [(i, j) for i in range(0, rows, 2) for j in range(0, columns, 2)],
            [(i, j) for j in range(0, columns, 2) for i in range(1, rows, 2)],
            [(i, j) for i in range(0, rows, 2) for j in range(1, columns, 2)],
            [(i, j) for j in range(1, columns, 2) for i in range(1, rows, 2)],
        ]
        for k, route in enumerate(routes):
            values = self.scan_grid([x[:, :, i, j] for i, j in route], name, k)
            for (i, j), value in zip(route, values, strict=True):
                y[:, :, i, j] = value
        return y[:, :, :h, :w]

    def es2d(self, u, name):
        x, z = self.linear(u.permute(0, 2, 3, 1), f"{name}.in_proj").permute(0, 3, 1, 2).chunk(2, 1)
        x = F.silu(self.conv(x, f"{name}.conv2d", padding=1, groups=x.shape[1]))
        y = self.norm(self.atrous(x, name), f"{name}.out_norm") * F.silu(z)
        return self.linear(y.permute(0, 2, 3, 1), f"{name}.out_proj").permute(0, 3, 1, 2)

    def weigh(self, t, name):
        g = self.norm(t, f"{name}.norm").mean((2, 3))
        s = self.linear(F.gelu(self.linear(g, f"{name}.global_reduce")), f"{name}.channel_select").sigmoid()
        return t * s[:, :, None, None]

    def scanning(self, x, name):
        u = self.norm(x, f"{name}.norm")
        c = self.conv(u, f"{name}.conv_branch.0", padding=1, groups=u.shape[1])
        c = self.conv(F.gelu(self.batch_norm(c, f"{name}.conv_branch.1")), f"{name}.conv_branch.3")
        x = x + self.weigh(self.es2d(u, f"{name}.op"), f"{name}.se") + self.weigh(c, f"{name}.se")
        if self.get(f"{name}.norm2.weight") is not None:
            t = self.norm(x, f"{name}.norm2").permute(0, 2, 3, 1)
            x = x + self.linear(F.gelu(self.linear(t, f"{name}.mlp.fc1")), f"{name}.mlp.fc2").permute(0, 3, 1, 2)
        return x

    def inverted(self, x, name):
        t = self.batch_norm(self.conv(x, f"{name}.conv_pw.0"), f"{name}.conv_pw.1").relu()
        t = self.conv(t, f"{name}.conv_dw.0", padding=1, groups=t.shape[1])
        t = self.batch_norm(t, f"{name}.conv_dw.1").relu()
        s = self.conv(t.mean((2, 3), keepdim=True), f"{name}.se.conv_reduce").relu()
        t = t * self.conv(s, f"{name}.se.conv_expand").sigmoid()
        return x + self.batch_norm(self.conv(t, f"{name}.conv_pw2.0"), f"{name}.conv_pw2.1")

    def downsample(self, x, name):
        if self.get(f"{name}.1.weight") is not None:
            return self.norm(self.conv(x, f"{name}.1", stride=2), f"{name}.3")
        x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))
        grids = [x[:, :, i::2, j::2] for i, j in ((0, 0), (1, 0), (0, 1), (1, 1))]
        x = self.norm(torch.cat(grids, 1), f"{name}.norm")
        return self.linear(x.permute(0, 2, 3, 1), f"{name}.reduction").permute(0, 3, 1, 2)

    def __call__(self, image):
        x = self.norm(self.conv(image.double(), "patch_embed.0", stride=self.patch_size), "patch_embed.2")
        outs = []
        for s, depth in enumerate(self.depths):
            for j in range(depth):
                x = self.scanning(x, f"layers.{s}.blocks.{j}") if s < 2 else self.inverted(x, f"layers.{s}.{j + 1}")
            if s in self.out_indices:
                outs.append(self.norm(x, f"outnorm{s}"))
            if s + 1 < len(self.depths):
                x = self.downsample(x, f"layers.{s}.downsample" if s < 2 else f"layers.{s}.{depth + 2}")
        return outs


@torch.no_grad()
def _stir(model, seed=0):
    """Move every entry off its initial value, so that a wrong scan or norm shows."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        noise = torch.randn(value.shape, generator=generator)
        if value.ndim > 1 and "A_logs" not in name and "dt_projs" not in name:
            value.copy_(noise * math.prod(value.shape[1:]) ** -0.5 * 1.5)
        else:
            value.add_(0.3 * noise if "running_var" not in name else noise.abs())
        if name.endswith("dt_projs_bias"):
            value.add_(3.0)


CASES = {
    "odd everywhere": ((2, 3, 29, 45), dict(dims=[8, 12, 20, 24], depths=[1, 1, 2, 1])),
    "columns odd, rows even": ((2, 3, 32, 20), dict(dims=[8, 16, 24, 32], depths=[2, 1, 1, 1])),
    "rows odd, columns even": ((2, 3, 20, 32), dict(dims=[8, 16], depths=[1, 1], out_indices=(1,))),
    "one pixel": ((2, 3, 4, 4), dict(dims=[8, 16, 24], depths=[1, 1, 1], out_indices=(0, 2))),
    "perceptrons, narrow scans": (
        (2, 3, 24, 24),
        dict(dims=[16, 24, 32], depths=[1, 1, 1], mlp_ratio=2.5, ssm_ratio=0.75),
    ),
    "2x2 convolutions": ((2, 3, 48, 64), dict(dims=[8, 16, 16, 24], depths=[1] * 4, downsample_version="v2")),
    "other stem, five stages": (
        (2, 5, 23, 31),
        dict(dims=8, depths=[1] * 5, patch_size=2, patch_norm=False, in_chans=5, out_indices=(1, 3, 4)),
    ),
}


@pytest.mark.parametrize(("size", "kwargs"), CASES.values(), ids=CASES)
def test_outputs_are_those_of_the_fact_sheet(size, kwargs):
    torch.manual_seed(0)
    depths = kwargs["depths"]
    kwargs = dict(mlp_ratio=0.0, downsample_version="v1", out_indices=tuple(range(len(depths)))) | kwargs
    model = from_upstream("efficientvmamba", "backbone", kwargs).eval()
    _stir(model)
    state = to_upstream_state_dict("efficientvmamba", "backbone", model.state_dict())
    restated = Restated(state, depths, kwargs["out_indices"], kwargs.get("patch_size", 4))
    image = torch.randn(size)
    with torch.no_grad():
        expected = restated(image)
        outs = model(image)
        with use_backend("reference"):
            exact = model.double()(image.double())
    for out, ours, want in zip(outs, exact, expected, strict=True):
        assert relative_error(ours, want) < 1e-11
        assert relative_error(out, want) < 2e-5


def test_gradients_agree_in_double_precision():
    """Of a scan on an odd map: those of the image and of every parameter."""
    torch.manual_seed(0)
    kwargs = dict(dims=[8, 16], depths=[1, 1], mlp_ratio=0.0, downsample_version="v1", out_indices=(0, 1))
    model = from_upstream("efficientvmamba", "backbone", kwargs).eval().double()
    _stir(model)
    image = torch.randn(2, 3, 20, 28, dtype=torch.float64, requires_grad=True)
    sum(out.square().mean() for out in model(image)).backward()
    own = to_upstream_state_dict("efficientvmamba", "backbone", {n: p.grad for n, p in model.named_parameters()})
    state = to_upstream_state_dict("efficientvmamba", "backbone", model.state_dict())
    restated = Restated(state, [1, 1], (0, 1))
    restated.state = {n: v.detach().requires_grad_(n in own) for n, v in restated.state.items()}
    again = image.detach().requires_grad_()
    sum(out.square().mean() for out in restated(again)).backward()
    assert relative_error(image.grad, again.grad) < 1e-10
    for name, grad in own.items():
        assert relative_error(grad, restated.state[name].grad.view_as(grad)) < 1e-9, name


# ---------------------------------------------------------------- grids


def test_grids():
    """Grid k has rows of parity k % 2 and columns of parity k // 2; merging gives the map back."""
    x = torch.randn(2, 6, 8, 3)
    grids = split_grids(x)
    assert all(torch.equal(grids[k], x[:, k % 2 :: 2, k // 2 :: 2]) for k in range(4))
    assert torch.equal(merge_grids(grids), x)


def test_a_scan_stays_in_its_grid():
    """A change of one pixel reaches later pixels of its own grid and none of the others."""
    torch.manual_seed(0)
    layer = ES2D(8).eval()
    x = torch.randn(1, 7, 10, 16)
    changed = x.clone()
    changed[0, 3, 2] += 1.0
    with torch.no_grad():
        moved = (layer.scan(x) - layer.scan(changed)).abs().sum(-1)[0] > 0
    reached = {(i, j) for i in range(7) for j in range(10) if moved[i, j]}
    # Odd rows of even columns, column by column.
    assert reached == {(i, j) for j in range(0, 10, 2) for i in range(1, 7, 2) if (j, i) >= (2, 3)}


# ---------------------------------------------------------------- options


def test_the_variants_are_those_of_the_logs():
    """S has 64 channels, whatever upstream's configs say."""
    counts = {name: sum(p.numel() for p in EfficientVMamba(name).parameters()) for name in ("tiny", "small")}
    assert counts == {"tiny": 6109332, "small": 10761584}
    assert ARCHS["small"].dims[0] == 64
    assert sum(p.numel() for p in EfficientVMamba("nano").parameters()) < 1_000_000


def test_initial_values():
    torch.manual_seed(0)
    model = EfficientVMamba("tiny")
    op = model.layers[0].blocks[0].op
    assert torch.allclose(op.A_logs, torch.arange(1.0, 17.0).log().expand(4 * 96, 16))
    assert op.Ds.eq(1).all()
    assert op.x_proj_weight.abs().max() <= 96**-0.5
    assert op.dt_projs_weight.abs().max() <= 3**-0.5
    steps = F.softplus(op.dt_projs_bias.detach())
    assert float(steps.min()) >= 1e-4 and float(steps.max()) <= 0.1001
    for module in model.modules():
        if isinstance(module, PointwiseConv2d):  # PyTorch's default, unlike the linear maps
            assert float(module.weight.std()) == pytest.approx((3 * module.in_channels) ** -0.5, rel=0.1)
    assert float(op.in_proj.weight.std()) == pytest.approx(0.02, rel=0.1)


def test_weight_decay_spares_scans_and_norms_and_nothing_else():
    model = EfficientVMamba("nano")
    spared = model.no_weight_decay()
    assert {name.rpartition(".")[2] for name in spared} == {"A_logs", "Ds", "dt_projs_bias", "weight", "bias"}
    matrices = {name for name, p in model.named_parameters() if name in spared and p.ndim > 1}
    assert {name.rpartition(".")[2] for name in matrices} == {"A_logs", "dt_projs_bias"}
    assert "layers.2.blocks.0.conv_pw.1.weight" in spared and "layers.0.blocks.0.conv_branch.1.bias" in spared


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        (dict(dims=[8, 4], depths=[1, 1]), "expected at least 8 channels in the first 2 stages"),
        (dict(dims=[8], depths=[1], ssm_ratio=3.0), "ssm_ratio is 3.0, expected a number above 0 and at most 2"),
        (dict(dims=[8], depths=[1], downsample="conv2"), "Did you mean 'conv2x2'"),
        (dict(dims=[8, 8], depths=[1]), "expected equal lengths"),
        (dict(dims=[8], depths=[1], drop_path_rate=1.0), "drop path rate is 1.0"),
    ],
    ids=str,
)
def test_impossible_archs(arch, message):
    with pytest.raises(ConfigError, match=message):
        EfficientVMamba(arch, out_indices=(0,))


def test_arch_object_is_accepted():
    arch = EfficientVMambaArch(dims=(8,), depths=(1,))
    assert EfficientVMamba(arch, out_indices=(0,)).arch is arch


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(step_size=4), "step_size is 4, expected 2"),
        (dict(downsample_version="v3"), "downsample_version is 'v3', expected one of 'v1', 'v2'"),
        (dict(norm_layer="bn"), "norm_layer is 'bn'"),
        (dict(pretrained="x.ckpt"), "this function only builds"),
        (dict(ssm_ratio=4.0), "ssm_ratio is 4.0"),
        (dict(windowsize=2), r"unknown argument 'windowsize'.*Did you mean 'window_size'\?"),
    ],
    ids=str,
)
def test_upstream_arguments_without_a_meaning_here(kwargs, message):
    with pytest.raises(ConfigError, match=message):
        from_upstream("efficientvmamba", "backbone", {"dims": 8, "depths": [1, 1], "out_indices": (0,)} | kwargs)


def test_upstream_arguments_without_effect_are_accepted():
    """As upstream's detection configs pass them, and what its class takes besides and does not pass on."""
    kwargs = dict(dims=8, depths=(1, 1, 1, 1), mlp_ratio=0.0, downsample_version="v1", pretrained=None)
    none = dict(
        ssm_d_state=8, ssm_dt_rank=1, patchembed_version="v2", window_size=7, d_state=4, dt_rank=2, drop_rate=0.5,
        forward_type="v0", ssm_conv=5, ssm_conv_bias=False, ssm_act_layer="gelu", ssm_drop_rate=0.1, ssm_rank_ratio=1.0,
        ssm_simple_init=True, mlp_act_layer="relu", mlp_drop_rate=0.1,
    )  # fmt: skip
    plain = from_upstream("efficientvmamba", "backbone", kwargs)
    assert from_upstream("efficientvmamba", "backbone", kwargs | none).arch == plain.arch


# ---------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("layout", ["state_dict of an average", "model", "ema_model", "bare", "old names"])
def test_layouts_of_official_files(layout, tmp_path):
    """As upstream reads them: with or without ``module.module.``, under one of three names or none."""
    kwargs = dict(dims=8, depths=[1, 1, 1, 1], mlp_ratio=0.0, downsample_version="v1")
    source = from_upstream("efficientvmamba", "backbone", kwargs)
    _stir(source)
    entries = to_upstream_state_dict("efficientvmamba", "backbone", source.state_dict())
    trunk = {name: value for name, value in entries.items() if not name.startswith("outnorm")}
    head = {"norm.weight": torch.ones(64), "norm.bias": torch.zeros(64), "head.weight": torch.ones(5, 64)}
    official = trunk | {f"classifier.{name}": value for name, value in head.items()}
    if layout == "old names":
        official = trunk | head
        for new, old in (("patch_embed.0", "patch_embed.proj"), ("patch_embed.2", "patch_embed.norm"),
                         (".op.", ".self_attention."), ("blocks.0.norm.", "blocks.0.ln_1.")):  # fmt: skip
            official = {name.replace(new, old): value for name, value in official.items()}
    averaged = {f"module.module.{name}": value for name, value in official.items()}
    content = {
        "state_dict of an average": {"state_dict": averaged, "epoch": 300},
        "model": {"model": official},
        "ema_model": {"ema_model": averaged},
        "bare": official,
        "old names": {"state_dict": official},
    }[layout]
    torch.save(content, tmp_path / "official.ckpt")
    model = EfficientVMamba(source.arch, init_cfg=dict(type="Pretrained", checkpoint=str(tmp_path / "official.ckpt")))
    model.init_weights()
    taken = to_upstream_state_dict("efficientvmamba", "backbone", model.state_dict())
    assert all(torch.equal(taken[name], value) for name, value in trunk.items())
    assert torch.equal(model.outnorm3.weight, torch.ones(64))


def test_entries_of_flat_stages_are_used_once():
    state = {"layers.2.1.conv_pw.0.weight": torch.zeros(8, 2, 1, 1)}
    for other in ("layers.2.blocks.0.conv_pw.0.weight", "layers.2.0.conv_pw.0.weight", "layers.2.1.conv_xy.0.weight"):
        with pytest.raises(CheckpointMismatch, match=r"expected each name once|are no entries of"):
            convert_state_dict("efficientvmamba", "backbone", state | {other: torch.zeros(8, 2, 1, 1)})
