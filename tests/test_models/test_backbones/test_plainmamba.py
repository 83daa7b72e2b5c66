"""PlainMamba beyond its parity cases: walks; other options and sizes against a float64 restatement of the sheet."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mmvmamba.converters import from_upstream
from mmvmamba.errors import ConfigError
from mmvmamba.models import PlainMamba
from mmvmamba.models.layers.snake import STEPS, snake_walks

CPU = torch.device("cpu")
MOVES = {"right": (0, 1), "left": (0, -1), "up": (-1, 0), "down": (1, 0)}


def _walks_by_hand(rows: int, columns: int) -> list[list[tuple[int, int]]]:
    """Return the (row, column) of every step of the four walks, from the sheet's words."""
    by_row = [(i, j if i % 2 == 0 else columns - 1 - j) for i in range(rows) for j in range(columns)]
    by_column = [(i if j % 2 == 0 else rows - 1 - i, j) for j in range(columns) for i in range(rows)]
    return [by_row, by_row[::-1], by_column, by_column[::-1]]


def _direction(previous: tuple[int, int] | None, cell: tuple[int, int]) -> int:
    if previous is None:
        return 0
    move = (cell[0] - previous[0], cell[1] - previous[1])
    return STEPS.index(next(name for name, step in MOVES.items() if step == move))


@pytest.mark.parametrize("grid", [(2, 3), (1, 1), (1, 5), (4, 1), (3, 3), (4, 6), (5, 2)], ids=str)
def test_walks_go_from_neighbour_to_neighbour(grid):
    rows, columns = grid
    walks = snake_walks(rows, columns, CPU)
    times, steps = (t.view(rows * columns, 4) for t in (walks.times, walks.steps))
    for k, walk in enumerate(_walks_by_hand(rows, columns)):
        assert walks.orders[k].tolist() == [i * columns + j for i, j in walk]
        for t, cell in enumerate(walk):
            token = cell[0] * columns + cell[1]
            assert times[token, k] == t
            assert steps[token, k] == _direction(walk[t - 1] if t else None, cell)


def test_walks_of_the_fact_sheet():
    walks = snake_walks(2, 3, CPU)
    assert walks.orders.tolist() == [[0, 1, 2, 5, 4, 3], [3, 4, 5, 2, 1, 0], [0, 3, 4, 1, 2, 5], [5, 2, 1, 4, 3, 0]]
    steps = walks.steps.view(6, 4).t().gather(1, walks.orders)
    assert steps.tolist() == [[0, 1, 1, 4, 2, 2], [0, 1, 1, 3, 2, 2], [0, 4, 1, 3, 1, 4], [0, 3, 2, 4, 2, 3]]


# ---------------------------------------------------------------- the fact sheet once more, token by token


