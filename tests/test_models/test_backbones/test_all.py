"""What every registered backbone promises; a new family is tested by being registered (with an arch ``nano``)."""

import dataclasses
import gzip
import json
import math
import re
from pathlib import Path

import pytest
import torch
from mmengine.model import convert_sync_batchnorm
from mmengine.model.weight_init import PretrainedInit

from mmvmamba.converters.base import load_converter
from mmvmamba.errors import CheckpointMismatch, ConfigError, OpInputError
from mmvmamba.models.backbones import FAMILIES
from mmvmamba.models.backbones.base import BaseBackbone, Block
from mmvmamba.models.layers import BatchNorm
from mmvmamba.registry import MODELS

BACKBONES = list(FAMILIES.values())
PARITY = Path(__file__).parents[2] / "data" / "parity"


def _with_batch_norms(backbone, **options):
    """Return a small model with batch norms, or None where the family has none."""
    if any(field.name == "norm" for field in dataclasses.fields(backbone("nano").arch)):
        return backbone(dict(dims=[8, 16], depths=[1, 1], norm="batch_norm"), **options, out_indices=(1,))
    model = backbone("nano", **options)
    return model if any(isinstance(module, BatchNorm) for module in model.modules()) else None


BATCH_NORMED = [backbone for backbone in BACKBONES if _with_batch_norms(backbone) is not None]
every_backbone = pytest.mark.parametrize("backbone", BACKBONES, ids=lambda cls: cls.__name__)
every_batch_normed = pytest.mark.parametrize("backbone", BATCH_NORMED, ids=lambda cls: cls.__name__)


def _image(height, width, batch=1):
    return torch.randn(batch, 3, height, width)


def test_the_list_of_families_is_the_registry():
    registered = [cls for cls in MODELS.module_dict.values() if isinstance(cls, type) and issubclass(cls, BaseBackbone)]
    assert set(registered) == set(BACKBONES) and FAMILIES["vmamba"].__name__ == "VMamba"
    assert {"VMamba"} <= {cls.__name__ for cls in BATCH_NORMED}


