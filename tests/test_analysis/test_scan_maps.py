"""Scan maps against derivatives of the operators, computed in float64 by PyTorch, and what must hold of them."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mmvmamba.analysis.scan_capture import ScanCall, watch_scans
from mmvmamba.analysis.scan_maps import default_layer, heat_map, overlay, scan_layers, scan_map, scan_maps
from mmvmamba.analysis.scan_places import placed_routes
from mmvmamba.analysis.scan_weights import KINDS, head_weights, routes_of, selective_weights
from mmvmamba.errors import ConfigError, OpInputError
from mmvmamba.models.backbones import FAMILIES
from mmvmamba.ops import CROSS_SCAN, scan2d, selective_scan, ssd, ssd_non_causal, ssd_read, ssd_state, use_backend

H, W, D, N, R = 3, 4, 5, 2, 3
PIXELS = H * W


class Scan2d(nn.Module):
    """A layer with fixed projections, so that its output is linear in its input."""

    def __init__(self, orders=CROSS_SCAN, positive=False, softplus=True):
        super().__init__()
        k = len(orders)
        draw = torch.rand if positive else torch.randn
        self.projections = draw(1, H, W, k, R + 2 * N, dtype=torch.float64)
        self.dt_weight = torch.rand(k, D, R, dtype=torch.float64)
        self.dt_bias = torch.randn(k, D, dtype=torch.float64)
        self.A = -torch.rand(k, D, N, dtype=torch.float64) - 0.1
        self.orders, self.softplus = orders, softplus

    def forward(self, x: Tensor) -> Tensor:  # (b, h, w, d)
        return scan2d(
            x, self.projections, self.dt_weight, self.dt_bias, self.A, orders=self.orders, delta_softplus=self.softplus
        )


class AsNetwork(nn.Module):
    """Takes an image (b, c, h, w)."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, image: Tensor) -> Tensor:
        return self.layer(image.permute(0, 2, 3, 1))


def image(rows=H, columns=W) -> Tensor:
    return torch.randn(1, D, rows, columns, dtype=torch.float64)


def calls_of(model: nn.Module, *inputs: Tensor) -> list[ScanCall]:
    calls: list[ScanCall] = []
    with torch.no_grad(), watch_scans(model, calls.append):
        model(*inputs)
    return calls


def jacobian(layer, pixel: int) -> Tensor:
    """Derivative of each channel of a pixel with respect to the same channel of all pixels: (pixels, d)."""
    x = torch.randn(1, H, W, D, dtype=torch.float64, requires_grad=True)
    rows = []
    for channel in range(D):
        out = layer(x).view(PIXELS, D)[pixel, channel]
        (grad,) = torch.autograd.grad(out, x)
        rows.append(grad.view(PIXELS, D)[:, channel])
    return torch.stack(rows, 1)


@pytest.mark.parametrize("softplus", [True, False])
@pytest.mark.parametrize("order", CROSS_SCAN, ids=lambda order: order.name)
def test_weights_are_the_derivatives_of_the_operator(order, softplus):
    layer = Scan2d((order,), softplus=softplus)
    (call,) = calls_of(AsNetwork(layer), image())
    (route,) = routes_of(call)
    for step in range(PIXELS):
        pixel = int(route.writes[step])
        ours = torch.zeros(PIXELS, D, dtype=torch.float64)
        ours[route.reads[: step + 1]] = route.weights(step).weight
        torch.testing.assert_close(ours, jacobian(layer, pixel))


def test_weights_times_inputs_are_the_output_on_every_direction_summed():
    layer = Scan2d()
    x = image()
    out = AsNetwork(layer)(x).view(PIXELS, D)
    (call,) = calls_of(AsNetwork(layer), x)
    inputs = x.permute(0, 2, 3, 1).reshape(PIXELS, D)
    summed = torch.zeros(PIXELS, D, dtype=torch.float64)
    for route in routes_of(call):
        for step in range(PIXELS):
            weights = route.weights(step).weight
            summed[route.writes[step]] += (weights * inputs[route.reads[: step + 1]]).sum(0)
    torch.testing.assert_close(summed, out)


