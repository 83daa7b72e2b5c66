"""What is special to VSSD: its mixers against a restatement in other words, its options, its counts."""

import math

import pytest
import torch
from torch.nn import functional as F

from mmvmamba.apis.model_index import list_models
from mmvmamba.converters import from_upstream, to_upstream_state_dict
from mmvmamba.errors import ConfigError
from mmvmamba.models import VSSD
from mmvmamba.models.backbones.vssd import ARCHS, Attention, NonCausalSSD
from mmvmamba.ops import use_backend
from mmvmamba.testing import relative_error, requires_extension

SMALL = dict(embed_dim=8, depths=[1, 1, 1, 1], num_heads=[2, 4, 8, 16], d_state=4, mlp_ratio=2.0)

# ---------------------------------------------------------------- the network, restated channel-first from its facts


def _convolve(state, name, x, stride=1):
    weight = state[f"{name}.weight"]
    groups = x.shape[1] // weight.shape[1]
    return F.conv2d(x, weight, state.get(f"{name}.bias"), stride, weight.shape[2] // 2, groups=groups)


def _batch_norm(state, name, x):
    mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
    return F.batch_norm(x, mean, var, state[f"{name}.weight"], state[f"{name}.bias"], False, 0.0, 1e-5)


def _layer_norm(state, name, x):
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-5)


def _linear(state, name, x):
    return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))


def _as_map(x, size):
    return x.transpose(1, 2).unflatten(2, size)


def _tokens(x):
    return x.flatten(2).transpose(1, 2)


def _stem(state, image):
    def layer(name, x, stride=1):
        name = f"patch_embed.{name}"
        return _batch_norm(state, f"{name}.norm", _convolve(state, f"{name}.conv", x, stride))

    x = layer("conv1", image, 2).relu()
    x = x + layer("conv2.1", layer("conv2.0", x).relu())
    return layer("conv3.1", layer("conv3.0", x, 2).relu())


def _merge(state, name, x):
    x = _convolve(state, f"{name}.0.conv", x).relu()
    x = _convolve(state, f"{name}.1.conv", x, 2).relu()
    return _batch_norm(state, f"{name}.2.norm", _convolve(state, f"{name}.2.conv", x))


def _ssd(state, name, x, size, kwargs):
    """Explicitly, as a matrix of all tokens by all tokens for every head."""
    e, k = state[f"{name}.norm.weight"].numel(), state[f"{name}.D"].numel()
    g = k if kwargs.get("ssd_ngroups", 1) == -1 else kwargs.get("ssd_ngroups", 1)
    z, xbc, dt = torch.split(_linear(state, f"{name}.in_proj", x), [e, state[f"{name}.conv2d.bias"].numel(), k], -1)
    xbc = _tokens(F.silu(_convolve(state, f"{name}.conv2d", _as_map(xbc, size))))
    x, B, C = xbc[..., :e], *xbc[..., e:].chunk(2, -1)
    step = torch.log1p(torch.exp(dt + state[f"{name}.dt_bias"]))
    rate = state[f"{name}.A_log"].exp() * (1 if kwargs.get("ssd_positve_dA", True) else -1)
    n, p = B.shape[-1] // g, e // k
    heads = []
    for head in range(k):
        group = slice(head % g * n, (head % g + 1) * n)
        mixing = C[..., group] @ B[..., group].transpose(1, 2) * (step[..., head] * rate[head])[:, None]
        of_head = x[..., head * p : (head + 1) * p]
        heads.append(mixing @ of_head + state[f"{name}.D"][head] * of_head)
    return _linear(state, f"{name}.out_proj", _layer_norm(state, f"{name}.norm", torch.cat(heads, -1)) * z)


def _attention(state, name, x, heads):
    q, k, v = (part.unflatten(-1, (heads, -1)) for part in _linear(state, f"{name}.to_qkv", x).chunk(3, -1))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(q.shape[-1])
    return _linear(state, f"{name}.to_out", torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v).flatten(2))


def _block(state, name, x, heads, kwargs):
    size = x.shape[2:]
    x = x + _convolve(state, f"{name}.cpe1", x)
    mixed = _layer_norm(state, f"{name}.norm1", _tokens(x))
    if f"{name}.attn.A_log" in state:
        mixed = _ssd(state, f"{name}.attn", mixed, size, kwargs)
    else:
        mixed = _attention(state, f"{name}.attn", mixed, heads)
    x = x + _as_map(mixed, size)
    x = x + _convolve(state, f"{name}.cpe2", x)
    hidden = F.gelu(_linear(state, f"{name}.mlp.fc1", _layer_norm(state, f"{name}.norm2", _tokens(x))))
    return x + _as_map(_linear(state, f"{name}.mlp.fc2", hidden), size)


