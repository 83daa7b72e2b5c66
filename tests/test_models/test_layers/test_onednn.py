"""Linear maps, perceptrons and convolutions by oneDNN equal PyTorch's own, and step aside where they must."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from mmvmamba.models.layers import ChannelsLastConv2d, Linear, Mlp, onednn
from mmvmamba.models.layers.mlp import chunk_rows
from mmvmamba.models.layers.onednn import use_onednn_linear

CLOSE = dict(rtol=1e-4, atol=1e-4)


@pytest.fixture
def calls(monkeypatch):
    """The results of the oneDNN operator's calls; stays empty on a machine without it, whose results are PyTorch's."""
    seen = []
    original = onednn.multiply
    record = lambda *args, **kwargs: seen.append(original(*args, **kwargs)) or seen[-1]  # noqa: E731
    monkeypatch.setattr("mmvmamba.models.layers.onednn.multiply", record)
    for module in ("conv", "mlp", "fused_block"):
        monkeypatch.setattr(f"mmvmamba.models.layers.{module}.multiply", record)
    return seen


def _values_and_gradients(forward, *inputs):
    """The output and the gradients of ``inputs`` for one fixed cotangent."""
    inputs = [t.detach().clone().requires_grad_() for t in inputs]
    out = forward(*inputs)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return [out.detach(), *torch.autograd.grad(out, inputs, cotangent)]


LAYOUTS = {
    "dense": lambda x: x,
    "half of a wider map": lambda x: torch.cat([x, x], -1).chunk(2, -1)[0],
    "channels first in memory": lambda x: x.movedim(-1, 1).contiguous().movedim(1, -1),
    "broadcast": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bias", [True, False])
def test_linear_equals_pytorch(calls, layout, bias):
    x, weight = LAYOUTS[layout](torch.randn(2, 11, 13, 64)), torch.randn(80, 64)
    inputs = (x, weight, torch.randn(80)) if bias else (x, weight)
    ours = _values_and_gradients(onednn.linear, *inputs)
    assert len(calls) >= 3 * onednn._EXISTS  # output and two gradients
    for a, b in zip(ours, _values_and_gradients(F.linear, *inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(onednn.linear(*inputs), F.linear(*inputs), **CLOSE)


@pytest.mark.parametrize("layer", [Linear(64, 80), Mlp(64, 80)], ids=lambda layer: type(layer).__name__)
def test_the_gradient_of_a_sum_is_written_out(monkeypatch, layer):
    """It is one value with strides of 0, which oneDNN multiplies hundreds of times more slowly."""
    original, strides = onednn.multiply, []

    def watch(x, weight, *args, **kwargs):
        strides.extend((*x.stride(), *weight.stride()))
        return original(x, weight, *args, **kwargs)

    for module in ("onednn", "mlp"):
        monkeypatch.setattr(f"mmvmamba.models.layers.{module}.multiply", watch)
    x = torch.randn(400, 64, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x).sum(), x)
    assert bool(strides) is onednn._EXISTS and 0 not in strides
    torch.testing.assert_close(grad, torch.autograd.grad(layer(x), x, torch.ones(400, layer(x).shape[1]))[0], **CLOSE)


def test_the_weight_gradient_of_some_channels_of_a_map_has_its_rows_together(monkeypatch):
    """Rows that lie apart are right, too, but took a thousand times as long."""
    wide, grad = torch.randn(600, 96), torch.randn(600, 200)
    seen = []
    original = onednn.multiply
    monkeypatch.setattr(onednn, "multiply", lambda *args: seen.extend(args[:2]) or original(*args))
    found = onednn.weight_gradient(grad[:, ::2], wide[:, 32:])
    torch.testing.assert_close(found, grad[:, ::2].t() @ wide[:, 32:], **CLOSE)
    assert seen and all(t.is_contiguous() or t.t().is_contiguous() for t in seen)


@pytest.mark.parametrize(("rows", "wide", "narrow"), [(2000, 128, 16), (64, 256, 128)])
def test_weight_gradient_in_either_order(rows, wide, narrow):
    """The narrower operand goes first unless the weight is large."""
    for columns, inner in ((wide, narrow), (narrow, wide)):
        grad, x = torch.randn(rows, columns), torch.randn(rows, inner)
        found = onednn.weight_gradient(grad, x)
        assert found.is_contiguous()
        torch.testing.assert_close(found, grad.t() @ x, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_linear_gives_no_gradient_nobody_wants(calls, frozen):
    inputs = [torch.randn(300, 64), torch.randn(80, 64), torch.randn(80)]
    inputs = [t.requires_grad_(i != frozen) for i, t in enumerate(inputs)]
    onednn.linear(*inputs).sum().backward()
    assert bool(calls) is onednn._EXISTS
    assert [t.grad is None for t in inputs] == [i == frozen for i in range(3)]


def _second(forward, inputs):
    """Second derivatives: gradients of the squared gradients."""
    inputs = [t.detach().clone().requires_grad_() for t in inputs]
    first = torch.autograd.grad(forward(*inputs).square().mean(), inputs, create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in first), inputs)


def test_linear_has_second_derivatives(calls):
    inputs = (torch.randn(300, 64), torch.randn(80, 64), torch.randn(80))
    ours = _second(onednn.linear, inputs)
    assert bool(calls) is onednn._EXISTS
    for a, b in zip(ours, _second(F.linear, inputs), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


def _mlp_function(mlp):
    names = [name for name, _ in mlp.named_parameters()]
    return lambda x, *p: torch.func.functional_call(mlp, dict(zip(names, p, strict=True)), (x,))


@pytest.mark.parametrize("pixels", [200, 3000], ids=["one chunk", "chunks"])
def test_mlp_equals_pytorch(calls, pixels):
    mlp = Mlp(48, 1000)
    assert chunk_rows(1000) * 2 < 3000 or torch.get_num_threads() > 1
    inputs = (torch.randn(1, pixels, 1, 48), *mlp.parameters())
    ours = _values_and_gradients(_mlp_function(mlp), *inputs)
    assert bool(calls) is onednn._EXISTS
    with torch.no_grad():
        inferred = mlp(inputs[0])
    count = len(calls)
    with use_onednn_linear(False):
        theirs = _values_and_gradients(_mlp_function(mlp), *inputs)
    assert len(calls) == count
    torch.testing.assert_close(inferred, theirs[0], **CLOSE)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


def test_mlp_in_chunks_equals_one_chunk(monkeypatch):
    mlp, x = Mlp(32, 128), torch.randn(1, 700, 1, 32)
    results = []
    for rows in (10_000, 256, 64):
        monkeypatch.setattr("mmvmamba.models.layers.mlp.chunk_rows", lambda hidden, rows=rows: rows)
        mlp.zero_grad()
        out = mlp(x)
        out.square().sum().backward()
        with torch.no_grad():
            results.append([out.detach(), mlp(x), *(p.grad.clone() for p in mlp.parameters())])
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


def test_mlp_has_second_derivatives(calls):
    mlp = Mlp(32, 128)
    inputs = (torch.randn(500, 32), *mlp.parameters())
    ours = _second(_mlp_function(mlp), inputs)
    assert bool(calls) is onednn._EXISTS
    with use_onednn_linear(False):
        theirs = _second(_mlp_function(mlp), inputs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


CONVS = [(96, 8, 3, 2, 1, 14), (96, 8, 3, 2, 1, 13), (220, 16, 2, 2, 0, 21), (100, 12, (3, 5), (2, 3), (1, 0), 16)]


@pytest.mark.parametrize("conv", CONVS, ids=str)
@pytest.mark.parametrize("batch", [1, 2, 40])
def test_convolution_equals_pytorch(calls, conv, batch):
    channels, out, kernel, stride, padding, side = conv
    layer = ChannelsLastConv2d(channels, out, kernel, stride, padding)
    x = torch.randn(batch, side, side + 3, channels)
    names = ("weight", "bias")
    forward = lambda x, *p: torch.func.functional_call(layer, dict(zip(names, p, strict=True)), (x,))  # noqa: E731
    inputs = (x, layer.weight, layer.bias)
    ours = _values_and_gradients(forward, *inputs)
    assert bool(calls) is onednn._EXISTS
    with use_onednn_linear(False), torch.no_grad():
        expected = layer(x)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected, **CLOSE)
    with use_onednn_linear(False):
        theirs = _values_and_gradients(forward, *inputs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-3)
    for a, b in zip(_second(forward, inputs), _second(lambda x, w, b: F.conv2d(
        x.permute(0, 3, 1, 2), w, b, stride, padding).permute(0, 2, 3, 1), inputs), strict=True):  # fmt: skip
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("side", [14, 62], ids=["few pixels", "many pixels"])
@pytest.mark.parametrize("groups", [1, 2])
def test_convolution_weight_and_gradients_are_contiguous(side, groups):
    """As sharding (FSDP), flattening (LBFGS), safetensors and fused optimizers want them."""
    layer = ChannelsLastConv2d(96, 192, 3, 2, 1, groups=groups)
    layer(torch.randn(1, side, side, 96, requires_grad=True)).square().sum().backward()
    for t in (layer.weight, layer.weight.grad, layer.bias.grad):
        assert t.is_contiguous()
    flat = nn.utils.parameters_to_vector(layer.parameters())
    nn.utils.vector_to_parameters(2 * flat, layer.parameters())
    assert torch.equal(nn.utils.parameters_to_vector(layer.parameters()), 2 * flat)


@pytest.mark.parametrize("side", [14, 62], ids=["few pixels", "many pixels"])
def test_the_result_may_be_changed_in_place(calls, side):
    for layer in ChannelsLastConv2d(96, 192, 3, 2, 1), Linear(96, 192), Mlp(96, 192):
        x = torch.randn(1, side, side, 96, requires_grad=True)
        results = []
        for inplace in (False, True):
            out = nn.Sequential(layer, nn.ReLU(inplace=inplace))(x)
            results.append([out, *torch.autograd.grad(out.square().sum(), (x, *layer.parameters()))])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
    assert bool(calls) is onednn._EXISTS


# Layer, shape of a map, and per input whose gradient is wanted alone, the inputs and inner maps that it takes.
KEPT = {
    "linear": (lambda: Linear(96, 192), (900, 96), {"x": {"weight"}, "weight": {"x"}, "bias": set()}),
    "perceptron": (
        lambda: Mlp(96, 192),
        (900, 96),
        {
            "x": {"fc1.weight", "fc2.weight", "inner"},
            "fc1.weight": {"x", "fc2.weight", "inner"},
            "fc1.bias": {"fc2.weight", "inner"},
            "fc2.weight": {"inner"},
            "fc2.bias": set(),
        },
    ),
    "few pixels": (
        lambda: ChannelsLastConv2d(96, 192, 3, 2, 1),
        (1, 14, 14, 96),
        {"x": {"weight"}, "weight": {"x"}, "bias": set()},
    ),
    "many pixels": (
        lambda: ChannelsLastConv2d(96, 192, 3, 2, 1),
        (1, 62, 62, 96),
        {"x": {"weight"}, "weight": {"x"}, "bias": set()},
    ),
}


@pytest.mark.parametrize(("name", "wanted"), [(name, wanted) for name in KEPT for wanted in KEPT[name][2]])
def test_only_what_a_wanted_gradient_needs_is_kept(name, wanted):
    """What is not kept costs no memory, and may be changed before the backward pass."""
    build, shape, kept = KEPT[name]
    layer, x = build().requires_grad_(False), torch.randn(shape)
    inputs = {"x": x, **dict(layer.named_parameters())}
    names = {tensor.data_ptr(): key for key, tensor in inputs.items()}
    inputs[wanted].requires_grad_()
    seen, gradients = set(), []
    for change in (False, onednn._EXISTS):  # what PyTorch's own functions keep is not ours
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: seen.add(names.get(t.data_ptr(), "inner")) or t, lambda t: t
        ):
            out = layer(x)
        (second,) = torch.autograd.grad(out.square().sum(), inputs[wanted], create_graph=True, retain_graph=True)
        assert second.requires_grad
        if change:
            cotangent = 2 * out.detach()
            with torch.no_grad():
                for key, tensor in inputs.items():
                    if key not in kept[wanted]:
                        tensor.zero_()
            gradients += torch.autograd.grad(out, inputs[wanted], cotangent)
        else:
            gradients += torch.autograd.grad(out.square().sum(), inputs[wanted])
    assert seen == kept[wanted] or not onednn._EXISTS
    torch.testing.assert_close(*gradients)


def test_convolution_takes_any_memory_layout_of_the_weight(calls):
    """Users may convert a model by ``to(memory_format=torch.channels_last)``."""
    for side in (14, 62):
        plain, x = ChannelsLastConv2d(96, 192, 3, 2, 1), torch.randn(1, side, side, 96, requires_grad=True)
        other = copy.deepcopy(plain).to(memory_format=torch.channels_last)
        results = []
        for layer in (plain, other):
            out = layer(x)
            results.append([out, *torch.autograd.grad(out.square().mean(), (x, layer.weight))])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert bool(calls) is onednn._EXISTS


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 5, 64), (3, 4, 64)], ids=str)
def test_empty_and_tiny_maps_are_pytorchs(calls, shape):
    x, layer = torch.randn(shape, requires_grad=True), Linear(64, 80)
    out = layer(x)
    assert out.shape == (*shape[:-1], 80)
    out.sum().backward()
    assert x.grad.shape == shape
    assert Mlp(64, 128)(x).shape == shape
    assert not calls


def test_inner_size_zero(calls):
    out = onednn.linear(torch.randn(2000, 0), torch.randn(1000, 0), torch.ones(1000))
    assert torch.equal(out, torch.ones(2000, 1000))
    assert not calls


def test_wrong_shapes_raise_as_in_pytorch():
    for x, weight, bias in ((4000, 64), (80, 65), (80,)), ((4000, 64), (80, 64), (81,)), ((4000, 64), (64,), (3, 3)):
        arguments = [torch.randn(shape) for shape in (x, weight, bias)]
        with pytest.raises(RuntimeError) as expected:
            F.linear(*arguments)
        with pytest.raises(RuntimeError) as found:
            onednn.linear(*arguments)
        assert str(found.value) == str(expected.value)


def _jvp():
    x, weight = torch.randn(400, 64), torch.randn(80, 64)
    _, tangent = torch.func.jvp(lambda x: onednn.linear(x, weight), (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, F.linear(torch.ones_like(x), weight), **CLOSE)


def _vmap():
    x, weight = torch.randn(3, 400, 64), torch.randn(80, 64)
    torch.testing.assert_close(torch.func.vmap(lambda x: onednn.linear(x, weight))(x), F.linear(x, weight), **CLOSE)


def _flop_counter():
    with FlopCounterMode(display=False) as counter:
        onednn.linear(torch.randn(400, 64), torch.randn(80, 64))
    assert counter.get_total_flops() == 2 * 400 * 64 * 80


def _double():
    x, weight = torch.randn(3, 5).double().requires_grad_(), torch.randn(4, 5).double().requires_grad_()
    assert torch.autograd.gradcheck(onednn.linear, (x, weight))
    assert onednn.linear(torch.randn(400, 64).double(), torch.randn(80, 64).double()).dtype == torch.float64


def _autocast():
    with torch.autocast("cpu", torch.bfloat16):
        assert Linear(64, 80)(torch.randn(400, 64)).dtype == torch.bfloat16


def _switched_off():
    with use_onednn_linear(False):
        Mlp(64, 128)(torch.randn(400, 64))
    with torch.backends.mkldnn.flags(enabled=False):
        Mlp(64, 128)(torch.randn(400, 64))


def _meta():
    assert onednn.linear(torch.randn(400, 64, device="meta"), torch.randn(80, 64, device="meta")).shape == (400, 80)


def _absent(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(onednn, "_EXISTS", False)
        Mlp(64, 128)(torch.randn(400, 64))


@pytest.mark.parametrize("case", [_jvp, _vmap, _flop_counter, _double, _autocast, _switched_off, _meta, _absent])
def test_steps_aside(calls, case, monkeypatch):
    case(monkeypatch) if case is _absent else case()
    assert not calls
    onednn.linear(torch.randn(400, 64), torch.randn(80, 64))
    assert len(calls) == onednn._EXISTS  # and is back afterwards


def test_batched_gradients():
    """Gradients for many cotangents at once run the backward pass under vmap."""
    layer, x = Linear(64, 80), torch.randn(300, 64, requires_grad=True)
    cotangents = torch.randn(3, 300, 80)
    for forward in (layer, Mlp(64, 128)):
        out = forward(x)
        batch = cotangents[..., : out.shape[1]]
        (many,) = torch.autograd.grad(out, x, batch, is_grads_batched=True, retain_graph=True)
        for cotangent, found in zip(batch, many, strict=True):
            (one,) = torch.autograd.grad(out, x, cotangent, retain_graph=True)
            torch.testing.assert_close(found, one, **CLOSE)
    conv, image = ChannelsLastConv2d(96, 8, 3, 2, 1), torch.randn(1, 14, 14, 96, requires_grad=True)
    out = conv(image)
    cotangents = torch.randn(3, *out.shape)
    many = torch.autograd.grad(out, (image, conv.weight), cotangents, is_grads_batched=True, retain_graph=True)
    for i, cotangent in enumerate(cotangents):
        for found, one in zip(many, torch.autograd.grad(out, (image, conv.weight), cotangent, True), strict=True):
            torch.testing.assert_close(found[i], one, **CLOSE)


def test_backward_under_autocast_stays_float32():
    close = 1e-5 if onednn._EXISTS else 1e-2  # PyTorch's own backward pass of a linear map does not
    mlp, x = Mlp(64, 128), torch.randn(400, 64, requires_grad=True)
    conv, image = ChannelsLastConv2d(96, 8, 3, 2, 1), torch.randn(1, 14, 14, 96, requires_grad=True)
    linear = Linear(64, 80)
    for layer, given in ((mlp, x), (conv, image), (linear, x)):
        (expected,) = torch.autograd.grad(layer(given).square().sum(), given)
        loss = layer(given).square().sum()
        with torch.autocast("cpu", torch.bfloat16):
            (found,) = torch.autograd.grad(loss, given)
        torch.testing.assert_close(found, expected, rtol=close, atol=close)


def test_hooks_inside_a_perceptron_still_run():
    """A fused computation would pass by what watches the modules it leaves out."""
    x = torch.randn(400, 64)
    for name, training in itertools.product(("fc1", "act", "fc2", "drop"), (True, False)):
        mlp, seen = Mlp(64, 128), []
        mlp.get_submodule(name).register_forward_hook(lambda *args, seen=seen: seen.append(args))
        with torch.set_grad_enabled(training):
            mlp(x)
        assert len(seen) == (2 if name == "drop" else 1)


def test_a_replaced_forward_inside_a_perceptron_still_runs():
    mlp, x = Mlp(64, 128), torch.randn(400, 64)
    mlp.fc1.forward = lambda x: torch.zeros(*x.shape[:-1], 128)
    for training in (True, False):
        with torch.set_grad_enabled(training):
            torch.testing.assert_close(mlp(x), mlp.fc2.bias.expand(400, 64))


def test_a_perceptron_with_another_last_map_gives_its_channels():
    mlp, x = Mlp(64, 128), torch.randn(2, 200, 64)
    mlp.fc2 = Linear(128, 32)
    for training in (True, False):
        with torch.set_grad_enabled(training):
            torch.testing.assert_close(mlp(x), mlp.fc2(mlp.act(mlp.fc1(x))), **CLOSE)


def test_dropout_in_a_perceptron_is_not_fused_away():
    mlp, x = Mlp(64, 128, dropout=0.5), torch.randn(400, 64)
    assert float((mlp.train()(x) == 0).float().mean()) == pytest.approx(0.5, abs=0.05)
    assert float((mlp.eval()(x) == 0).float().mean()) < 0.01
