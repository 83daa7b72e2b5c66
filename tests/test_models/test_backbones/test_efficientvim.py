"""What is special to EfficientViM: its numbers restated in float64, hidden states, heads, deployment form."""

import copy

import pytest
import torch
from torch.nn import functional as F

from mmvmamba.converters import convert_state_dict, from_upstream, to_upstream_state_dict
from mmvmamba.errors import ConfigError
from mmvmamba.models import EfficientViM, build_efficientvim_cls_head, fold_batch_norms
from mmvmamba.models.backbones.efficientvim import ARCHS, EfficientViMBlock, HiddenStateMixer
from mmvmamba.ops import use_backend
from mmvmamba.testing import relative_error, requires_extension

SMALL = dict(embed_dim=[16, 24, 32], depths=[1, 2, 1], state_dim=[9, 5, 3])

# ------------------------------------- the network, restated channel-first in upstream's names from its fact sheet


class Restated:
    """The network of a state dict of upstream, in float64."""

    def __init__(self, state):
        self.state = {name: value.double() for name, value in state.items() if value.is_floating_point()}
        self.stages = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("stages."))

    def conv(self, name, x, stride=1, norm=True, act=False):
        weight = self.state[f"{name}.conv.weight"]
        if weight.ndim == 3:  # a convolution of one dimension, over the tokens
            return torch.einsum("oi,bil->bol", weight[:, :, 0], x)
        x = F.conv2d(x, weight, None, stride, weight.shape[2] // 2, groups=x.shape[1] // weight.shape[1])
        if norm:
            mean, var, gain, shift = (
                self.state[f"{name}.norm.{field}"].view(-1, 1, 1)
                for field in ("running_mean", "running_var", "weight", "bias")
            )
            x = (x - mean) / (var + 1e-5).sqrt() * gain + shift
        return x.relu() if act else x

    def layer_norm(self, name, x):
        centred = x - x.mean(1, keepdim=True)
        scaled = centred / (centred.pow(2).mean(1, keepdim=True) + 1e-5).sqrt()
        return scaled * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]

    def mixer(self, name, x, size):
        n = len(self.state[f"{name}.A"])
        mixed = self.conv(f"{name}.dw", self.conv(f"{name}.BCdt_proj", x).unflatten(2, size), norm=False).flatten(2)
        b, c, dt = mixed[:, :n], mixed[:, n : 2 * n], mixed[:, 2 * n :]
        share = (dt + self.state[f"{name}.A"].view(1, -1, 1)).exp()
        share = share / share.sum(2, keepdim=True)
        h = torch.einsum("bcl,bnl->bcn", x, share * b)
        hz = self.conv(f"{name}.hz_proj", h)
        h, z = hz[:, : hz.shape[1] // 2], hz[:, hz.shape[1] // 2 :]
        h = self.conv(f"{name}.out_proj", h * z * torch.sigmoid(z) + h * self.state[f"{name}.D"])
        return torch.einsum("bcn,bnl->bcl", h, c).unflatten(2, size), h

    def block(self, name, x):
        a = torch.sigmoid(self.state[f"{name}.alpha"])[:, :, None, None]
        x = (1 - a[0]) * x + a[0] * self.conv(f"{name}.dwconv1", x)
        y, h = self.mixer(f"{name}.mixer", self.layer_norm(f"{name}.norm", x.flatten(2)), x.shape[2:])
        x = (1 - a[1]) * x + a[1] * y
        x = (1 - a[2]) * x + a[2] * self.conv(f"{name}.dwconv2", x)
        y = self.conv(f"{name}.ffn.fc2", self.conv(f"{name}.ffn.fc1", x, act=True))
        return (1 - a[3]) * x + a[3] * y, h

    def downsample(self, name, x):
        x = x + self.conv(f"{name}.dwconv1", x)
        x = self.conv(f"{name}.conv.1", self.conv(f"{name}.conv.0", x, act=True), stride=2, act=True)
        squeezed = x.mean((2, 3))
        for i, act in ((1, torch.relu), (2, torch.sigmoid)):
            weight, bias = (self.state[f"{name}.conv.2.fc{i}.{field}"] for field in ("weight", "bias"))
            squeezed = act(squeezed @ weight[:, :, 0, 0].T + bias)
        x = self.conv(f"{name}.conv.3", x * squeezed[:, :, None, None])
        return x + self.conv(f"{name}.dwconv2", x)

    def features(self, image):
        x = image.double()
        for i in range(4):
            x = self.conv(f"patch_embed.conv.{i}", x, stride=2, act=i < 3)
        maps, states = [], []
        for i in range(self.stages):
            depth = 1 + max(int(n.split(".")[3]) for n in self.state if n.startswith(f"stages.{i}.blocks."))
            for j in range(depth):
                x, h = self.block(f"stages.{i}.blocks.{j}", x)
            maps.append(x)
            states.append(h)
            if i < self.stages - 1:
                x = self.downsample(f"stages.{i}.downsample", x)
        return maps, states

    def scores(self, image):
        maps, states = self.features(image)
        pooled = [self.layer_norm(f"norm.{i}", h).mean(2) for i, h in enumerate(states)]
        pooled.append(self.layer_norm(f"norm.{len(states)}", maps[-1]).mean((2, 3)))
        sets = []
        for end in ("", "_dist"):
            if f"weights{end}" in self.state:
                shares = self.state[f"weights{end}"].softmax(0)
                sets.append(
                    sum(
                        share * (x @ self.state[f"heads{end}.{i}.weight"].T + self.state[f"heads{end}.{i}.bias"])
                        for i, (share, x) in enumerate(zip(shares, pooled, strict=True))
                    )
                )
        return sum(sets) / len(sets)


def _settled(model, seed=0):
    """Give every parameter a value that matters and every batch norm statistics that matter, and evaluate."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or "alpha" in name:
                parameter.add_(0.5 * torch.randn_like(parameter))
            else:
                parameter.mul_(2)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0, 0.2)
            elif name.endswith("running_var"):
                buffer.uniform_(0.1, 0.5)
    return model.eval()


@pytest.mark.parametrize("size", [(1, 1), (16, 17), (47, 150), (65, 33)], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(ssd_expand=1.5, mlp_ratio=1.3, state_dim=[1, 17, 2]),
        dict(ssd_expand=0.5, embed_dim=[24, 16], depths=[2, 1], state_dim=[3, 7], in_dim=2),
        dict(embed_dim=[9, 8, 10, 8], depths=[1, 1, 1, 1], state_dim=[2, 3, 4, 5]),
    ],
    ids=["usual", "wide", "two stages", "four stages"],
)
def test_it_computes_what_the_sheet_says(options, size):
    model = _settled(from_upstream("efficientvim", "backbone", SMALL | options))
    image = torch.randn(2, options.get("in_dim", 3), *size)
    restated = Restated(to_upstream_state_dict("efficientvim", "backbone", model.state_dict()))
    maps, states = restated.features(image)
    expected = [*maps, *(state.transpose(1, 2) for state in states), maps[-1]]
    # Layer norms of nearly equal channels enlarge the rounding of float32.
    for dtype, bound in ((torch.float32, 1e-4), (torch.float64, 1e-9)):
        found = []
        for model.out_type in ("featmap", "hidden_states"):
            found += model.to(dtype)(image.to(dtype))
        for have, want in zip(found, expected, strict=True):
            assert relative_error(have.detach(), want) < bound


@pytest.mark.parametrize("distillation", [False, True])
@pytest.mark.parametrize("size", [(32, 96), (50, 21)], ids=str)
def test_a_classifier_takes_every_image_size(distillation, size):
    """Upstream's takes squares only."""
    pytest.importorskip("mmpretrain")
    model = _settled(
        from_upstream("efficientvim", "classifier", SMALL | dict(num_classes=7, distillation=distillation))
    )
    image = torch.randn(2, 3, *size)
    restated = Restated(to_upstream_state_dict("efficientvim", "classifier", model.state_dict()))
    assert relative_error(model(image), restated.scores(image)) < 1e-5
    assert relative_error(fold_batch_norms(model)(image), restated.scores(image)) < 1e-5


def test_gradients_are_those_of_the_restatement():
    model = _settled(EfficientViM("nano")).double()
    state = to_upstream_state_dict("efficientvim", "backbone", model.state_dict())
    image = torch.randn(2, 3, 70, 90, dtype=torch.float64)
    ours, theirs = image.clone().requires_grad_(), image.clone().requires_grad_()
    sum(out.pow(2).mean() for out in model(ours)).backward()
    sum(out.pow(2).mean() for out in Restated(state).features(theirs)[0]).backward()
    assert relative_error(ours.grad, theirs.grad) < 1e-9


def test_a_has_no_influence_and_the_gradient_zero():
    """Which is not None: distributed training waits for it."""
    model = _settled(EfficientViM("nano"))
    image = torch.randn(1, 3, 64, 40)
    before = model(image)
    sum(out.sum() for out in before).backward()
    for name, parameter in model.named_parameters():
        if name.endswith("mixer.A"):
            assert torch.equal(parameter.grad, torch.zeros_like(parameter))
            parameter.data.uniform_(-50, 50)
    assert all(torch.equal(a, b) for a, b in zip(before, model(image), strict=True))


def test_hidden_states_of_the_stages_asked_for():
    model = EfficientViM("nano", out_indices=(0, 2), out_type="hidden_states").eval()
    outs = model(torch.randn(3, 3, 64, 96))
    assert [tuple(out.shape) for out in outs] == [(3, 9, 16), (3, 3, 32), (3, 32, 1, 2)]
    model = EfficientViM("nano", out_indices=(1,), out_type="hidden_states").eval()
    assert [tuple(out.shape) for out in model(torch.randn(1, 3, 64, 96))] == [(1, 5, 24), (1, 24, 2, 3)]
    unused = {name.split(".")[1] for name, p in model.named_parameters() if not p.requires_grad}
    assert unused == {"1", "2"}  # a downsampling and a stage


def test_no_weight_decay_for_norms_and_what_scans_have():
    model = EfficientViM("nano")
    spared = model.no_weight_decay()
    names = {name for name, _ in model.named_parameters()}
    assert spared <= names
    assert {name for name in names if name.endswith(("mixer.A", "mixer.D")) or ".norm." in name} == spared


def test_stochastic_depth_leaves_samples_as_they_are():
    block = EfficientViMBlock(16, 4, ARCHS["nano"], 0.9999).train()
    for norm in (block.dwconv1.norm, block.dwconv2.norm):
        norm.eval()
    x = torch.randn(2, 5, 5, 16)
    a = block.alpha.sigmoid()
    y = torch.lerp(x, block.dwconv1(x), a[0])
    torch.manual_seed(0)
    assert torch.allclose(block(x)[0], torch.lerp(y, block.dwconv2(y), a[2]), atol=1e-6)
    assert not torch.allclose(block.eval()(x)[0], torch.lerp(y, block.dwconv2(y), a[2]), atol=1e-3)


@pytest.mark.parametrize("mixer_type", [torch.float32, torch.bfloat16])
def test_the_sums_over_tokens_are_float32(mixer_type):
    """A constant map has, whatever its size, the state of one token."""
    mixer = HiddenStateMixer(8, 4).to(mixer_type).eval()
    mixer.dw.weight.data.zero_()[:, :, 1, 1] = 1
    x = torch.randn(8).to(mixer_type).expand(1, 90, 90, 8).contiguous()
    with torch.no_grad():
        (_, many), (_, one) = mixer(x), mixer(x[:, :1, :1])
    assert relative_error(many.float(), one.double()) < (1e-5 if mixer_type is torch.float32 else 2e-2)


@pytest.mark.parametrize(
    ("arch", "told"),
    [
        (dict(dims=[16, 24], depths=[1, 1], state_dims=[4]), "state_dims"),
        (dict(dims=[16], depths=[1], state_dims=[0]), "state_dims is"),
        (dict(dims=[16], depths=[1], state_dims=[4], mlp_ratio=0.01), "mlp_ratio is 0.01"),
        (dict(dims=[16], depths=[1], state_dims=[4], expansion="a"), "expansion is 'a'"),
        (dict(dims=[7], depths=[1], state_dims=[4]), "expected at least 8"),
        (dict(dims=[16], depths=[1]), "state_dims missing"),
    ],
)
def test_impossible_archs_are_refused(arch, told):
    with pytest.raises(ConfigError, match=told):
        EfficientViM(arch, out_indices=(0,))


def test_impossible_outputs_are_refused():
    with pytest.raises(ConfigError, match="out_type is 'featmaps'"):
        EfficientViM("nano", out_type="featmaps")


# ---------------------------------------------------------------- constructor arguments


def test_upstream_freezes_the_stem_alone():
    model = from_upstream("efficientvim", "backbone", SMALL | dict(frozen_stages=3))
    frozen = {name.split(".")[0] for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"patch_embed"} and model.frozen_stages == 0


def test_upstreams_feature_extractor_keeps_its_statistics_while_training():
    model = from_upstream("efficientvim", "backbone", SMALL).train()
    assert not [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm) and m.training]
    assert model.layers[0].blocks[0].dwconv1.norm.weight.requires_grad