class Restated:
    """PlainMambaSeg from the sheet: channels first, one token at a time, no code of ours."""

    def __init__(self, model: PlainMamba) -> None:
        self.p = {name: value.double() for name, value in model.state_dict().items()}
        self.arch, self.grid, self.outs = model.arch, model.pos_grid, model.out_indices

    def batch_norm(self, x: Tensor, name: str) -> Tensor:
        p = self.p
        return F.batch_norm(
            x, p[f"{name}.running_mean"], p[f"{name}.running_var"], p[f"{name}.weight"], p[f"{name}.bias"]
        )

    def layer_norm(self, x: Tensor, name: str, eps: float) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.p[f"{name}.weight"], self.p[f"{name}.bias"], eps)

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.p[f"{name}.weight"], self.p.get(f"{name}.bias"))

    def stem(self, x: Tensor) -> Tensor:
        p, cell = self.p, self.arch.patch_size // 2
        x = F.conv2d(x, p["patch_embed.stem.0.weight"], stride=2, padding=3)
        x = F.relu(self.batch_norm(x, "patch_embed.stem.1"))
        for i in range(self.arch.num_convs):
            x = F.conv2d(x, p[f"patch_embed.convs.{3 * i}.weight"], padding=1)
            x = F.relu(self.batch_norm(x, f"patch_embed.convs.{3 * i + 1}"))
        x = F.pad(x, (0, -x.shape[3] % cell, 0, -x.shape[2] % cell))
        return F.conv2d(x, p["patch_embed.projection.weight"], p["patch_embed.projection.bias"], stride=cell)

    def mix(self, x: Tensor, layer: int, grid: tuple[int, int]) -> Tensor:
        name, p = f"layers.{layer}.mamba", self.p
        (rows, columns), n = grid, self.arch.d_state
        x, z = self.linear(x, f"{name}.in_proj").chunk(2, -1)
        maps = x.transpose(1, 2).unflatten(2, grid)
        weight = p[f"{name}.conv2d.weight"]
        u = F.silu(
            F.conv2d(maps, weight, p.get(f"{name}.conv2d.bias"), padding=weight.shape[2] // 2, groups=len(weight))
        )
        u = u.flatten(2).transpose(1, 2)
        dt, b_in, c_out = self.linear(u, f"{name}.x_proj").split([p[f"{name}.dt_proj.weight"].shape[1], n, n], -1)
        delta = F.softplus(self.linear(dt, f"{name}.dt_proj") + p[f"{name}.dt_proj.bias"])
        a = -p[f"{name}.A_log"].exp()
        y = torch.zeros_like(u)
        for walk in _walks_by_hand(rows, columns):
            state, previous = u.new_zeros(len(u), u.shape[2], n), None
            for t, cell in enumerate(walk):
                token = cell[0] * columns + cell[1]
                b_t = b_in[:, t] + p[f"{name}.direction_Bs"][_direction(previous, cell)]
                x_t, d_t = u[:, token], delta[:, t]
                state = (d_t[..., None] * a).exp() * state + (d_t * x_t)[..., None] * b_t[:, None]
                y[:, token] = y[:, token] + (state * c_out[:, None, t]).sum(-1) + p[f"{name}.D"] * x_t
                previous = cell
        out = self.linear(y * F.silu(z), f"{name}.out_proj")
        return out * p[f"{name}.gamma"] if f"{name}.gamma" in p else out

    def __call__(self, image: Tensor) -> list[Tensor]:
        maps = self.stem(image)
        grid = (maps.shape[2], maps.shape[3])
        x = maps.flatten(2).transpose(1, 2)
        if "pos_embed" in self.p:
            own = self.p["pos_embed"].unflatten(1, self.grid).permute(0, 3, 1, 2)
            if grid != self.grid:
                own = F.interpolate(own, size=grid, mode="bicubic", align_corners=False)
            x = x + own.flatten(2).transpose(1, 2)
        outs = []
        for i in range(self.arch.depth):
            x = x + self.mix(self.layer_norm(x, f"layers.{i}.norm", 1e-5), i, grid)
            if i in self.arch.dwconv_layers:
                maps = x.transpose(1, 2).unflatten(2, grid)
                weight = self.p[f"layers.{i}.dw.0.weight"]
                maps = F.conv2d(maps, weight, padding=1, groups=len(weight))
                x = F.gelu(self.batch_norm(maps, f"layers.{i}.dw.1")).flatten(2).transpose(1, 2)
            if i in self.outs:
                name = "ln1" if i == self.arch.depth - 1 else f"outnorm{i}"
                out = self.layer_norm(x, name, 1e-6) if f"{name}.weight" in self.p else x
                outs.append(out.transpose(1, 2).unflatten(2, grid))
        return outs


def _spread(model: torch.nn.Module) -> None:
    """Move every parameter and statistic so far that a mistake in its place shows."""
    generator = torch.Generator().manual_seed(1)
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            noise = torch.randn(value.shape, generator=generator)
            value.add_(noise.abs() if "running_var" in name else 0.3 * noise)


SMALL: dict[str, Any] = dict(dim=12, depth=3, num_convs=1, d_state=3)
CASES = {
    "tall": (dict(SMALL, dwconv_layers=(0,)), {}, (90, 33)),
    "wide": (dict(SMALL, dwconv_layers=(0, 2)), {}, (17, 70)),
    "one pixel": (SMALL, {}, (1, 1)),
    "no convolutions, no biases": (dict(SMALL, num_convs=0, bias=False, conv_bias=False), {}, (48, 80)),
    "other widths": (dict(SMALL, expansion=1.5, dt_rank=2, conv_kernel=3, layer_scale=0.5), {}, (48, 33)),
    "no positions, no norms": (dict(SMALL, use_pos_embed=False), dict(final_norm=False, out_norms=False), (33, 50)),
    "patches of 8, oblong": (dict(SMALL, patch_size=8), dict(img_size=(32, 48)), (40, 24)),
    "one output": (SMALL, dict(out_indices=(1,)), (40, 24)),
}


@pytest.mark.parametrize("case", CASES)
def test_like_the_fact_sheet_at_any_size(case):
    """A scan sees padding, so no padded square can be compared: maps that are not square are restated."""
    arch, options, size = CASES[case]
    model = PlainMamba(arch, **{"img_size": 64, "out_indices": (0, 1, 2), **options}).double().eval()
    with torch.no_grad():
        _spread(model)
        image = torch.randn(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        expected = Restated(model)(image)
        for out, want in zip(model(image), expected, strict=True):
            assert out.shape == want.shape
            torch.testing.assert_close(out, want, rtol=1e-9, atol=1e-9 * float(want.abs().max()))


def test_the_stem_of_an_oblong_image_is_a_part_of_that_of_a_padded_square():
    """Only without the inner convolutions: those see, behind the edge, what a norm made of the padding."""
    model = PlainMamba(dict(SMALL, num_convs=0)).double().eval()
    _spread(model)
    image = torch.randn(1, 3, 48, 96, dtype=torch.float64)
    square = F.pad(image, (0, 0, 0, 48))
    own, padded = model.patch_embed(image), model.patch_embed(square)
    torch.testing.assert_close(own, padded[:, :3], rtol=1e-12, atol=1e-12)


def test_the_mean_of_all_tokens():
    maps = PlainMamba("nano", out_indices=(3,)).eval()
    means = PlainMamba("nano", out_type="avg_featmap").eval()
    means.load_state_dict(maps.state_dict())
    image = torch.randn(2, 3, 40, 70)
    (found,), (whole,) = means(image), maps(image)
    torch.testing.assert_close(found, whole.mean((2, 3)))


def test_weights_for_another_size_of_image_are_resized():
    small, large = PlainMamba("nano", img_size=64), PlainMamba("nano", img_size=(96, 128))
    large.load_state_dict(small.state_dict())
    own = small.pos_embed.unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    want = F.interpolate(own, size=(6, 8), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
    torch.testing.assert_close(large.pos_embed, want)


def test_the_final_norm_is_left_out_where_the_model_has_none():
    source, model = PlainMamba("nano"), PlainMamba("nano", final_norm=False)
    missing, unexpected = model.load_state_dict(source.state_dict(), strict=False)
    assert not missing and not unexpected
    assert "ln1.weight" in source.state_dict() and "ln1.weight" not in model.state_dict()


def test_shuffled_training_is_reproducible_and_recomputes_the_same():
    grads = []
    for with_cp in (False, True):
        torch.manual_seed(0)
        model = PlainMamba("nano", shuffle_rate=1.0, with_cp=with_cp).train()
        torch.manual_seed(1)
        sum(out.pow(2).mean() for out in model(torch.randn(2, 3, 48, 64))).backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_options_without_a_meaning_are_refused():
    for arch, words in (
        (dict(SMALL, patch_size=15), "patch_size is 15, expected an even number"),
        (dict(SMALL, conv_kernel=4), "conv_kernel is 4, expected a positive odd"),
        (dict(SMALL, dwconv_layers=(3,)), r"dwconv_layers is \(3,\), expected layers from 0 to 2"),
        (dict(SMALL, num_convs=-1), "num_convs is -1"),
        (dict(SMALL, dt_init="random"), "dt_init is 'random'"),
    ):
        with pytest.raises(ConfigError, match=words):
            PlainMamba(arch)
    with pytest.raises(ConfigError, match="use_rms_norm is True"):
        from_upstream("plainmamba", "backbone_seg", dict(layer_cfgs=dict(use_rms_norm=True)))
    with pytest.raises(ConfigError, match="arch is 'L4'"):
        from_upstream("plainmamba", "backbone_seg", dict(arch="L4"))


def test_time_steps_start_as_named():
    zero, mamba = (PlainMamba(dict(SMALL, dt_init=kind)).layers[0].mamba.dt_proj.bias for kind in ("zero", "mamba"))
    assert not zero.any()
    steps = F.softplus(mamba)
    assert float(steps.min()) > 9e-5 and float(steps.max()) < 0.11
