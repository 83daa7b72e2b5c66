"""What is special to ShuffleMamba: its tokens against a restatement in float64, its converter's options, its head."""

# ruff: noqa: S106 (a class token is no password)

import copy
import math

import pytest
import torch

from mmvmamba.converters import convert_state_dict, from_upstream, to_upstream_state_dict
from mmvmamba.errors import CheckpointMismatch, ConfigError
from mmvmamba.models import ShuffleMamba, build_register_cls_head
from mmvmamba.models.backbones.shufflemamba import ARCHS
from mmvmamba.testing import relative_error
from tests.test_models.test_backbones import plain_shufflemamba as plain

SMALL = dict(embed_dim=8, depth=3, drop_path_rate=0.1)
BOUND = 1e-9  # both are float64


def _built(form, **kwargs):
    """Return a module in float64 with weights that make every part matter, and its entries under upstream's names."""
    torch.manual_seed(5)
    model = from_upstream("shufflemamba", form, {**SMALL, **kwargs}).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            parameter += (0.5 if parameter.ndim < 2 or "A_" in name else 0.3) * noise
    return model, {
        name: value.detach() for name, value in to_upstream_state_dict("shufflemamba", form, model.state_dict()).items()
    }


def _image(*size, batch=2):
    return torch.randn(batch, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


# ---------------------------------------------------------------- against the restatement

OPTIONS = [
    dict(size=(64, 48), norm="rms", num_classes=3),
    dict(size=(47, 80), norm="ln", img_size=(32, 64), num_classes=5, d_state=4),
    dict(size=(16, 16), norm="rms", img_size=32, num_classes=1, depth=1),
    dict(size=(24, 40), norm="ln", img_size=24, patch_size=8, embed_dim=20, rms_norm=True),
    dict(size=(40, 24), norm="rms", img_size=40, patch_size=8, channels=3, norm_epsilon=1e-5, num_cls_tokens=4),
]


def _grid(kwargs):
    size, patch = kwargs.get("img_size", 224), kwargs.get("patch_size", 16)
    rows, columns = (size, size) if isinstance(size, int) else size
    return (rows // patch, columns // patch)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_plain_classifier(options):
    pytest.importorskip("mmpretrain")
    kwargs = {"img_size": 32, **options}
    model, state = _built("classifier", **{key: value for key, value in kwargs.items() if key != "size"})
    image = _image(*options["size"])
    assert relative_error(model(image).detach(), plain.classify(state, image, _grid(kwargs))) < BOUND


@pytest.mark.parametrize(
    ("registers", "reduction", "size", "norm"),
    [(4, 2, (48, 80), "rms"), (1, 1, (32, 32), "ln"), (5, 4, (64, 48), "ln"), (3, 1, (16, 16), "rms"),
     (12, 8, (33, 70), "rms")],
    ids=str,
)  # fmt: skip
def test_the_classifier_with_registers(registers, reduction, size, norm):
    """Of images of other sizes, too, which upstream refuses, and of fewer patches than registers."""
    pytest.importorskip("mmpretrain")
    kwargs = dict(img_size=(48, 64), norm=norm, num_cls_tokens=registers, cls_reduce=reduction, num_classes=4)
    model, state = _built("classifier_reg", **kwargs)
    image = _image(*size)
    assert relative_error(model(image).detach(), plain.classify_registers(state, image, (3, 4))) < BOUND
    assert ("neck.weight" in state) == (reduction > 1)


@pytest.mark.parametrize(
    ("out_indices", "size", "norm"),
    [((0, 1, 2), (48, 80), "ln"), ((0,), (16, 112), "rms"), ((1, 2), (50, 37), "rms"), ((2,), (16, 16), "ln")],
    ids=str,
)
def test_the_feature_extractor(out_indices, size, norm):
    model, state = _built("backbone", img_size=32, norm=norm, out_indices=out_indices)
    image = _image(*size)
    theirs = plain.features(state, image, (2, 2), out_indices)
    ours = model(image)
    assert len(ours) == len(theirs)
    assert all(relative_error(a.detach(), b) < BOUND for a, b in zip(ours, theirs, strict=True))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert ("norm_f.weight" in trained) == (2 in out_indices)


def test_a_recorded_training_pass():
    """Of any layers, and not in evaluation."""
    pytest.importorskip("mmpretrain")
    permutations = [None, [3, 1, 4, 0, 2], [4, 3, 2, 1, 0]]
    kwargs = dict(img_size=32, norm="rms", num_classes=3, drop_path_rate=0.0, permutations=permutations)
    model, state = _built("classifier", **kwargs)
    image = _image(32, 32)
    model.eval()
    in_order = plain.classify(state, image, (2, 2))
    assert relative_error(model(image).detach(), in_order) < BOUND
    model.train()
    shuffled = plain.classify(state, image, (2, 2), permutations)
    assert relative_error(model(image).detach(), shuffled) < BOUND
    assert relative_error(shuffled, in_order) > 1e-3
    assert not [name for name in model.state_dict() if "shuffle" in name]
    with pytest.raises(ConfigError, match=r"permutations\[1\] is of 5 tokens, expected 7"):
        model(_image(32, 48))


def test_a_training_pass_by_its_seed():
    """What torch.rand and torch.randperm give in the order in which upstream calls them."""
    pytest.importorskip("mmpretrain")
    kwargs = dict(img_size=32, norm="ln", num_classes=3, depth=5, drop_path_rate=0.0, shuffle_rate=0.9)
    model, state = _built("classifier", **kwargs)
    model.train()
    image = _image(48, 32)
    torch.manual_seed(19)
    ours = model(image)
    after = torch.rand(1)
    torch.manual_seed(19)
    permutations = [
        torch.randperm(7).tolist() if torch.rand(1).item() < p else None for p in torch.linspace(0, 0.9, 5).tolist()
    ]
    assert torch.equal(after, torch.rand(1))  # as many numbers were drawn
    assert any(permutations) and permutations[0] is None
    assert relative_error(ours.detach(), plain.classify(state, image, (2, 2), permutations)) < BOUND


# ---------------------------------------------------------------- tokens


def test_registers_follow_groups_of_patches():
    """The example of the fact sheet, and grids with fewer patches than groups."""
    model = ShuffleMamba(dict(dim=16, depth=1, num_registers=12))
    assert model.token_positions((14, 14)) == tuple(15 + k * 16 for k in range(12))
    assert model.token_positions((1, 1)) == tuple(range(12))
    assert model(torch.randn(1, 3, 16, 16))[0].shape == (1, 16, 1, 1)


def test_what_is_returned():
    model = ShuffleMamba("nano", out_type="cls_token")
    assert [out.shape for out in model(torch.randn(2, 3, 40, 70))] == [(2, 3 * 24)]
    plain_model = ShuffleMamba(dict(dim=16, depth=2), out_type="cls_token", out_indices=(0, 1))
    assert [out.shape for out in plain_model(torch.randn(2, 3, 40, 70))] == [(2, 16)] * 2
    assert ShuffleMamba("nano", cls_token="none", out_type="avg_featmap")(torch.randn(2, 3, 32, 32))[0].shape == (2, 24)


@pytest.mark.parametrize(
    ("arch", "options", "told"),
    [
        ("nano", dict(cls_token="first"), "cls_token is 'first' with num_registers=3 in arch, expected 'spread' or"),
        ("tiny", dict(cls_token="spread"), "cls_token is 'spread' with num_registers=0 in arch, expected 'first'"),
        ("nano", dict(cls_token="last"), "cls_token is 'last', expected one of 'first', 'middle', 'spread', 'none'"),
        ("nano", dict(cls_token="none", out_type="cls_token"), "out_type is 'cls_token' but cls_token is 'none'"),
        (dict(dim=8, depth=1, num_registers=-1), {}, "num_registers is -1, expected an integer of at least 0"),
        ("nano", dict(shuffle_rate=1.5), "shuffle_rate is 1.5, expected a number in"),
        ("nano", dict(suffle_rate=0.5), "unknown argument 'suffle_rate'.*Did you mean 'shuffle_rate'"),
    ],
)  # fmt: skip
def test_bad_options(arch, options, told):
    with pytest.raises(ConfigError, match=told):
        ShuffleMamba(arch, **options)


@pytest.mark.parametrize("registers", [0, 3])
@pytest.mark.parametrize("size", [32, 64, (64, 32)], ids=str)
def test_a_classifier_starts_a_feature_extractor_without_tokens(registers, size):
    """Of any size: the class token and its row, or the registers, are left out; rows of patches are resized."""
    arch = dict(dim=8, depth=2, num_registers=registers)
    source = ShuffleMamba(arch, img_size=64).double()
    target = ShuffleMamba(arch, img_size=size, cls_token="none").double()
    state = source.state_dict()
    target.load_state_dict(state, strict=True)
    rows = state["pos_embed"][:, 1:] if not registers else state["pos_embed"]
    grid = (size // 16, size // 16) if isinstance(size, int) else (size[0] // 16, size[1] // 16)
    wanted = plain.position(rows, (4, 4), grid)
    assert relative_error(target.pos_embed.detach(), wanted) < 1e-6  # resized in float32
    assert all(torch.equal(value, state[name]) for name, value in target.state_dict().items() if name != "pos_embed")
    if registers:
        bigger = ShuffleMamba(arch, img_size=80).double()
        bigger.load_state_dict(state, strict=True)
        assert torch.equal(bigger.cls_token, source.cls_token)
        assert relative_error(bigger.pos_embed.detach(), plain.position(rows, (4, 4), (5, 5))) < 1e-6


def test_another_number_of_registers_does_not_fit():
    source = ShuffleMamba(dict(dim=8, depth=1, num_registers=3), img_size=32)
    for arch in (dict(dim=8, depth=1, num_registers=4), dict(dim=8, depth=1), dict(dim=16, depth=1, num_registers=3)):
        with pytest.raises(RuntimeError, match="cls_token"):
            ShuffleMamba(arch, img_size=32).load_state_dict(source.state_dict())


# ---------------------------------------------------------------- initial values


def test_initial_values_of_the_plain_model():
    model = ShuffleMamba(dict(dim=32, depth=4), img_size=64)
    assert not model.cls_token.any() and model.pos_embed.detach().std() == pytest.approx(0.02, rel=0.2)
    for block in model.layers:
        mixer = block.mixer
        assert not mixer.dt_proj.bias.any() and not mixer.dt_proj_b.bias.any()
        for layer in (mixer.in_proj, mixer.x_proj, mixer.x_proj_b, mixer.dt_proj, mixer.dt_proj_b):
            assert layer.weight.detach().std() == pytest.approx(0.02, rel=0.3)
        # Uniform up to one over the root of its inputs, divided by the root of the depth.
        assert mixer.out_proj.weight.detach().abs().max() == pytest.approx(64**-0.5 / 2, rel=0.05)
        assert torch.allclose(mixer.A_b_log[0], torch.arange(1, 17).log())


def test_initial_values_with_registers():
    model = ShuffleMamba(dict(dim=32, depth=2, num_registers=4), img_size=64)
    for token in (model.cls_token, model.pos_embed_cls, model.pos_embed):
        assert token.detach().std() == pytest.approx(0.02, rel=0.3)
    for block in model.layers:
        steps = torch.nn.functional.softplus(block.mixer.dt_proj.bias)
        assert steps.min() >= 1e-4 and steps.max() < 0.11 and not block.mixer.dt_proj_b.bias.any()
        assert block.mixer.in_proj.weight.detach().abs().max() == pytest.approx(32**-0.5, rel=0.05)


def test_stochastic_depth_is_that_of_the_layer_before():
    model = ShuffleMamba(dict(dim=8, depth=5), drop_path_rate=0.4)
    rates = [block.drop_path.rate for block in model.layers] + [model.drop_path.rate]
    assert rates == pytest.approx([0.0, 0.0, 0.1, 0.2, 0.3, 0.4])


# ---------------------------------------------------------------- head and converter


def test_the_head_of_registers():
    pytest.importorskip("mmpretrain")
    head = build_register_cls_head(5, 8, 3, reduction=4, norm="layer_norm", topk=(1,))
    assert {name: tuple(p.shape) for name, p in head.named_parameters()} == {
        "neck.weight": (2, 8), "norm.weight": (6,), "norm.bias": (6,), "fc.weight": (5, 6), "fc.bias": (5,)
    }  # fmt: skip
    assert head((torch.randn(2, 24),)).shape == (2, 5)
    assert {name for name, _ in build_register_cls_head(5, 8, 3).named_parameters()} == {"fc.weight", "fc.bias"}
    with pytest.raises(ConfigError, match=r"returns \(2, 8\), expected \(b, 24\), 3 registers of 8 channels"):
        head((torch.randn(2, 8),))
    kwargs = dict(SMALL, img_size=32, num_cls_tokens=2, cls_reduce=2, norm_epsilon=1e-3)
    for norm in ("rms", "ln"):
        model = from_upstream("shufflemamba", "classifier_reg", dict(kwargs, norm=norm))
        assert model.head.norm.eps == model.backbone.norm_f.eps == 1e-3


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (dict(num_registers=0), "num_registers is 0, expected an integer of at least 1"),
        (dict(reduction=3), "reduction is 3, expected a divisor of in_channels=8"),
        (dict(norm="batch_norm"), "norm is 'batch_norm', expected one of 'rms_norm', 'layer_norm'"),
    ],
)
def test_bad_heads(options, told):
    with pytest.raises(ConfigError, match=told):
        build_register_cls_head(**{**dict(num_classes=2, in_channels=8, num_registers=2), **options})


@pytest.mark.parametrize(
    ("form", "kwargs", "told"),
    [
        ("classifier", dict(function="models_reg.mambar_base_patch16_224"), "expected one of models_reg for"),
        ("classifier_reg", dict(function="models_shuffle.mambar_base_patch16_224"), "expected one of models_reg for"),
        ("classifier", dict(function="mambar_base"), "function is 'mambar_base', expected one of models_shuffle"),
        ("classifier", dict(norm="bn"), "norm is 'bn', expected one of 'rms', 'ln'"),
        ("classifier", dict(drop_rate=0.1), "drop_rate is 0.1, expected 0"),
        ("classifier", dict(depth=2, permutations=[[0, 1]]), "permutations has 1 entries, expected 2, one per layer"),
        ("classifier", dict(depth=1, permutations=[[0, 2]]), r"permutations\[0\] is \[0, 2\], expected every number"),
        ("backbone", dict(permutations=[]), "unknown argument 'permutations'"),
        ("adapter", dict(cffn_ration=0.5), "unknown argument 'cffn_ration'.*Did you mean 'cffn_ratio'"),
        ("classifier", dict(pretrained="x.pth"), "pretrained is 'x.pth', expected None"),
    ],
)  # fmt: skip
def test_bad_arguments_of_upstream(form, kwargs, told):
    with pytest.raises(ConfigError, match=told):
        from_upstream("shufflemamba", form, {"img_size": 16, **kwargs})


def test_entries_of_others_are_refused():
    state = ShuffleMamba("nano").state_dict()
    with pytest.raises(
        CheckpointMismatch, match=r"1 of \d+ entries are no entries of a ShuffleMamba feature extractor"
    ):
        convert_state_dict("shufflemamba", "backbone", {**state, "layers.0.attn.weight": state["norm_f.weight"]})
    with pytest.raises(CheckpointMismatch, match="fill_out_norms names stage 4, but the state dict has 4 stages"):
        convert_state_dict("shufflemamba", "backbone", state, fill_out_norms=(4,))


def test_rms_norms_for_adapters_and_all_their_arguments():
    """What no recorded case has: RMS norms, no perceptrons, nothing of the trunk added."""
    kwargs = dict(
        img_size=32, norm="rms", depth=4, interaction_indexes=[[0, 0], [1, 1], [2, 2], [3, 3]], conv_inplane=4,
        n_points=2, deform_num_heads=2, deform_ratio=0.5, with_cffn=False, add_vit_feature=False,
        use_extra_extractor=False, init_values=0.3, pretrain_size=224, out_indices=[0, 1, 2, 3],
    )  # fmt: skip
    model, state = _built("adapter", **kwargs)
    assert [out.shape for out in model(_image(40, 65))] == [
        (2, 8, math.ceil(40 / s), math.ceil(65 / s)) for s in (4, 8, 16, 32)
    ]
    again = from_upstream("shufflemamba", "adapter", {**SMALL, **kwargs}).double()
    again.load_state_dict(convert_state_dict("shufflemamba", "adapter", state), strict=True)
    image = _image(64, 32)
    assert all(torch.equal(a, b) for a, b in zip(model(image), again.eval()(image), strict=True))


def test_variants():
    """Widths and depths of upstream's functions; shuffle and tokens are options, not variants."""
    assert {name: (arch.dim, arch.depth, arch.num_registers) for name, arch in ARCHS.items() if name != "nano"} == {
        "tiny": (192, 24, 0), "small": (384, 24, 0), "middle": (576, 32, 0), "base": (768, 24, 0),
        "large40": (1024, 40, 0), "large48": (1024, 48, 0), "reg-tiny": (192, 24, 12), "reg-small": (384, 24, 12),
        "reg-base": (768, 24, 12), "reg-large": (1024, 48, 16),
    }  # fmt: skip
    assert [name for name, arch in ARCHS.items() if arch.norm == "layer_norm"] == ["middle"]


def test_half_precision_keeps_the_residual_in_float32():
    torch.manual_seed(0)
    model = ShuffleMamba("nano").bfloat16().eval()
    seen = []
    model.layers[2].register_forward_hook(lambda _module, args, out: seen.append((args[0].dtype, out.dtype)))
    image = torch.randn(1, 3, 48, 48)
    outs = model(image.bfloat16())
    assert seen == [(torch.float32, torch.bfloat16)] and {out.dtype for out in outs} == {torch.bfloat16}
    wide = copy.deepcopy(model).float()(image)
    assert all(relative_error(out.detach().float(), want.detach()) < 0.03 for out, want in zip(outs, wide, strict=True))