def test_the_backbones_of_upstreams_configs():
    with torch.device("meta"):
        for kind, name in (("EfficientViM_M4", "m4"), ("EfficientViM", "m2")):
            told = dict(type=kind, pretrained=None, frozen_stages=-1, in_channels=[224, 320, 512])
            assert from_upstream("efficientvim", "backbone", told).arch == ARCHS[name]
    with pytest.raises(ConfigError, match="'EfficientVim_M4'.*Did you mean 'EfficientViM_M4'"):
        from_upstream("efficientvim", "backbone", dict(type="EfficientVim_M4"))


def test_upstream_arguments_are_checked():
    with pytest.raises(ConfigError, match="unknown argument 'ssd_expands'.*ssd_expand"):
        from_upstream("efficientvim", "backbone", SMALL | dict(ssd_expands=1))
    with pytest.raises(ConfigError, match="function is 'EfficientViM_M5'"):
        from_upstream("efficientvim", "backbone", dict(function="EfficientViM_M5"))
    with pytest.raises(ConfigError, match="pretrained is"):
        from_upstream("efficientvim", "backbone", SMALL | dict(pretrained="file.pth"))


def test_a_distilled_classifier_starts_a_feature_extractor():
    pytest.importorskip("mmpretrain")
    classifier = from_upstream("efficientvim", "classifier", SMALL | dict(num_classes=3, distillation=True))
    state = to_upstream_state_dict("efficientvim", "classifier", classifier.state_dict())
    backbone = from_upstream("efficientvim", "backbone", SMALL)
    backbone.load_state_dict(
        convert_state_dict("efficientvim", "backbone", state, fill_out_norms=(0, 1, 2)), strict=True
    )
    assert torch.equal(backbone.layers[1].blocks[0].alpha, classifier.backbone.layers[1].blocks[0].alpha)


