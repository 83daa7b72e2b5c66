"""The backbone under torch.compile (no graph break) and torch.export equals eager, with gradients."""

import pytest
import torch

from mmvmamba.models import FAMILIES, VMamba
from mmvmamba.models.layers import ChannelsLastConv2d, Linear, Mlp

SMALL = dict(dims=[8, 16], depths=[1, 1])
ARCHS = {
    # One block is enough for the default backend, which compiles C++ for every fused loop.
    "v2": dict(dims=[8], depths=[1]),
    "vanilla": dict(SMALL, d_state=4, gated=True, mlp_ratio=0.0, patch_embed="patchify", downsample="patch_merging"),
    "cascade": dict(SMALL, scan="cascade"),
    "rotated": dict(SMALL, scan="rotated"),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "v2" else name for name in ARCHS]
)
def test_compile_fullgraph(name):
    stages = tuple(range(len(ARCHS[name]["depths"])))
    torch._dynamo.reset()
    model = VMamba(ARCHS[name], out_indices=stages, drop_path_rate=0.0).train()
    # aot_eager traces forward and backward like the default backend, but compiles no C++ for each of them.
    compiled = torch.compile(model, fullgraph=True, backend="inductor" if name == "v2" else "aot_eager")
    image = torch.randn(2, 3, 33, 41)
    grads = []
    for forward in (model, compiled):
        model.zero_grad()
        outs = forward(image)
        sum(out.pow(2).mean() for out in outs).backward()
        grads.append(([out.detach() for out in outs], [p.grad.clone() for p in model.parameters()]))
    for eager, other in zip(grads[0][0] + grads[0][1], grads[1][0] + grads[1][1], strict=True):
        torch.testing.assert_close(other, eager, rtol=1e-4, atol=1e-5)


def _same_as_eager(other, model, image):
    for out, want in zip(other(image), model(image), strict=True):
        torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_compiles_without_a_graph_break(family):
    """For training, forward and backward."""
    torch._dynamo.reset()
    model = FAMILIES[family]("nano").train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    image = torch.randn(2, 3, 33, 41)
    _same_as_eager(compiled, model, image)
    sum(out.pow(2).mean() for out in compiled(image)).backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_exports(family):
    """At one size, and for any number of images."""
    model = FAMILIES[family]("nano").eval()
    image = torch.randn(2, 3, 33, 41)
    with torch.no_grad():
        _same_as_eager(torch.export.export(model, (image,)).module(), model, image)
        batch = torch.export.Dim("b", min=1, max=64)
        program = torch.export.export(model, (image,), dynamic_shapes=({0: batch},)).module()
        for images in (1, 3):
            _same_as_eager(program, model, torch.randn(images, 3, 33, 41))


@pytest.mark.parametrize("name", ARCHS)
def test_export(name):
    stages = tuple(range(len(ARCHS[name]["depths"])))
    model = VMamba(ARCHS[name], out_indices=stages).eval()
    image = torch.randn(1, 3, 33, 41)
    program = torch.export.export(model, (image,))
    for out, want in zip(program.module()(image), model(image), strict=True):
        torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-6)


DYNAMIC = {
    # Sizes on either side of those from which on eager mode takes oneDNN.
    "linear": (lambda: Linear(64, 128), (64,), (2, 5, 4000)),
    "mlp": (lambda: Mlp(64, 128), (64,), (2, 5, 4000)),
    "convolution": (lambda: ChannelsLastConv2d(96, 8, 3, 2, 1), (14, 14, 96), (2, 1, 40)),
    "backbone": (lambda: VMamba("nano"), (3, 64, 64), (2, 1, 9)),
}


def _check_sizes(traced, layer, shape, sizes):
    for size in sizes:
        x = torch.randn(size, *shape)
        found, expected = traced(x), layer(x)
        found, expected = (out if isinstance(out, tuple) else (out,) for out in (found, expected))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", DYNAMIC)
def test_export_with_a_dynamic_batch(name):
    build, shape, sizes = DYNAMIC[name]
    layer = build().eval()
    batch = torch.export.Dim("b", min=1, max=2048 if len(shape) > 1 else 2**20)
    with torch.no_grad():
        program = torch.export.export(layer, (torch.randn(2, *shape),), dynamic_shapes=({0: batch},))
        _check_sizes(program.module(), layer, shape, sizes)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["linear", "mlp", "convolution"])
def test_one_compilation_serves_all_sizes(name, training):
    build, shape, sizes = DYNAMIC[name]
    torch._dynamo.reset()
    layer, graphs = build().train(training), []
    compiled = torch.compile(
        layer, fullgraph=True, dynamic=True, backend=lambda graph, _: graphs.append(graph) or graph.forward
    )
    with torch.set_grad_enabled(training):
        _check_sizes(compiled, layer, shape, [size for size in sizes if size > 1])  # 1 is special to PyTorch
    assert len(graphs) == 1