def test_the_kinds_are_the_products_of_the_paper():
    """With w written out as the paper has it: w_t = exp(A (delta_1 + ... + delta_t))."""
    delta = torch.rand(6, D, dtype=torch.float64)
    A = -torch.rand(D, N, dtype=torch.float64)
    B, C = torch.randn(2, 6, N, dtype=torch.float64).unbind(0)
    got = selective_weights(delta, A, B, C, 4)
    w = torch.exp(delta.cumsum(0).unsqueeze(-1) * A)  # (l, d, n)
    torch.testing.assert_close(got.qk.squeeze(1), B[:5] @ C[4])
    paper = ((C[4] * w[4]).unsqueeze(0) * (B.unsqueeze(1) / w)[:5]).sum(-1)
    torch.testing.assert_close(got.decayed, paper)
    torch.testing.assert_close(got.weight, paper * delta[:5])


def test_strong_decays_do_not_overflow():
    delta = torch.full((500, D), 50.0)
    B = C = torch.ones(500, N)
    got = selective_weights(delta, -torch.ones(D, N), B, C, 499)
    assert all(bool(values.isfinite().all()) for values in got)
    assert got.decayed[-1].tolist() == [N] * D and got.decayed[:-1].sum() < 1e-9


def test_nothing_comes_from_later_steps():
    maps = scan_map(AsNetwork(Scan2d()), image(), (1, 2))
    here = 1 * W + 2
    row, column, row_back, column_back = (maps.maps["weight"][i].flatten() for i in range(4))
    pixels = torch.arange(PIXELS)
    along_columns = pixels % W * H + pixels // W
    assert not row[pixels > here].any() and row[pixels <= here].all()
    assert not row_back[pixels < here].any() and row_back[pixels >= here].all()
    assert not column[along_columns > along_columns[here]].any()
    assert not column_back[along_columns < along_columns[here]].any()


def test_merged_is_the_sum_and_signed_is_the_mean_of_the_derivative():
    layer = Scan2d()
    maps = scan_map(AsNetwork(layer), image(), (2, 1), "layer", signed=True)
    torch.testing.assert_close(maps.merged(), maps.maps["weight"].sum(0))
    mean = jacobian(layer, 2 * W + 1).mean(1).view(H, W)
    torch.testing.assert_close(maps.merged(), mean.float())


def test_positive_projections_make_all_maps_positive():
    network, x = AsNetwork(Scan2d(positive=True)), image()
    signed, magnitudes = scan_map(network, x, (0, 3), signed=True), scan_map(network, x, (0, 3))
    for kind in KINDS:
        assert bool((signed.maps[kind] >= 0).all())
        torch.testing.assert_close(signed.maps[kind], magnitudes.maps[kind])


def test_a_flipped_map_on_the_flipped_route_is_the_flipped_map():
    forward, backward = Scan2d((CROSS_SCAN[0],)), Scan2d((CROSS_SCAN[2],))
    backward.__dict__.update({name: value for name, value in vars(forward).items() if isinstance(value, Tensor)})
    backward.projections = forward.projections.flip(1, 2)
    x = image()
    here = scan_map(AsNetwork(forward), x, (2, 1))
    there = scan_map(AsNetwork(backward), x.flip(2, 3), (H - 1 - 2, W - 1 - 1))
    for kind in KINDS:
        torch.testing.assert_close(there.maps[kind].flip(1, 2), here.maps[kind])


class Ssd(nn.Module):
    def __init__(self, causal: bool, positions: int = PIXELS, heads: int = 4, groups: int = 2):
        super().__init__()
        self.dt = torch.randn(1, positions, heads, dtype=torch.float64)
        self.decay = -torch.rand(heads, dtype=torch.float64)
        self.B, self.C = torch.randn(2, 1, positions, groups, N, dtype=torch.float64).unbind(0)
        self.causal, self.heads = causal, heads

    def forward(self, x: Tensor) -> Tensor:  # (b, h, w, k)
        tokens = x.flatten(1, 2).unsqueeze(-1)
        if self.causal:
            return ssd(tokens, self.dt, self.decay, self.B, self.C, dt_softplus=True)
        return ssd_non_causal(tokens, self.dt, self.B, self.C)


