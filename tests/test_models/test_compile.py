"""The backbone under torch.compile (no graph break) and torch.export equals eager, with gradients."""

import pytest
import torch

from mmvmamba.models import VMamba

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


@pytest.mark.parametrize("name", ARCHS)
def test_export(name):
    stages = tuple(range(len(ARCHS[name]["depths"])))
    model = VMamba(ARCHS[name], out_indices=stages).eval()
    image = torch.randn(1, 3, 33, 41)
    program = torch.export.export(model, (image,))
    for out, want in zip(program.module()(image), model(image), strict=True):
        torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-6)