def restated(state, image, kwargs):
    """Return what upstream's feature extractor does, from upstream's names."""
    x, outs = _stem(state, image), []
    for stage, depth in enumerate(kwargs["depths"]):
        for block in range(depth):
            x = _block(state, f"layers.{stage}.blocks.{block}", x, kwargs["num_heads"][stage], kwargs)
        if f"outnorm{stage}.weight" in state:
            outs.append(_as_map(_layer_norm(state, f"outnorm{stage}", _tokens(x)), x.shape[2:]))
        if stage + 1 < len(kwargs["depths"]):
            x = _merge(state, f"layers.{stage}.downsample.conv", x)
    return outs


def _model(kwargs):
    """Return a model in which nothing is at its initial value."""
    torch.manual_seed(0)
    model = from_upstream("vssd", "backbone", kwargs).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (0.5 if parameter.ndim == 1 else 2.0 / parameter[0].numel()))
            if name.endswith("A_log"):
                parameter.sub_(2.0)
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 2.0)
    return model


CASES = {
    "plain": ({}, (40, 52)),
    "odd sizes": (dict(embed_dim=12, num_heads=[3, 6, 12, 24], out_indices=[1, 3]), (33, 51)),
    "one pixel": ({}, (1, 1)),
    "a row": ({}, (3, 70)),
    "two groups": (dict(ssd_ngroups=2), (29, 40)),
    "a group for every head": (dict(ssd_ngroups=-1), (32, 32)),
    "negative in two groups": (dict(ssd_positve_dA=False, ssd_ngroups=2), (40, 33)),
    "wide": (dict(ssd_expansion=3, num_heads=[3, 3, 3, 4], d_state=5), (30, 31)),
    "attention first": (dict(attn_types=["standard", "mamba2", "standard", "mamba2"], out_indices=[0, 3]), (36, 24)),
    "two stages": (dict(depths=[2, 1], num_heads=[1, 1], out_indices=[0, 1]), (17, 18)),
}


@pytest.mark.parametrize("backend", ["reference", pytest.param("compiled", marks=requires_extension())])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_restatement(name, backend):
    """Outputs, input gradient and every parameter's, in float64; outputs in float32 besides."""
    options, size = CASES[name]
    kwargs = {**SMALL, **options}
    model = _model(kwargs)
    image = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    ours = dict(model.named_parameters())
    state = to_upstream_state_dict("vssd", "backbone", {**model.state_dict(), **ours})
    want = restated(state, image, kwargs)
    with use_backend(backend):
        found = model(image)
        assert [relative_error(a, b) < 1e-10 for a, b in zip(found, want, strict=True)] == [True] * len(want)
        inputs = [image, *ours.values()]
        of_found = torch.autograd.grad(sum(out.pow(2).mean() for out in found), inputs)
    of_want = torch.autograd.grad(sum(out.pow(2).mean() for out in want), inputs)
    wrong = [key for key, a, b in zip(["image", *ours], of_found, of_want, strict=True) if relative_error(a, b) > 1e-8]
    assert not wrong
    with use_backend(backend), torch.no_grad():
        for out, expected in zip(model.float()(image.detach().float()), want, strict=True):
            assert relative_error(out, expected.detach()) < 2e-5


# ---------------------------------------------------------------- layers