# ---------------------------------------------------------------- the head


def _samples(labels):
    from mmpretrain.structures import DataSample

    return [DataSample().set_gt_label(label) for label in labels]


@pytest.mark.parametrize("distillation", [False, True])
def test_the_head_trains(distillation):
    pytest.importorskip("mmpretrain")
    from mmengine.registry import DefaultScope

    with DefaultScope.overwrite_default_scope("mmpretrain"):
        head = build_efficientvim_cls_head(5, (8, 16), distillation, cal_acc=True).train()
    feats = (torch.randn(2, 3, 8), torch.randn(2, 4, 16), torch.randn(2, 16, 1, 2))
    scores = head(feats)
    assert isinstance(scores, tuple) is distillation
    losses = head.loss(feats, _samples([0, 4]))
    assert set(losses) == {"loss", "accuracy_top-1"}
    each = [F.cross_entropy(s, torch.tensor([0, 4])) for s in (scores if distillation else (scores,))]
    assert losses["loss"].item() == pytest.approx(sum(each).item() / len(each), rel=1e-5)
    losses["loss"].backward()
    assert all(p.grad is not None for p in head.parameters())
    with torch.no_grad():
        assert len(head.eval().predict(feats)) == 2


@pytest.mark.parametrize("bad", [dict(num_classes=0), dict(in_channels=[]), dict(in_channels=8), dict(in_channels=[0])])
def test_impossible_heads_are_refused(bad):
    with pytest.raises(ConfigError, match="EfficientViMClsHead: num_classes is"):
        build_efficientvim_cls_head(**(dict(num_classes=3, in_channels=(8,)) | bad))


