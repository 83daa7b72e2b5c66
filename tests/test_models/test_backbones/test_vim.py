"""What is special to Vim: its numbers restated in float64 on grids of any shape, tokens, features, checkpoints."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

from mmvmamba.converters import convert_state_dict, from_upstream, to_upstream_state_dict
from mmvmamba.errors import CheckpointMismatch, ConfigError
from mmvmamba.models import Vim
from mmvmamba.models.backbones.columnar import class_token_positions, quarters
from mmvmamba.models.backbones.vim import ARCHS, VimArch
from mmvmamba.models.layers.rope import rotate, rotation
from mmvmamba.models.layers.shuffle import LayerShuffle, in_order
from mmvmamba.models.layers.tokens import insert_tokens, only_extra, only_patches, resize_position_embedding
from mmvmamba.testing import relative_error

SMALL = VimArch(dim=8, depth=4, d_state=3)


def _stirred(model: torch.nn.Module) -> torch.nn.Module:
    """Move every parameter off its initial value, so that each matters."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model.eval()


class Restated:
    """The fact sheet's words over upstream's names, in float64, one token after the other."""

    def __init__(self, state: dict[str, torch.Tensor], n: int, halve: bool = True) -> None:
        self.state = {name: value.double() for name, value in state.items()}
        self.n, self.halve = n, halve
        self.depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("layers."))

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.state[f"{name}.weight"], self.state.get(f"{name}.bias")
        if bias is None:
            return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias

    def branch(self, layer: int, xz: torch.Tensor, suffix: str) -> torch.Tensor:
        """One direction of the mixer on (b, l, 2 e); (b, l, e)."""

        def get(name: str) -> torch.Tensor:
            return self.state[f"layers.{layer}.mixer.{name}"]

        x, z = xz.chunk(2, -1)
        taps, n = get(f"conv1d{suffix}.weight")[:, 0], self.n
        padded = F.pad(x, (0, 0, taps.shape[1] - 1, 0))
        x = sum(padded[:, j : j + x.shape[1]] * taps[:, j] for j in range(taps.shape[1])) + get(f"conv1d{suffix}.bias")
        x = x * torch.sigmoid(x)
        projected = x @ get(f"x_proj{suffix}.weight").T
        dt, b_in, c_out = projected.split([projected.shape[-1] - 2 * n, n, n], dim=-1)
        delta = torch.log1p(torch.exp(dt @ get(f"dt_proj{suffix}.weight").T + get(f"dt_proj{suffix}.bias")))
        a, skip = -torch.exp(get("A_b_log" if suffix else "A_log")), get("D_b" if suffix else "D")
        state, rows = x.new_zeros(x.shape[0], x.shape[2], n), []
        for t in range(x.shape[1]):
            step = delta[:, t, :, None]
            state = torch.exp(step * a) * state + step * b_in[:, t, None] * x[:, t, :, None]
            rows.append((state * c_out[:, t, None]).sum(-1) + skip * x[:, t])
        return torch.stack(rows, 1) * z * torch.sigmoid(z)

    def mixer(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        xz = x @ self.state[f"layers.{layer}.mixer.in_proj.weight"].T
        y = self.branch(layer, xz, "") + self.branch(layer, xz.flip(1), "_b").flip(1)
        out = y / 2 if self.halve else y
        out = out @ self.state[f"layers.{layer}.mixer.out_proj.weight"].T
        return out * self.state.get(f"layers.{layer}.mixer.gamma", 1.0)

    def patches(self, image: torch.Tensor, stride: int) -> tuple[torch.Tensor, tuple[int, int]]:
        weight, bias = self.state["patch_embed.proj.weight"], self.state["patch_embed.proj.bias"]
        side = weight.shape[-1]
        image = F.pad(image, (0, max(0, side - image.shape[3]), 0, max(0, side - image.shape[2])))
        grid = ((image.shape[2] - side) // stride + 1, (image.shape[3] - side) // stride + 1)
        cut = [image[:, :, i * stride : i * stride + side, j * stride : j * stride + side]
               for i in range(grid[0]) for j in range(grid[1])]  # fmt: skip
        return torch.stack([torch.einsum("bcij,dcij->bd", piece, weight) + bias for piece in cut], 1), grid

    def turn(self, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Rotate patch (i, j): pairs of the first half of the channels by i, of the second by j."""
        half = x.shape[-1] // 2
        out = x.clone()
        for i in range(grid[0]):
            for j in range(grid[1]):
                for pair in range(x.shape[-1] // 2):
                    k = pair % (half // 2)
                    t = i / grid[0] * 14 if pair < half // 2 else j / grid[1] * 14
                    angle = torch.tensor(t * 10000.0 ** (-2 * k / half), dtype=torch.float64)
                    a, b = x[:, i * grid[1] + j, 2 * pair], x[:, i * grid[1] + j, 2 * pair + 1]
                    out[:, i * grid[1] + j, 2 * pair] = a * angle.cos() - b * angle.sin()
                    out[:, i * grid[1] + j, 2 * pair + 1] = b * angle.cos() + a * angle.sin()
        return out

    def streams(self, x: torch.Tensor, grid: tuple[int, int], rope: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return h and r behind every layer."""
        h, r, found = x, None, []
        for layer in range(self.depth):
            if rope != "none":
                h = self.turn(h, grid)
                r = self.turn(r, grid) if rope == "both" and r is not None else r
            r = h if r is None else r + h
            h = self.mixer(layer, self.norm(f"layers.{layer}.norm", r))
            found.append((h, r))
        return found

    def positions(self, grid: tuple[int, int], stored: tuple[int, int], at: int | None) -> torch.Tensor:
        """Return the embedding for another grid, its row ``at`` of the class token kept for the end."""
        rows = self.state["pos_embed"]
        token = None if at is None else rows[:, at : at + 1]
        rows = rows if at is None else torch.cat([rows[:, :at], rows[:, at + 1 :]], 1)
        maps = rows.reshape(1, *stored, -1).permute(0, 3, 1, 2).float()
        if grid != stored:
            maps = F.interpolate(maps, size=grid, mode="bicubic", align_corners=False)
        rows = maps.flatten(2).transpose(1, 2).double()
        return rows if token is None else torch.cat([rows, token], 1)


@pytest.mark.parametrize("size", [(80, 48), (33, 90), (5, 16), (64, 64)], ids=str)
@pytest.mark.parametrize("place", ["middle", "first"])
def test_the_class_token_restated(size, place):
    model = _stirred(Vim(SMALL, img_size=(64, 48), cls_token=place, out_type="cls_token"))
    image = torch.randn(2, 3, *size)
    restated = Restated(model.state_dict(), n=3)
    x, grid = restated.patches(image.double(), 16)
    patches = grid[0] * grid[1]
    m, own = (patches // 2, 12 // 2) if place == "middle" else (0, 0)
    rows = restated.positions(grid, (4, 3), own)
    x = x + rows[:, :patches]
    token = (restated.state["cls_token"] + rows[:, patches:]).expand(2, -1, -1)
    x = torch.cat([x[:, :m], token, x[:, m:]], 1)
    h, r = restated.streams(x, grid, "none")[-1]
    want = restated.norm("norm_f", r + h)[:, m]
    (found,) = model(image)
    assert found.shape == (2, 8) and relative_error(found, want) < 2e-5


@pytest.mark.parametrize(
    ("options", "arch"),
    [
        (dict(feature="hidden", last_feature="hidden"), dict()),
        (dict(feature="residual", last_feature="residual", rope="both"), dict(halve=False)),
        (dict(feature="residual", last_feature="hidden", rope="hidden"), dict(layer_scale=0.5, stride=8)),
        (dict(feature="hidden", last_feature="normed"), dict(norm="layer_norm", conv_kernel=2, dt_rank=3)),
    ],
    ids=["hidden", "rotated", "scaled", "layer norm"],
)
def test_maps_restated_on_a_grid_that_is_no_square(options, arch):
    """A scan sees all tokens before it, so no padded square gives the same: the sheet's words are the measure."""
    arch = VimArch(dim=8, depth=4, d_state=3, **arch)
    out_indices = (0, 1, 3)
    model = _stirred(Vim(arch, img_size=64, cls_token="none", out_indices=out_indices, **options))  # noqa: S106
    image = torch.randn(2, 3, 40, 56)
    restated = Restated(model.state_dict(), n=3, halve=arch.halve)
    x, grid = restated.patches(image.double(), arch.stride)
    stored = 4 if arch.stride == 16 else 7
    rope = options.get("rope", "none")
    streams = restated.streams(x + restated.positions(grid, (stored, stored), None), grid, rope)
    for i, found in zip(out_indices, model(image), strict=True):
        h, r = streams[i]
        kind = options["last_feature"] if i == 3 else options["feature"]
        if kind == "residual" and i < 3:
            # What the next layer works on, which is turned once more.
            h = restated.turn(h, grid) if rope != "none" else h
            r = restated.turn(r, grid) if rope == "both" else r
        want = {"hidden": h, "residual": r + h, "normed": restated.norm("norm_f", r + h) if kind == "normed" else h}[
            kind
        ]
        want = want.reshape(2, *grid, 8).permute(0, 3, 1, 2)
        assert found.shape == want.shape and found.is_contiguous()
        assert relative_error(found, want) < 2e-5, (i, kind)


def test_the_stem_on_a_zero_padded_square_is_cropped():
    """Of the stem and the position embedding this holds: patches beyond the image are others' business."""
    model = _stirred(Vim(SMALL, img_size=64, cls_token="none"))  # noqa: S106
    image = torch.randn(1, 3, 32, 64)
    square = F.pad(image, (0, 0, 0, 32))
    small, large = model.patch_embed(image), model.patch_embed(square)
    torch.testing.assert_close(small, large[:, :2])


def test_mean_of_the_patches():
    model = _stirred(Vim(SMALL, out_type="avg_featmap", out_indices=(0, 3)))
    maps = _stirred(Vim(SMALL, out_indices=(0, 3)))
    maps.load_state_dict(model.state_dict())
    image = torch.randn(2, 3, 64, 48)
    for vector, each in zip(model(image), maps(image), strict=True):
        torch.testing.assert_close(vector, each.mean((2, 3)))


@pytest.mark.parametrize("at", [(), (0,), (2,), (5,), (1, 3, 6)], ids=str)
def test_tokens_go_in_and_come_out(at):
    patches, extra = torch.randn(2, 5, 3), torch.randn(2, len(at), 3)
    x = insert_tokens(patches, extra, at)
    assert x.shape == (2, 5 + len(at), 3) and torch.equal(only_patches(x, at), patches)
    if at:
        assert torch.equal(only_extra(x, at), extra)


def test_positions_of_the_class_token_and_quarters():
    assert [class_token_positions("middle", n) for n in (1, 4, 15)] == [(0,), (2,), (7,)]
    assert (quarters(24), quarters(36), quarters(2), quarters(1)) == (
        (5, 11, 17, 23), (8, 17, 26, 35), (0, 1), (0,))  # fmt: skip


def test_resizing_keeps_what_fits_and_half_precision():
    rows = torch.randn(1, 6, 4)
    assert resize_position_embedding(rows, (2, 3), (2, 3)) is rows
    wide = resize_position_embedding(rows, (2, 3), (4, 6))
    half = resize_position_embedding(rows.bfloat16(), (2, 3), (4, 6))
    assert half.dtype == torch.bfloat16 and relative_error(half.float(), wide) < 2e-2


def test_rotations_keep_lengths():
    x = torch.randn(2, 6, 8)
    by = rotation(2, 3, 8, x.device, torch.float32)
    torch.testing.assert_close(rotate(x, by).norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(rotate(x, by)[:, 0], x[:, 0])
    with pytest.raises(ConfigError, match="expected a multiple of 4"):
        Vim(VimArch(dim=6, depth=1), rope="both")


# ---------------------------------------------------------------- shuffle


def test_a_shuffled_layer_sees_other_places_and_puts_them_back():
    x, permutation = torch.randn(2, 5, 3), torch.tensor([3, 0, 4, 1, 2])
    seen = []
    out = in_order(lambda tokens: seen.append(tokens) or tokens * 2, x, permutation)
    assert torch.equal(seen[0], x[:, permutation]) and torch.equal(out, x * 2)


def test_draws_are_those_of_upstream():
    """Per layer one number, and where it is small enough a permutation, in this order."""
    shuffle = LayerShuffle(0.5, 3).train()
    x = torch.zeros(2, 7, 1)
    torch.manual_seed(3)
    drawn = [shuffle.draw(layer, x) for layer in range(3) for _ in range(20)]
    torch.manual_seed(3)
    for found, rate in zip(drawn, [rate for rate in (0.0, 0.25, 0.5) for _ in range(20)], strict=True):
        wanted = torch.randperm(7) if torch.rand(1) < rate else None
        assert (found is None) if wanted is None else torch.equal(found, wanted)
    assert any(found is not None for found in drawn) and all(found is None for found in drawn[:20])
    before = torch.get_rng_state()
    assert shuffle.eval().draw(2, x) is None and torch.equal(before, torch.get_rng_state())
    with pytest.raises(ConfigError, match="shuffle_rate is 1.5"):
        Vim(SMALL, shuffle_rate=1.5)


def test_shuffle_is_off_in_evaluation_and_reproducible_with_checkpointing():
    plain = Vim("nano")
    model = Vim("nano", shuffle_rate=1.0, drop_path_rate=0.3)
    cheap = Vim("nano", shuffle_rate=1.0, drop_path_rate=0.3, with_cp=True)
    for other in (model, cheap):
        other.load_state_dict(plain.state_dict())
    image = torch.randn(2, 3, 64, 64)
    for a, b in zip(plain.eval()(image), model.eval()(image), strict=True):
        assert torch.equal(a, b)
    losses = []
    for other in (model.train(), cheap.train()):
        torch.manual_seed(9)
        loss = sum(out.square().mean() for out in other(image))
        loss.backward()
        losses.append(loss.detach())
    assert torch.equal(*losses)
    for a, b in zip(model.parameters(), cheap.parameters(), strict=True):
        assert a.grad is None if b.grad is None else torch.equal(a.grad, b.grad)
    torch.manual_seed(10)
    assert not torch.equal(sum(out.square().mean() for out in model(image)).detach(), losses[0])


# ---------------------------------------------------------------- checkpoints and arguments


def test_a_classifier_starts_a_feature_extractor_of_another_size(tmp_path):
    """The class token goes with the row where it stands, the middle one; all else stays, at the new size."""
    source = _stirred(Vim("nano", img_size=64))
    torch.save({"model": {**source.state_dict(), "head.weight": torch.zeros(5, 24), "head.bias": torch.zeros(5)}},
               tmp_path / "classifier.pth")  # fmt: skip
    init = dict(type="Pretrained", checkpoint=str(tmp_path / "classifier.pth"))
    rows = only_patches(source.pos_embed, (8,))
    for img_size, grid in ((64, (4, 4)), (96, (6, 6)), ((32, 80), (2, 5))):
        model = Vim("nano", img_size=img_size, cls_token="none", last_feature="residual", init_cfg=init)  # noqa: S106
        model.init_weights()
        assert torch.equal(model.pos_embed, resize_position_embedding(rows, (4, 4), grid))
        assert torch.equal(model.layers[2].mixer.A_b_log, source.layers[2].mixer.A_b_log)
    larger = Vim("nano", img_size=96, init_cfg=init)
    larger.init_weights()
    assert torch.equal(larger.cls_token, source.cls_token)
    assert torch.equal(larger.pos_embed[:, 18], source.pos_embed[:, 8])
    wider = Vim(VimArch(48, 4, d_state=8), init_cfg=init)
    with pytest.raises(CheckpointMismatch, match="pos_embed"):
        wider.init_weights()


def test_a_file_in_half_precision_without_use_for_its_norm():
    """Rows are resized in the type of the model; a model without final norm leaves that of the file out."""
    source = _stirred(Vim("nano", img_size=64)).half()
    target = Vim("nano", img_size=96, cls_token="none", last_feature="residual", final_norm=False)  # noqa: S106
    target.load_state_dict(source.state_dict())
    rows = only_patches(source.pos_embed.float(), (8,))
    assert torch.equal(target.pos_embed, resize_position_embedding(rows, (4, 4), (6, 6)))


def test_rows_of_no_square_fit_their_own_grid_only():
    source = Vim(SMALL, img_size=(64, 48))
    model = Vim(SMALL, img_size=(64, 48), cls_token="none")  # noqa: S106
    model.load_state_dict(source.state_dict())
    assert torch.equal(model.pos_embed, only_patches(source.pos_embed, (6,)))
    with pytest.raises(RuntimeError, match="size mismatch for pos_embed"):
        Vim(SMALL, img_size=64).load_state_dict(source.state_dict())


def test_upstream_s_tables_come_and_go():
    kwargs = dict(img_size=64, embed_dim=8, depth=2, out_indices=[0, 1], if_rope=True, if_rope_residual=True)
    model = from_upstream("vim", "backbone_seg", kwargs)
    state = to_upstream_state_dict("vim", "backbone_seg", model.state_dict())
    assert [tuple(state[f"rope.freqs_{name}"].shape) for name in ("cos", "sin")] == [(16, 8), (16, 8)]
    model.load_state_dict(convert_state_dict("vim", "backbone_seg", state))
    trunk = {name: value for name, value in state.items() if not name.startswith("fpn")}
    bare = Vim(VimArch(8, 2), img_size=64, cls_token="none", rope="both")  # noqa: S106
    bare.load_state_dict(convert_state_dict("vim", "backbone", trunk))


def test_a_trunk_is_a_classifier_without_its_head():
    state = {**Vim(SMALL, img_size=64).state_dict(), "head.weight": torch.zeros(5, 8), "head.bias": torch.zeros(5)}
    assert not any(name.startswith("head") for name in convert_state_dict("vim", "backbone", state))


def test_segmentor_with_one_feature_and_without_pyramid():
    """Upstream takes a single feature for all four levels; names of files do not depend on it."""
    kwargs = dict(img_size=64, embed_dim=8, depth=3, use_residual_as_feature=True, last_layer_process="add & norm")
    model = _stirred(from_upstream("vim", "backbone_seg", dict(kwargs, out_indices=[1], use_checkpoint=False)))
    image = torch.randn(2, 3, 64, 64)
    (feature,), outs = model.backbone(image), model(image)
    assert [out.shape[2:] for out in outs] == [(16, 16), (8, 8), (4, 4), (2, 2)]
    assert torch.equal(outs[2], feature)
    bare = from_upstream("vim", "backbone_seg", dict(kwargs, out_indices=[1, 2], if_fpn=False)).eval()
    state = to_upstream_state_dict("vim", "backbone_seg", model.state_dict())
    trunk = {name: value for name, value in state.items() if not name.startswith("fpn")}
    bare.load_state_dict(convert_state_dict("vim", "backbone_seg", trunk))
    maps = bare(image)
    assert torch.equal(maps[0], feature)
    assert maps[1].shape == (2, 8, 4, 4)


def test_a_classifier_without_class_token_pools():
    model = _stirred(from_upstream("vim", "classifier", dict(img_size=64, embed_dim=8, depth=2, if_cls_token=False,
                                                             if_rope=True, num_classes=3)))  # fmt: skip
    image = torch.randn(2, 3, 64, 64)
    backbone = Vim(VimArch(8, 2), img_size=64, cls_token="none", rope="hidden", out_indices=(1,)).eval()  # noqa: S106
    backbone.load_state_dict(model.backbone.state_dict())
    torch.testing.assert_close(model(image), model.head.fc(backbone(image)[0].mean((2, 3))))


@pytest.mark.parametrize(
    ("form", "kwargs", "match"),
    [
        ("classifier", dict(bimamba_type="v1"), "bimamba_type is 'v1'"),
        ("classifier", dict(if_bidirectional=True), "if_bidirectional is True"),
        ("classifier", dict(use_double_cls_token=True), "use_double_cls_token is True"),
        ("classifier", dict(flip_img_sequences_ratio=0.5), "flip_img_sequences_ratio is 0.5"),
        ("classifier", dict(if_rope=True), "if_rope is True with the class token in the middle"),
        ("classifier", dict(if_cls_token=False, final_pool_type="none"), "final_pool_type is 'none'"),
        ("classifier", dict(embed_dims=8), "unknown argument 'embed_dims'.*Did you mean 'embed_dim'"),
        ("backbone_seg", dict(last_layer_process="sum"), "last_layer_process is 'sum'"),
        ("backbone_seg", dict(if_rope_residual=True), "if_rope_residual is True but if_rope is False"),
        ("backbone_det", dict(last_layer_process="add & norm"), "last_layer_process is 'add & norm'"),
        ("backbone_det", dict(pretrained="x.pth"), "pretrained is 'x.pth'"),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else next(iter(value)),
)
def test_what_upstream_has_and_no_model_uses_is_refused(form, kwargs, match):
    with pytest.raises(ConfigError, match=match):
        from_upstream("vim", form, {"embed_dim": 8, "depth": 1, **kwargs})


def test_contradictions_are_refused():
    with pytest.raises(ConfigError, match="out_type is 'cls_token' but cls_token is 'none'"):
        Vim("nano", cls_token="none", out_type="cls_token")  # noqa: S106
    with pytest.raises(ConfigError, match="final_norm is False"):
        Vim("nano", final_norm=False)
    with pytest.raises(ConfigError, match="img_size is 0"):
        Vim("nano", img_size=0)
    with pytest.raises(ConfigError, match="arch: depth is 0"):
        VimArch(dim=8, depth=0)


def test_initial_values():
    """Those of the sheet: time steps of the first direction in their range, of the second from a bias of 0."""
    torch.manual_seed(0)
    model = Vim(VimArch(64, 6))
    mixer = model.layers[0].mixer
    steps = F.softplus(mixer.dt_proj.bias.detach())
    assert float(steps.min()) > 9e-4 and float(steps.max()) < 0.11
    assert float(mixer.dt_proj_b.bias.abs().max()) == 0.0
    bound = 128**-0.5 / 6**0.5
    assert 0.9 * bound < float(mixer.out_proj.weight.abs().max()) <= bound
    torch.testing.assert_close(mixer.A_b_log.exp()[5], torch.arange(1.0, 17.0))
    assert torch.equal(mixer.D, torch.ones(128)) and torch.equal(model.norm_f.weight, torch.ones(64))
    assert [block.drop_path.rate for block in Vim(VimArch(8, 4, 0.3)).layers] == pytest.approx([0.0, 0.0, 0.1, 0.2])
    assert Vim(VimArch(8, 4, 0.3)).drop_path.rate == pytest.approx(0.3)


def test_no_decay_for_what_says_where_and_how_fast():
    names = Vim("nano").no_weight_decay()
    for name in ("cls_token", "pos_embed", "norm_f.weight", "layers.0.norm.weight", "layers.3.mixer.A_b_log",
                 "layers.1.mixer.D_b", "layers.1.mixer.dt_proj_b.bias", "layers.1.mixer.conv1d.bias"):  # fmt: skip
        assert name in names
    assert not {"patch_embed.proj.weight", "layers.0.mixer.in_proj.weight", "layers.0.mixer.dt_proj.weight"} & names


def test_the_residual_stays_wide_in_half_precision():
    model = copy.deepcopy(_stirred(Vim("nano", feature="residual"))).bfloat16()
    seen = []
    model.layers[2].register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].dtype))
    outs = model(torch.randn(1, 3, 64, 64).bfloat16())
    assert seen == [torch.float32] and {out.dtype for out in outs} == {torch.bfloat16}


def test_variants_have_the_published_numbers_of_parameters():
    head = {192: 193, 384: 385, 768: 769}
    for name, millions in (
        ("tiny", 7.15),
        ("tiny-plus", 7.25),
        ("small", 25.80),
        ("small-plus", 26.00),
        ("base", 97.60),
    ):
        with torch.device("meta"):
            model = Vim(name)
        total = sum(p.numel() for p in model.parameters()) + 1000 * head[ARCHS[name].dim]
        assert round(total / 1e6, 2) == millions