def test_initial_values():
    torch.manual_seed(0)
    mixer = NonCausalSSD(64, 64)
    step, rate = F.softplus(mixer.dt_bias), mixer.A_log.exp()
    assert 1e-3 <= float(step.min()) < 3e-3 and 3e-2 < float(step.max()) <= 0.1001
    assert 1.0 <= float(rate.min()) < 2.0 and 15.0 < float(rate.max()) <= 16.0
    assert torch.equal(mixer.D, torch.ones(64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sums_that_a_half_cannot_hold(dtype):
    """They grow with the tokens; the norm that follows is to see them in float32."""
    torch.manual_seed(0)
    mixer = NonCausalSSD(32, 4, d_state=8)
    torch.nn.init.constant_(mixer.dt_bias, 8.0)
    torch.nn.init.constant_(mixer.A_log, 4.0)
    torch.nn.init.normal_(mixer.in_proj.weight)
    x = torch.randn(1, 48, 48, 32)
    with torch.no_grad():
        _, y, dt = mixer._project_in(x)
        assert float(mixer.mix(mixer.act(mixer.conv2d(y)), dt).abs().max()) > 1e6
        want = mixer(x)
        found = mixer.to(dtype)(x.to(dtype))
    assert found.dtype == dtype
    assert relative_error(found.float(), want) < (0.02 if dtype == torch.float16 else 0.1)


@pytest.mark.parametrize("train", [False, True])
def test_hooks_on_the_input_projection_run(train):
    mixer, called = NonCausalSSD(16, 2, d_state=4).train(train), []
    mixer.in_proj.register_forward_hook(lambda *_: called.append(1))
    x = torch.randn(2, 5, 6, 16)
    with torch.set_grad_enabled(train):
        hooked = mixer(x)
    assert called == [1]
    mixer.in_proj._forward_hooks.clear()
    torch.testing.assert_close(hooked, mixer(x))


def test_attention_drops_while_training_alone():
    attention, x = Attention(16, 2, dropout=0.5), torch.randn(1, 4, 5, 16)
    attention.eval()
    assert torch.equal(attention(x), attention(x))
    attention.train()
    assert not torch.equal(attention(x), attention(x))


# ---------------------------------------------------------------- options


def test_no_weight_decay_of_the_scan():
    spared = VSSD("nano").no_weight_decay()
    assert {f"layers.0.blocks.0.attn.{name}" for name in ("dt_bias", "A_log", "D", "norm.weight")} < spared
    assert "layers.0.blocks.0.cpe1.weight" not in spared


def test_dropout_reaches_stem_perceptrons_and_attention():
    arch = dict(dims=[8, 16], depths=[1, 1], num_heads=[1, 2], mixers=["ssd", "attention"], dropout=0.25)
    model = VSSD(arch, out_indices=(0, 1))
    assert model.pos_drop.p == model.layers[0].blocks[0].mlp.drop.p == model.layers[1].blocks[0].attn.dropout == 0.25


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_heads=[2]), "expected equal lengths"),
        (dict(num_heads=[3, 4]), r"3 heads in 1 groups for 16 inner channels"),
        (dict(num_groups=3), r"2 heads in 3 groups"),
        (dict(num_groups=0), "num_groups makes 0"),
        (dict(d_state=0), "d_state makes 0"),
        (dict(expansion=0), "expansion makes 0"),
        (dict(mixers=["ssd"]), "for each of the 2 stages"),
        (dict(mixers=["ssd", "attn"]), "mixers is 'attn', expected one of 'ssd', 'attention'"),
        (
            dict(mixers=["ssd", "attention"], num_heads=[2, 3]),
            "num_heads is 3 in a stage of 16 channels with attention",
        ),
        (dict(dims=[1, 2]), "expected at least 2 in the first stage"),
        (dict(head_dim=4), "unknown key 'head_dim'"),
        (dict(mlp_ratio=0.1), "Mlp: hidden is 0, expected at least 1 channel"),
        (dict(drop_path_rate=1.0), "drop path rate is 1.0"),
    ],
    ids=str,
)
def test_bad_options(options, message):
    arch = dict(dims=[8, 16], depths=[1, 1], num_heads=[2, 4], mixers=["ssd", "ssd"]) | options
    with pytest.raises(ConfigError, match=message):
        VSSD(arch, out_indices=(0, 1))


# ---------------------------------------------------------------- counts


@pytest.mark.parametrize(("name", "told"), [("micro", 2.306), ("tiny", 4.475), ("small", 7.366), ("base", 16.066)])
def test_flops_are_upstreams_if_heads_share_the_products(name, told):
    """What the note in the metafile says: fvcore counts a product with B or C once, however many heads it is for."""
    (entry,) = [each for each in list_models() if each.name == f"vssd-{name}_8xb128_in1k"]
    arch, once_too_often = ARCHS[name], 0
    for stage in range(3):
        tokens, inner = (56 // 2**stage) ** 2, 2 * arch.dims[stage]
        products = 2 * tokens * inner * arch.d_state * arch.depths[stage]
        once_too_often += products - products // arch.num_heads[stage]
    assert round((entry.metadata["FLOPs"] - once_too_often) / 1e9, 3) == told
