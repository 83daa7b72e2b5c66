"""The block's fused tail equals its modules, runs only where it may, and the forward pass copies nothing unseen."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from mmvmamba.models import VMamba
from mmvmamba.models.layers import fused_block, onednn
from mmvmamba.models.layers.onednn import use_onednn_linear
from mmvmamba.testing import requires_extension

SMALL = dict(dims=[32, 64], depths=[1, 1])
ARCHS = {
    "v2": SMALL,
    "inner twice as wide": dict(SMALL, ssm_ratio=2.0),
    "gated": dict(SMALL, gated=True, d_state=2),
    "cascade": dict(SMALL, scan="cascade"),
}


@pytest.fixture
def tails(monkeypatch):
    """The calls of the fused tail; stays empty on a machine without the oneDNN operator."""
    seen = []
    original = fused_block.fused_tail
    record = lambda *args: seen.append(args) or original(*args)  # noqa: E731
    monkeypatch.setattr("mmvmamba.models.backbones.vmamba.fused_tail", record)
    return seen


def _model(arch=SMALL, **options):
    return VMamba(arch, out_indices=(0, 1), **options).eval()


@pytest.mark.parametrize("name", ARCHS)
@pytest.mark.parametrize("chunk", [10_000, 100])
def test_equals_the_modules(tails, name, chunk, monkeypatch):
    monkeypatch.setattr("mmvmamba.models.layers.fused_block.chunk_rows", lambda hidden: chunk)
    model, image = _model(ARCHS[name]), torch.randn(2, 3, 70, 81)
    with torch.no_grad():
        fused = model(image)
        assert len(tails) == 2 * onednn._EXISTS
        with use_onednn_linear(False):
            expected = model(image)
    assert len(tails) == 2 * onednn._EXISTS
    recorded = model(image)  # with gradients
    assert len(tails) == 2 * onednn._EXISTS
    for a, b, c in zip(fused, expected, recorded, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(c, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["v2", "gated"])
def test_half_precision_keeps_type_and_values(tails, name):
    model, image = _model(ARCHS[name]), torch.randn(1, 3, 70, 81)
    with torch.no_grad():
        exact = model(image)
        for narrow in (False, True):
            if narrow:
                model, image = model.bfloat16(), image.bfloat16()
            results = []
            for enabled in (True, False):
                with use_onednn_linear(enabled), torch.autocast("cpu", torch.bfloat16, enabled=not narrow):
                    results.append(model(image))
            for a, b, want in zip(*results, exact, strict=True):
                assert a.dtype == b.dtype
                assert float((a.float() - want).abs().max() / want.abs().max()) < 0.05
    assert len(tails) == 2 * onednn._EXISTS + 4 * onednn._HAS_BF16


@pytest.mark.parametrize(
    "part", ["drop_path", "norm2", "mlp", "mlp.fc1", "op", "op.out_norm", "op.out_proj", "op.dropout"]
)
def test_hooks_still_run(tails, part):
    model, seen = _model(), []
    model.layers[0].blocks[0].get_submodule(part).register_forward_hook(lambda *args: seen.append(args))
    with torch.no_grad():
        model(torch.randn(1, 3, 64, 64))
    assert seen
    assert len(tails) == onednn._EXISTS  # that of the other block


def test_stochastic_depth_is_not_fused_away(tails):
    model = _model(drop_path_rate=0.3).train()
    with torch.no_grad():
        model(torch.randn(1, 3, 64, 64))
    assert len(tails) == onednn._EXISTS  # the rate of the first block is 0


# What a forward pass without gradients of two stages may copy: the image to channels last (1), and each output to
# channels first, which is what the interface promises (2). The compiled depthwise convolution reads its half in place.
ALLOWED_COPIES = 3


@requires_extension()
@pytest.mark.ext  # the scan in plain PyTorch copies on its own account
@pytest.mark.parametrize("name", ["v2", "gated"])
def test_no_hidden_copies(tails, name):
    model, image = _model(ARCHS[name]), torch.randn(1, 3, 128, 128)  # smaller ones miss oneDNN's convolution
    with torch.no_grad():
        model(image)
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as record:
            model(image)
    # Only copies of maps count: PyTorch's convolution brings its small weights into the order of the map, and its
    # linear map, where oneDNN's is missing, starts from the bias.
    weights = [list(p.shape) for p in model.parameters() if p.ndim == 4]
    events = [e for e in record.events() if e.name == "aten::copy_" and e.input_shapes[0] not in weights]
    events = [e for e in events if e.cpu_parent is None or e.cpu_parent.name != "aten::addmm"]
    assert len(tails) == 4 * onednn._EXISTS
    assert len(events) <= ALLOWED_COPIES, [event.cpu_parent and event.cpu_parent.name for event in events]