@every_backbone
@pytest.mark.parametrize("size", [(1, 1), (31, 33), (64, 96), (65, 97), (3, 70)], ids=str)
def test_shapes_and_backward(backbone, size):
    model = backbone("nano").train()
    outs = model(_image(*size, batch=2))
    assert isinstance(outs, tuple)
    # A stem rounds up, or, of patches that do not overlap, down; what follows rounds up.
    stems = [tuple(math.ceil(side / 4) for side in size), tuple(max(side // 4, 1) for side in size)]
    assert outs[0].shape[2:] in stems
    for i, out in enumerate(outs):
        assert out.shape[2:] == tuple(math.ceil(side / 2**i) for side in outs[0].shape[2:])
        assert out.is_contiguous()
    sum(out.pow(2).mean() for out in outs).backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not missing


@every_backbone
def test_parameters_are_contiguous(backbone):
    """What FSDP, LBFGS and safetensors ask for."""
    model = backbone("nano")
    assert not [name for name, t in model.state_dict().items() if not t.is_contiguous()]
    assert torch.nn.utils.parameters_to_vector(model.parameters()).ndim == 1


@every_backbone
@pytest.mark.parametrize("out_indices", [(0,), (3,), (1, 2), [0, 3]], ids=str)
def test_out_indices_select(backbone, out_indices):
    every = backbone("nano").eval()
    some = backbone("nano", out_indices=out_indices).eval()
    some.load_state_dict(every.state_dict(), strict=False)
    image = _image(40, 56)
    for i, out in zip(out_indices, some(image), strict=True):
        torch.testing.assert_close(out, every(image)[i], rtol=0, atol=0)


@every_backbone
@pytest.mark.parametrize("out_indices", [(), (4,), (-1,), (1, 1), (2, 1), (0.0,), "0", None], ids=str)
def test_bad_out_indices(backbone, out_indices):
    with pytest.raises(ConfigError, match=r"out_indices is .*expected distinct stages from 0 to 3"):
        backbone("nano", out_indices=out_indices)


@every_backbone
def test_bad_arguments(backbone):
    with pytest.raises(ConfigError, match=r"arch is 'nanoo'.*Did you mean 'nano'\?"):
        backbone("nanoo")
    with pytest.raises(ConfigError, match=r"unknown argument 'out_indexes'.*Did you mean 'out_indices'\?"):
        backbone("nano", out_indexes=(0,))
    with pytest.raises(ConfigError, match=r"frozen_stages is 5, expected an integer from -1"):
        backbone("nano", frozen_stages=5)
    with pytest.raises(ConfigError, match=r"arch: unknown key 'depth'.*Did you mean 'depths'\?"):
        backbone(dict(dims=[8], depth=[1]))
    nano = dataclasses.asdict(backbone("nano").arch)
    for name, value in (("dims", 96), ("depths", 2), ("dims", [8, 16.0, 32, 64])):  # 96: how upstream writes four
        with pytest.raises(ConfigError, match=rf"arch: {name} is .*expected positive integers, one per stage"):
            backbone({**nano, name: value})


@every_backbone
def test_bad_input(backbone):
    model = backbone("nano")
    with pytest.raises(OpInputError, match=r"shape \(1, 4, 8, 8\).*in_channels=3"):
        model(torch.randn(1, 4, 8, 8))
    with pytest.raises(OpInputError, match="expected a floating dtype"):
        model(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(OpInputError, match="height and width of at least 1"):
        model(torch.zeros(1, 3, 0, 8))


@every_backbone
def test_other_in_channels(backbone):
    for out in backbone("nano", in_channels=5)(torch.randn(2, 5, 16, 16)):
        assert out.isfinite().all()


@every_backbone
@pytest.mark.parametrize("frozen_stages", [0, 1, 4])
def test_freezing(backbone, frozen_stages):
    model = backbone("nano", frozen_stages=frozen_stages, drop_path_rate=0.2).train()
    sum(out.mean() for out in model(_image(32, 32, batch=2))).backward() if frozen_stages < 4 else None
    for name, parameter in model.named_parameters():
        head = name.split(".")[0]
        stage = int(name.split(".")[1]) if head == "layers" else int(head[-1]) if head.startswith("outnorm") else -1
        frozen = stage < frozen_stages
        assert parameter.requires_grad is not frozen, name
        assert not (frozen and parameter.grad is not None), name
    assert model.patch_embed.training is False
    assert all(model.layers[i].training is (i >= frozen_stages) for i in range(4))


@every_backbone
def test_unused_stages_want_no_gradient(backbone):
    """Every parameter that wants a gradient gets one, else distributed training stops; no name is lost."""
    model = backbone("nano", out_indices=(0, 1)).train()
    sum(out.pow(2).mean() for out in model(_image(32, 32))).backward()
    wanting = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert wanting == {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert not any(name.startswith(("layers.2", "layers.3", "layers.1.downsample")) for name in wanting)
    assert {name for name in backbone("nano").state_dict() if name.startswith("layers")} < set(model.state_dict())


@every_batch_normed
def test_norm_eval(backbone):
    model = _with_batch_norms(backbone, norm_eval=True).train()
    before = {name: value.clone() for name, value in model.state_dict().items() if "running" in name}
    model(_image(32, 32, batch=2))
    assert before
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


@every_batch_normed
@pytest.mark.parametrize("convert", [convert_sync_batchnorm, torch.nn.SyncBatchNorm.convert_sync_batchnorm])
def test_synchronised_batch_norm_is_refused(backbone, convert):
    model = convert(_with_batch_norms(backbone))
    with pytest.raises(ConfigError, match=r"became SyncBatchNorm.*Remove sync_bn"):
        model.train()


@every_backbone
def test_checkpointing_changes_nothing(backbone):
    plain, cheap = backbone("nano").train(), backbone("nano", with_cp=True).train()
    cheap.load_state_dict(plain.state_dict())
    image = _image(40, 24)
    for model in (plain, cheap):
        sum(out.pow(2).mean() for out in model(image)).backward()
    for a, b in zip(plain.parameters(), cheap.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=0)


@every_backbone
def test_state_dict_round_trip(backbone):
    a, b = backbone("nano").eval(), backbone("nano").eval()
    b.load_state_dict(a.state_dict(), strict=True)
    image = _image(33, 47)
    for x, y in zip(a(image), b(image), strict=True):
        assert torch.equal(x, y)


@every_backbone
def test_batch_equals_singles(backbone):
    model, images = backbone("nano").eval(), _image(33, 47, batch=3)
    batch = model(images)
    for i in range(3):
        for whole, single in zip(batch, model(images[i : i + 1]), strict=True):
            torch.testing.assert_close(whole[i : i + 1], single, rtol=1e-5, atol=1e-5)


@every_backbone
def test_memory_layout_of_the_input_does_not_matter(backbone):
    model, image = backbone("nano").eval(), _image(33, 47, batch=2)
    flipped = image.flip(-1).flip(-1)
    sliced = torch.cat([image, image], 3)[..., :47]
    for other in (image.contiguous(memory_format=torch.channels_last), flipped, sliced):
        for a, b in zip(model(image), model(other), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


@every_backbone
def test_empty_batch(backbone):
    model = backbone("nano")
    outs = model(_image(32, 32, batch=0))
    assert [out.shape[0] for out in outs] == [0] * 4
    sum(out.sum() for out in outs).backward()


@every_backbone
def test_half_precision_keeps_its_dtype_and_is_close(backbone):
    model, image = backbone("nano").eval(), _image(32, 48)
    with torch.no_grad():
        expected = model(image)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model(image)
        narrow = model.bfloat16()(image.bfloat16())
    for a, b, want in zip(mixed, narrow, expected, strict=True):
        assert b.dtype == torch.bfloat16
        assert float((a.float() - want).abs().max() / want.abs().max()) < 0.05
        assert float((b.float() - want).abs().max() / want.abs().max()) < 0.08


@every_backbone
def test_layer_depth(backbone):
    model = backbone("nano")
    last = sum(model.depths) + 1
    depths = {name: model.get_layer_depth("backbone." + name, "backbone.") for name, _ in model.named_parameters()}
    assert {count for _, count in depths.values()} == {last + 1}
    assert {depth for depth, _ in depths.values()} == set(range(last + 1))
    assert {depths[name][0] for name in depths if name.startswith("patch_embed.")} == {0}
    assert depths["outnorm0.weight"][0] == last
    assert model.get_layer_depth("head.fc.weight", "backbone.") == (last, last + 1)


def _names_of_the_head(backbone):
    """Return what upstream's classifiers of the family have and its feature extractors have not."""
    (family,) = [family for family, cls in FAMILIES.items() if cls is backbone]
    path = next(path for path in sorted((PARITY / family).glob("*.keys.json.gz")) if "_backbone" not in path.name)
    names = json.loads(gzip.decompress(path.read_bytes()))["keys"]
    head = [name for name in names if re.fullmatch(load_converter(family).head, name)]
    assert head
    return head


@every_backbone
def test_blocks_are_known_as_such(backbone):
    """FSDP wraps them, and the learning rates of layers count them."""
    model = backbone("nano")
    assert all(isinstance(block, Block) for layer in model.layers for block in layer.blocks)
    assert sum(isinstance(module, Block) for module in model.modules()) == sum(model.depths)


@every_backbone
def test_pretrained_weights_load_strictly(backbone, tmp_path):
    source = backbone("nano")
    state = {f"backbone.{k}": v for k, v in source.state_dict().items()}
    torch.save({"state_dict": {**state, "head.fc.weight": torch.zeros(1)}}, tmp_path / "good.pth")
    init = dict(type="Pretrained", checkpoint=str(tmp_path / "good.pth"), prefix="backbone.")
    model = backbone("nano", out_indices=(1, 3), init_cfg=init)
    model.init_weights()
    for name, value in model.state_dict().items():
        assert torch.equal(value, source.state_dict()[name])
    assert model.is_init

    without_norms = {k: v for k, v in source.state_dict().items() if not k.startswith("outnorm")}
    head = {name: torch.zeros(1) for name in _names_of_the_head(backbone)}
    torch.save({"model": {**without_norms, **head}}, tmp_path / "imagenet.pth")
    model = backbone("nano", init_cfg=dict(type="Pretrained", checkpoint=str(tmp_path / "imagenet.pth")))
    model.init_weights()
    assert torch.equal(model.outnorm2.weight, torch.ones_like(model.outnorm2.weight))
    taken = {name for name in model.state_dict() if not name.startswith("outnorm")}
    assert all(torch.equal(model.state_dict()[name], source.state_dict()[name]) for name in taken)

    with pytest.raises(CheckpointMismatch, match=r"none of \d+ entries begins with prefix 'nothing\.'.*'backbone'"):
        backbone("nano", init_cfg=dict(init, prefix="nothing.")).init_weights()
    with pytest.raises(CheckpointMismatch, match=r"size mismatch|does not fit"):
        backbone("nano", in_channels=1, init_cfg=init).init_weights()


SPELLINGS = {
    "plain": lambda entry: entry,
    "scope": lambda entry: {**entry, "type": "mmengine.Pretrained"},
    "class": lambda entry: {**entry, "type": PretrainedInit},
    "list": lambda entry: [entry],
    "list with scope": lambda entry: [{**entry, "type": "mmengine.Pretrained"}],
    "after another": lambda entry: [dict(type="Constant", layer="Linear", val=0.5), entry],
    "before another": lambda entry: [entry, dict(type="Constant", layer="Linear", val=0.5)],
}


@every_backbone
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_pretrained_is_strict(backbone, spelling, tmp_path):
    source, spell = backbone("nano"), SPELLINGS[spelling]
    path = tmp_path / "good.pth"
    torch.save(source.state_dict(), path)
    entry = dict(type="Pretrained", checkpoint=str(path))
    model = backbone("nano", init_cfg=spell(entry))
    model.init_weights()
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in model.state_dict().items())
    assert model.init_cfg == spell(entry)

    torch.save({k: v for k, v in source.state_dict().items() if not k.startswith("layers.3")}, tmp_path / "part.pth")
    with pytest.raises(CheckpointMismatch, match=r"entries missing \['layers\.3"):
        backbone("nano", init_cfg=spell(dict(entry, checkpoint=str(tmp_path / "part.pth")))).init_weights()
    with pytest.raises(ConfigError, match=r"unknown key 'prefx'.*Did you mean 'prefix'\?"):
        backbone("nano", init_cfg=spell(dict(entry, prefx="backbone."))).init_weights()
    with pytest.raises(ConfigError, match="checkpoint is None, expected a file"):
        backbone("nano", init_cfg=spell(dict(type=entry["type"]))).init_weights()


def test_pretrained_weights_need_a_type():
    """Else the option that replaces the weights of one recipe would end in MMEngine's KeyError in another without."""
    with pytest.raises(ConfigError, match=r"init_cfg: type missing, found \['checkpoint'\].*init_cfg.type=Pretrained"):
        BACKBONES[0]("nano", init_cfg=dict(checkpoint="weights.pth")).init_weights()


@every_backbone
def test_out_norms_are_taken_all_or_none(backbone, tmp_path):
    """The final norm of a classifier is no output norm of a detector; an unknown norm is an error."""
    classifier = backbone("nano", out_indices=(3,))
    torch.nn.init.constant_(classifier.outnorm3.weight, 7.0)
    path = tmp_path / "cls.pth"
    torch.save(classifier.state_dict(), path)
    for out_indices, weight in (((3,), 7.0), ((0, 1, 2, 3), 1.0), ((2, 3), 1.0)):
        init = dict(type="Pretrained", checkpoint=str(path))
        model = backbone("nano", out_indices=out_indices, init_cfg=init)
        model.init_weights()
        assert float(model.outnorm3.weight.min()) == float(model.outnorm3.weight.max()) == weight
    for name in ("outnorm4.weight", "outnorm3.scale", "outnorms.weight"):
        torch.save({**classifier.state_dict(), name: torch.ones(256)}, path)
        with pytest.raises(CheckpointMismatch, match=rf"1 unexpected \['{name}'"):
            backbone("nano", init_cfg=dict(type="Pretrained", checkpoint=str(path))).init_weights()