@pytest.mark.parametrize("causal", [True, False])
def test_weights_of_state_space_duality_are_its_derivatives(causal):
    layer = Ssd(causal)
    x = torch.randn(1, H, W, 4, dtype=torch.float64, requires_grad=True)
    (call,) = calls_of(layer, x)
    (route,) = routes_of(call)
    assert route.ordered is causal
    for step in (0, 5, PIXELS - 1):
        out = layer(x)[0, step, :, 0]
        grads = [torch.autograd.grad(out[head], x, retain_graph=True)[0].view(PIXELS, 4)[:, head] for head in range(4)]
        weights = route.weights(step).weight
        wanted = torch.stack(grads, 1)
        torch.testing.assert_close(weights, wanted[: weights.shape[0]])
        assert not wanted[weights.shape[0] :].any()


def test_weights_of_one_head_of_mamba_2_are_those_of_mamba():
    delta = torch.rand(5, 1, dtype=torch.float64)
    B, C = torch.randn(2, 5, N, dtype=torch.float64).unbind(0)
    A = -torch.rand(1, dtype=torch.float64)
    wanted = selective_weights(delta, A[:, None].expand(1, N), B, C, 4)
    for got, value in zip(head_weights(delta, A, B[:, None], C[:, None], 4), wanted, strict=True):
        torch.testing.assert_close(got, value)


class StatesAndReading(nn.Module):
    def __init__(self):
        super().__init__()
        self.B, self.C = torch.randn(2, 1, PIXELS, 1, 7, dtype=torch.float64).unbind(0)

    def forward(self, x: Tensor) -> Tensor:  # (b, h, w, c)
        return ssd_read(ssd_state(x.flatten(1, 2).unsqueeze(2), None, self.B), self.C)


def test_states_and_their_reading_are_one_map():
    layer = StatesAndReading()
    x = torch.randn(1, H, W, D, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x)[0, W + 2, 0, 0], x)
    assert [found.directions for found in scan_layers(AsNetwork(layer), x.permute(0, 3, 1, 2))] == [("all tokens",)]
    with torch.no_grad():
        maps = scan_map(AsNetwork(layer), x.permute(0, 3, 1, 2), (1, 2), "layer", signed=True)
    torch.testing.assert_close(maps.merged(), grad[0, ..., 0].float())


class Selective(nn.Module):
    def __init__(self):
        super().__init__()
        self.delta, self.A = torch.randn(1, D * 2, PIXELS, dtype=torch.float64), -torch.rand(2 * D, N).double()
        self.B, self.C = torch.randn(2, 1, 2, N, PIXELS, dtype=torch.float64).unbind(0)

    def forward(self, x: Tensor) -> Tensor:  # (b, h, w, d)
        u = x.flatten(1, 2).transpose(1, 2).repeat(1, 2, 1)
        return selective_scan(u, self.delta, self.A, self.B, self.C, delta_softplus=True)


def test_weights_of_groups_of_the_selective_scan():
    layer, x = Selective(), torch.randn(1, H, W, D, dtype=torch.float64)
    out = layer(x)
    (call,) = calls_of(layer, x)
    inputs = x.view(PIXELS, D)
    for number, route in enumerate(routes_of(call)):
        for step in (0, 7, PIXELS - 1):
            got = (route.weights(step).weight * inputs[: step + 1]).sum(0)
            torch.testing.assert_close(got, out[0, number * D : (number + 1) * D, step])


SCANNING = [family for family in FAMILIES if family != "mambaout"]