# ---------------------------------------------------------------- the deployment form


@pytest.mark.parametrize("backend", ["reference", pytest.param("compiled", marks=requires_extension())])
@pytest.mark.parametrize("out_type", ["featmap", "hidden_states"])
def test_the_deployment_form_computes_the_same_in_every_way(backend, out_type):
    """Directly, through the modules (with gradients), in a batch, in float64 and for one pixel."""
    model = _settled(EfficientViM("nano", out_type=out_type))
    deployed = fold_batch_norms(model)
    assert not [name for name, _ in deployed.named_parameters() if name.endswith("alpha")]
    assert not any(p.requires_grad for name, p in deployed.named_parameters() if ".se." not in name)
    with use_backend(backend):
        for size in ((1, 1), (70, 90)):
            image = torch.randn(2, 3, *size)
            with torch.no_grad():
                expected, direct = model.double()(image.double()), deployed.float()(image)
            through = deployed(image.clone().requires_grad_())
            with torch.no_grad():
                double = copy.deepcopy(deployed).double()(image.double())
            for want, a, b, c in zip(expected, direct, through, double, strict=True):
                assert relative_error(a, want) < 1e-5
                assert relative_error(b.detach(), want) < 1e-5
                assert relative_error(c, want) < 1e-5


def test_hooks_inside_a_deployment_form_are_called():
    deployed = fold_batch_norms(_settled(EfficientViM("nano")))
    block = deployed.layers[0].blocks[0]
    seen = []
    for module in (block.mixer.hz_proj, block.ffn.fc1.conv, block.dwconv1, block.norm):
        module.register_forward_hook(lambda module, *_: seen.append(module))
    with torch.no_grad():
        deployed(torch.randn(1, 3, 64, 64))
    assert len(seen) == 4


def test_a_distilled_head_is_one_linear_map_when_deployed():
    pytest.importorskip("mmpretrain")
    model = _settled(from_upstream("efficientvim", "classifier", SMALL | dict(num_classes=3, distillation=True)))
    deployed = fold_batch_norms(model)
    heads = {name: p.shape for name, p in deployed.head.named_parameters() if not name.startswith("norm.")}
    assert heads == {"fused.fc.weight": (3, 16 + 24 + 32 + 32), "fused.fc.bias": (3,)}
    other = fold_batch_norms(_settled(copy.deepcopy(model), seed=1))
    other.load_state_dict(deployed.state_dict(), strict=True)
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(other(image), deployed(image))
