"""The deployment form of every family that has batch norms."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmvmamba.errors import ConfigError
from mmvmamba.models import fold_batch_norms
from mmvmamba.models.backbones import FAMILIES
from mmvmamba.models.layers import ConvBN, ConvMlp, ResidualDepthwise
from mmvmamba.ops import use_backend
from mmvmamba.testing import relative_error

#: Options with which a family has batch norms where it has none by itself.
OPTIONS = {"vmamba": dict(arch=dict(dims=[16, 32], depths=[1, 1], norm="batch_norm"), out_indices=(0, 1))}
#: Norms of whole tokens, which come before linear maps or at the end, as layer norms elsewhere.
STAY = {"vmamba": ("norm", "norm2", "outnorm0", "outnorm1")}


def _norms(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]


def _built(family: str) -> nn.Module:
    model = FAMILIES[family](**OPTIONS.get(family, dict(arch="nano"))).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.running_mean.normal_(std=0.2, generator=generator)
                module.running_var.uniform_(0.5, 2.0, generator=generator)
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(std=0.2, generator=generator)
    return model


FOLDABLE = [family for family in FAMILIES if _norms(_built(family))]
every_foldable = pytest.mark.parametrize("family", FOLDABLE)


def test_families_with_batch_norms():
    assert {"vmamba", "efficientvmamba", "vssd", "mobilemamba"} <= set(FOLDABLE)


@every_foldable
@pytest.mark.parametrize("backend", ["reference", None])
def test_equal_to_the_form_it_is_made_of(family, backend):
    """At odd and usual sizes, with gradients asked for or not."""
    torch.manual_seed(0)
    model = _built(family)
    before = copy.deepcopy(model.state_dict())
    folded = fold_batch_norms(model)
    assert all(name.rpartition(".")[2] in STAY.get(family, ()) for name in _norms(folded))
    assert not any(module.training for module in folded.modules())
    with use_backend(backend):
        for size in ((70, 100), (64, 64), (1, 1)):
            image = torch.randn(2, 3, *size)
            with torch.no_grad():
                expected, found = model(image), folded(image)
            for a, b, c in zip(expected, found, folded(image), strict=True):
                assert relative_error(b, a.double()) < 1e-5
                assert relative_error(c, a.double()) < 1e-5
                assert b.shape == a.shape and b.is_contiguous()
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@every_foldable
def test_state_dict_and_dtypes(family):
    """It loads into the deployment form of another model; in float64 it is as good, and another input type works."""
    model = _built(family)
    folded, other = (
        fold_batch_norms(model),
        fold_batch_norms(FAMILIES[family](**OPTIONS.get(family, dict(arch="nano"))).eval()),
    )
    state = folded.state_dict()
    assert not any("running_mean" in name and name.split(".")[-2] not in STAY.get(family, ()) for name in state)
    other.load_state_dict(state, strict=True)
    image = torch.randn(1, 3, 70, 40)
    with torch.no_grad():
        for a, b in zip(folded(image), other(image), strict=True):
            assert torch.equal(a, b)
        for a, b in zip(model.double()(image.double()), folded.double()(image.double()), strict=True):
            assert relative_error(b, a) < 1e-5
        folded.bfloat16()(image.bfloat16())
        with torch.autocast("cpu", torch.bfloat16):
            other(image)


@pytest.mark.parametrize("family", ["mobilemamba"])
def test_compile_and_export(family):
    folded = fold_batch_norms(_built(family))
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = folded(image)
        compiled = torch.compile(folded, fullgraph=True, backend="aot_eager")(image)
        exported = torch.export.export(folded, (image,)).module()(image)
    for a, b, c in zip(expected, compiled, exported, strict=True):
        assert relative_error(b, a.double()) < 1e-5
        assert relative_error(c, a.double()) < 1e-5


def test_training_mode_is_refused():
    model = FAMILIES["mobilemamba"]("nano").train()
    with pytest.raises(ConfigError, match=r"MobileMamba is in training mode.*Call model.eval\(\) first"):
        fold_batch_norms(model)
    model.eval()
    next(m for m in model.modules() if isinstance(m, _BatchNorm)).train()
    with pytest.raises(ConfigError, match=r"1 batch norms, such as 'patch_embed.convs.0.norm'"):
        fold_batch_norms(model)


def test_twice_and_without_statistics_are_refused():
    folded = fold_batch_norms(FAMILIES["mobilemamba"]("nano").eval())
    with pytest.raises(ConfigError, match="fold them once"):
        fold_batch_norms(folded)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)).eval()
    with pytest.raises(ConfigError, match="running statistics"):
        fold_batch_norms(model)


def test_sequences_of_others():
    """A norm right behind a convolution or linear map; no other."""
    model = nn.Sequential(
        nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4), nn.Flatten(),
        nn.Linear(4 * 5 * 6, 8, bias=False), nn.BatchNorm1d(8),
    )  # fmt: skip
    for _ in range(3):
        model(torch.randn(4, 3, 7, 8))
    folded = fold_batch_norms(model.eval())
    assert [type(m).__name__ for m in folded] == [
        "BatchNorm2d", "Conv2d", "Identity", "ReLU", "BatchNorm2d", "Flatten", "Linear", "Identity",
    ]  # fmt: skip
    image = torch.randn(4, 3, 7, 8)
    torch.testing.assert_close(folded(image), model(image), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "layer", [ConvBN(8, 16, relu=True), ConvBN(8, 8, 3, groups=8, relu=True), ResidualDepthwise(8)]
)
def test_hooks_of_folded_layers_run(layer):
    """As all fused ways, this one leaves nobody out who watches."""
    folded = fold_batch_norms(layer.eval())
    x, seen = torch.randn(1, 5, 6, 8), []
    with torch.no_grad():
        expected = folded(x)
        folded.conv.register_forward_hook(lambda *_: seen.append(True))
        torch.testing.assert_close(folded(x), expected, rtol=1e-5, atol=1e-5)
    assert seen


def test_products_large_enough_for_onednn():
    torch.manual_seed(0)
    model = ConvMlp(64, 256).eval()
    folded, x = fold_batch_norms(model), torch.randn(1, 20, 20, 64)
    with torch.no_grad():
        torch.testing.assert_close(folded(x), model(x), rtol=1e-5, atol=1e-5)
        residual = folded.run_directly(x, residual=True)
        if residual is not None:  # where there is oneDNN
            torch.testing.assert_close(residual, x + model(x), rtol=1e-5, atol=1e-5)