@pytest.mark.parametrize("family", SCANNING)
def test_every_family_has_maps_on_which_nothing_is_lost(family):
    """What lies on the map and on other tokens is all that the steps of the query gave."""
    model = FAMILIES[family]("nano").eval()
    picture = torch.randn(1, 3, 64, 96)
    layers = scan_layers(model, picture)
    chosen = default_layer(layers)
    maps = scan_map(model, picture, (40, 50), chosen.name)
    assert maps.directions == chosen.directions
    assert maps.maps["weight"].shape == (len(chosen.directions), chosen.rows, chosen.columns)
    assert maps.cell == (40 * chosen.rows // 64, 50 * chosen.columns // 96)
    assert bool((maps.maps["weight"] >= 0).all()) and maps.merged().sum() > 0

    totals: dict[str, float] = dict.fromkeys(chosen.directions, 0.0)

    def see(call: ScanCall) -> None:
        if call.layer == chosen.name and call.operator == "scan2d":
            for route, places in placed_routes(call):
                at = torch.isin(route.writes, places.of_cell(*maps.cell)).nonzero().flatten()
                totals[route.name] += sum(float(route.weights(int(t)).weight.abs().mean(1).sum()) for t in at)

    with torch.no_grad(), watch_scans(model, see):
        model(picture)
    if any(totals.values()):
        got = maps.maps["weight"].sum((1, 2)) + maps.elsewhere["weight"]
        torch.testing.assert_close(got, torch.tensor(list(totals.values())), rtol=1e-4, atol=1e-9)


def without_skip(call: ScanCall) -> Tensor:
    """The output of an operator on the first image of the arguments it was called with, without skip and gate."""
    arguments = list(call.arguments)
    for place in {"scan2d": [5], "selective_scan": [5], "ssd": [5], "ssd_non_causal": [4]}[call.operator]:
        arguments[place] = None
    return getattr(torch.ops.mmvmamba, call.operator)(*arguments)[0][0].double()


def from_weights(call: ScanCall, position: int) -> Tensor:
    """The output of an operator at a position by the weights of its routes and its inputs."""
    x = call.arguments[0][0].double()
    if call.operator == "selective_scan":
        x = x.t()  # (l, d); every group has its own channels
    x = x.flatten(0, 1) if call.operator == "scan2d" else x
    own = call.operator == "scan2d" and x.dim() == 3  # (l, k, d): every route has an input of its own
    routes = routes_of(call)
    parts = []
    for i, route in enumerate(routes):
        inputs = x.chunk(len(routes), 1)[i] if call.operator == "selective_scan" else x[:, i] if own else x
        total = torch.zeros_like(inputs[0])
        for step in (route.writes == position).nonzero().flatten().tolist():
            weights = route.weights(step).weight.double()
            weights = weights.unsqueeze(-1) if inputs.dim() == 3 else weights  # heads (l, k, p)
            total += (weights * inputs[route.reads[: weights.shape[0]]]).sum(0)
        parts.append(total)
    return torch.cat(parts) if call.operator == "selective_scan" else torch.stack(parts).sum(0)


@pytest.mark.parametrize("family", [family for family in SCANNING if family != "efficientvim"])
def test_weights_explain_what_the_layers_of_every_family_put_out(family):
    """With the routes, biases and groups of the networks themselves; EfficientViM works on its states in between."""
    torch.manual_seed(0)
    seen: list[str] = []

    def see(call: ScanCall) -> None:
        out = without_skip(call)
        out = {"scan2d": lambda: out.flatten(0, 1), "selective_scan": out.t}.get(call.operator, lambda: out)()
        for position in (0, len(out) // 3, len(out) - 1):
            got = from_weights(call, position)
            assert (got - out[position]).abs().max() <= 1e-4 * out.abs().max(), (call.layer, call.operator, position)
        seen.append(call.operator)

    model = FAMILIES[family]("nano").eval()
    with torch.no_grad(), watch_scans(model, see):
        model(torch.randn(1, 3, 64, 96))
    assert seen


def test_an_atrous_scan_reads_its_own_grid_alone():
    model = FAMILIES["efficientvmamba"]("nano").eval()
    maps = scan_map(model, torch.randn(1, 3, 60, 96), (25, 44), "layers.0.blocks.0.op")  # 15 x 24 cells: padded to 16
    row, column = maps.cell
    assert (maps.maps["weight"].shape[1:]) == (15, 24)
    own = torch.zeros(15, 24, dtype=torch.bool)
    own[row % 2 :: 2, column % 2 :: 2] = True
    assert not maps.merged()[~own].any() and maps.merged()[row, column] > 0
    assert [bool(values.any()) for values in maps.maps["weight"]].count(True) == 1


def test_cascade_scans_the_row_then_the_column_of_the_query():
    model = FAMILIES["vmamba"](dict(dims=(16, 16, 16, 16), depths=(1, 1, 1, 1), scan="cascade")).eval()
    maps = scan_map(model, torch.randn(1, 3, 48, 64), (21, 30), "layers.0.blocks.0.op")
    assert maps.directions == ("rows, forwards", "rows, backwards", "columns, forwards", "columns, backwards")
    row, column = maps.cell
    cells = [values.nonzero().tolist() for values in maps.maps["weight"]]
    assert cells[0] == [[row, j] for j in range(column + 1)]
    assert cells[1] == [[row, j] for j in range(16 - 1 - column, 16)]
    assert cells[2] == [[i, column] for i in range(row + 1)]
    assert cells[3] == [[i, column] for i in range(12 - 1 - row, 12)]


def test_class_tokens_are_counted_beside_the_map():
    model = FAMILIES["vim"]("nano").eval()
    maps = scan_map(model, torch.randn(1, 3, 64, 96), (63, 95))
    forth, back = maps.elsewhere["weight"].tolist()
    assert forth > 0  # the last patch has seen the class token in the middle
    assert back == 0  # and is the first of the way back


def test_maps_do_not_depend_on_the_backend_that_runs():
    """Without a compiled kernel the operators are plain PyTorch; they must be seen all the same."""
    model, x = AsNetwork(Scan2d()), image()
    wanted = scan_map(model, x, (1, 1))
    with use_backend("reference"), pytest.raises(ConfigError, match="ran no scan operator"):
        scan_map(model, x, (1, 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mmvmamba.ops.backends._best", lambda *_: "reference")
        assert not calls_of_reference(model, x)
        got = scan_map(model, x, (1, 1))
    torch.testing.assert_close(got.merged(), wanted.merged())


def calls_of_reference(model: nn.Module, x: Tensor) -> list[str]:
    """Without the watch's own help, plain PyTorch is no operator of the dispatcher."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Watch():
        model(x)
    return [name for name in seen if name.startswith("mmvmamba.scan2d")]


def test_bad_questions_are_answered():
    model, x = AsNetwork(Scan2d()), image()
    with pytest.raises(ConfigError, match=r"pixel is \(3, 0\)"):
        scan_map(model, x, (H, 0))
    with pytest.raises(ConfigError, match=r"pixel is \(0, -1\)"):
        scan_map(model, x, (0, -1))
    with pytest.raises(ConfigError, match="layer is 'laier', expected one that scans. Did you mean 'layer'"):
        scan_map(model, x, (0, 0), "laier")
    with pytest.raises(ConfigError, match="Conv2d ran no scan operator"):
        scan_layers(nn.Conv2d(D, 1, 1, dtype=torch.float64), x)
    with pytest.raises(ConfigError, match="inside one image"):
        scan_maps(model, x.repeat(2, 1, 1, 1), (0, 0), ["layer"])


def test_hooks_are_gone_after_an_error():
    model = AsNetwork(Scan2d())
    with pytest.raises(OpInputError):
        scan_map(model, torch.randn(1, D + 1, H, W, dtype=torch.float64), (0, 0))
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_runs_of_other_threads_are_not_seen():
    """A server may answer with the same network meanwhile."""
    model = FAMILIES["vmamba"]("nano").eval()
    picture = torch.randn(1, 3, 32, 32)
    names: list[str] = []

    def other() -> None:
        with torch.no_grad():
            model(picture)

    def see(call: ScanCall) -> None:
        names.append(call.layer)
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    with torch.no_grad(), watch_scans(model, see):
        model(picture)
    assert names == [layer.name for layer in scan_layers(model, picture)]


def test_pictures_of_maps():
    values = torch.zeros(2, 2)
    values[1, 0] = 3.0
    colours = heat_map(values, 4, 6)
    assert colours.shape == (4, 6, 3) and colours[0].sum() < colours[2, 0].sum()
    mixed = overlay(np.full((40, 60, 3), 200, np.uint8), values, (5, 50))
    assert mixed.shape == (40, 60, 3) and mixed[5, 50].tolist() == [0, 255, 255]
    assert heat_map(torch.zeros(2, 2), 4, 4).max() < 10
