"""What every registered backbone promises; a new family is tested by being registered (with an arch ``nano``)."""

import dataclasses
import functools
import gzip
import inspect
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
from mmvmamba.models.backbones.base import BaseBackbone, Block, Stage
from mmvmamba.models.layers import BatchNorm
from mmvmamba.registry import MODELS

BACKBONES = list(FAMILIES.values())
PARITY = Path(__file__).parents[2] / "data" / "parity"


def _with_batch_norms(backbone, **options):
    """Return a small model with batch norms, or None where the family has none."""
    fields = {field.name for field in dataclasses.fields(backbone("nano").arch)}
    if fields >= {"norm", "dims", "depths"}:
        return backbone(dict(dims=[8, 16], depths=[1, 1], norm="batch_norm"), **options, out_indices=(1,))
    model = backbone("nano", **options)
    return model if any(isinstance(module, BatchNorm) for module in model.modules()) else None


@functools.cache
def _stages(backbone):
    """Return the number of stages of ``nano``."""
    return len(backbone("nano").depths)


def _last_norm(backbone):
    """Return the out norm of the last stage, or None where the family has none."""
    return getattr(backbone("nano"), f"outnorm{_stages(backbone) - 1}", None)


def _part(model, name):
    """Return ``"stem"`` or the number of the stage that a parameter belongs to, or None."""
    first, second = (*name.split("."), "")[:2]
    if first in model.stem_names:
        return "stem"
    if first == "layers":
        return int(second)
    mine = model.get_parameter(name)
    owners = (i for i in range(len(model.depths)) for part in model.parts_of_stage(i)
              if any(mine is parameter for parameter in part.parameters()))  # fmt: skip
    return next(owners, None)


BATCH_NORMED = [backbone for backbone in BACKBONES if _with_batch_norms(backbone) is not None]
every_backbone = pytest.mark.parametrize("backbone", BACKBONES, ids=lambda cls: cls.__name__)
HIERARCHICAL = [backbone for backbone in BACKBONES if any(isinstance(m, Stage) for m in backbone("nano").modules())]
OUT_NORMED = [backbone for backbone in BACKBONES if _last_norm(backbone) is not None]
every_hierarchical = pytest.mark.parametrize("backbone", HIERARCHICAL, ids=lambda cls: cls.__name__)
every_out_normed = pytest.mark.parametrize("backbone", OUT_NORMED, ids=lambda cls: cls.__name__)
every_batch_normed = pytest.mark.parametrize("backbone", BATCH_NORMED, ids=lambda cls: cls.__name__)


def _image(height, width, batch=1):
    return torch.randn(batch, 3, height, width)


def test_the_list_of_families_is_the_registry():
    registered = [cls for cls in MODELS.module_dict.values() if isinstance(cls, type) and issubclass(cls, BaseBackbone)]
    assert set(registered) == set(BACKBONES) and FAMILIES["vmamba"].__name__ == "VMamba"
    for some in (BATCH_NORMED, HIERARCHICAL, OUT_NORMED):
        assert {"VMamba"} <= {cls.__name__ for cls in some}


@every_backbone
@pytest.mark.parametrize("size", [(1, 1), (31, 33), (64, 96), (65, 97), (3, 70)], ids=str)
def test_shapes_and_backward(backbone, size):
    model = backbone("nano").train()
    outs = model(_image(*size, batch=2))
    assert isinstance(outs, tuple)
    strides = [model.stage_strides[i] for i in model.out_indices]
    channels = [model.stage_channels[i] for i in model.out_indices]
    assert [out.shape[:2] for out in outs] == [(2, c) for c in channels]
    # A stem rounds up, or, of patches that do not overlap, down; what follows rounds up.
    sides = [[math.ceil(side / strides[0]), max(side // strides[0], 1)] for side in size]
    assert all(found in possible for found, possible in zip(outs[0].shape[2:], sides, strict=True))
    for out, stride in zip(outs, strides, strict=True):
        assert out.shape[2:] == tuple(math.ceil(side * strides[0] / stride) for side in outs[0].shape[2:])
        assert out.is_contiguous()
    sum(out.pow(2).mean() for out in outs).backward()
    wanting = [(name, p.grad) for name, p in model.named_parameters() if p.requires_grad]
    missing = [name for name, grad in wanting if grad is None or not grad.isfinite().all()]
    assert wanting and not missing


@every_backbone
def test_parameters_are_contiguous(backbone):
    """What FSDP, LBFGS and safetensors ask for."""
    model = backbone("nano")
    assert not [name for name, t in model.state_dict().items() if not t.is_contiguous()]
    assert torch.nn.utils.parameters_to_vector(model.parameters()).ndim == 1


@every_backbone
@pytest.mark.parametrize("which", ["first", "last", "inner", "ends as a list"])
def test_out_indices_select(backbone, which):
    n = _stages(backbone)
    out_indices = {"first": (0,), "last": (n - 1,), "inner": (1, 2)[: n - 1], "ends as a list": [0, n - 1]}[which]
    every = backbone("nano", out_indices=tuple(range(n))).eval()
    some = backbone("nano", out_indices=out_indices).eval()
    taken = some.load_state_dict(every.state_dict(), strict=False)
    assert not taken.missing_keys
    image = _image(40, 56)
    for i, out in zip(out_indices, some(image), strict=True):
        torch.testing.assert_close(out, every(image)[i], rtol=0, atol=0)


@every_backbone
@pytest.mark.parametrize("out_indices", [(), ("n",), (-1,), (1, 1), (2, 1), (0.0,), "0", None], ids=str)
def test_bad_out_indices(backbone, out_indices):
    n = _stages(backbone)
    if out_indices == ("n",):
        out_indices = (n,)
    if out_indices is None and inspect.signature(backbone.__init__).parameters["out_indices"].default is None:
        pytest.skip("None chooses by the depth")
    with pytest.raises(ConfigError, match=rf"out_indices is .*expected distinct \w+ from 0 to {n - 1}"):
        backbone("nano", out_indices=out_indices)


@every_backbone
def test_bad_arguments(backbone):
    with pytest.raises(ConfigError, match=r"arch is 'nanoo'.*Did you mean 'nano'\?"):
        backbone("nanoo")
    with pytest.raises(ConfigError, match=r"unknown argument 'out_indexes'.*Did you mean 'out_indices'\?"):
        backbone("nano", out_indexes=(0,))
    n = _stages(backbone)
    with pytest.raises(ConfigError, match=rf"frozen_stages is {n + 1}, expected an integer from -1"):
        backbone("nano", frozen_stages=n + 1)
    nano = {
        field.name: getattr(backbone("nano").arch, field.name) for field in dataclasses.fields(backbone("nano").arch)
    }
    name = next(iter(nano))
    with pytest.raises(ConfigError, match=rf"arch: unknown key '{name}x'.*Did you mean '{name}'\?"):
        backbone({**nano, f"{name}x": 1})
    for name, value in (("dims", 96), ("depths", 2), ("dims", [8, 16.0, 32, 64])):  # 96: how upstream writes four
        if name in nano:
            with pytest.raises(ConfigError, match=rf"arch: {name} is .*expected positive integers, one per stage"):
                backbone({**nano, name: value})
    for name, value in (("dim", [96]), ("depth", 0)):
        if name in nano:
            with pytest.raises(ConfigError, match=rf"arch: {name} is .*expected a positive integer"):
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


@pytest.mark.parametrize("option", [{"in_channels": 0}, {"in_channels": "3"}, {"drop_path_rate": "0.1"}], ids=str)
@every_backbone
def test_impossible_numbers_are_refused(backbone, option):
    with pytest.raises(ConfigError, match=r"in_channels is|drop path rate is"):
        backbone("nano", **option)


@every_backbone
@pytest.mark.parametrize("which", ["stem", "one", "all"])
def test_freezing(backbone, which):
    n = _stages(backbone)
    frozen_stages = {"stem": 0, "one": 1, "all": n}[which]
    model = backbone("nano", frozen_stages=frozen_stages, drop_path_rate=0.2).train()
    wanting = {name for name, parameter in backbone("nano").named_parameters() if parameter.requires_grad}
    if which != "all":
        sum(out.mean() for out in model(_image(32, 32, batch=2))).backward()
    parts = {name: _part(model, name) for name, _ in model.named_parameters()}
    assert {"stem", *range(n)} - {i for i, depth in enumerate(model.depths) if depth == 0} <= set(parts.values())
    for name, parameter in model.named_parameters():
        frozen = parts[name] == "stem" or (parts[name] is not None and parts[name] < frozen_stages)
        assert parameter.requires_grad is (not frozen and name in wanting), name
        assert not (frozen and parameter.grad is not None), name
    stem = [getattr(model, name, None) for name in model.stem_names]
    assert stem and not any(part.training for part in stem if isinstance(part, torch.nn.Module))
    for i in range(n):
        assert all(part.training is (i >= frozen_stages) for part in model.parts_of_stage(i))


@every_backbone
def test_unused_stages_want_no_gradient(backbone):
    """Every parameter that wants a gradient gets one, else distributed training stops; no name is lost."""
    model = backbone("nano", out_indices=(0, 1)).train()
    # Batch norms that train want two pixels, also at a stride of 32.
    sum(out.pow(2).mean() for out in model(_image(32, 64))).backward()
    wanting = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert wanting == {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    if backbone in HIERARCHICAL:
        assert not any(re.match(r"layers\.([2-9]|1\.downsample)", name) for name in wanting)
    assert wanting < {name for name, parameter in backbone("nano").named_parameters() if parameter.requires_grad} | {
        name for name in wanting if name.startswith("outnorm")
    }
    assert {name for name in backbone("nano").state_dict() if name.startswith("layers")} <= set(model.state_dict())


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
    image = _image(40, 72)
    for model in (plain, cheap):
        sum(out.pow(2).mean() for out in model(image)).backward()
    grads = [{name: p.grad for name, p in m.named_parameters() if p.grad is not None} for m in (plain, cheap)]
    assert grads[0] and set(grads[0]) == set(grads[1])
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=0, atol=0)


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
    assert outs and all(out.shape[0] == 0 for out in outs)
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
    # Nothing need be behind the blocks: not every family has out norms.
    assert set(range(last)) <= {depth for depth, _ in depths.values()} <= set(range(last + 1))
    assert {depths[name][0] for name in depths if name.split(".")[0] in model.stem_names} == {0}
    assert {depths[name][0] for name in depths if name.startswith("outnorm")} <= {last}
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
    blocks = {name: module for name, module in model.named_modules() if isinstance(module, Block)}
    assert not [name for name in blocks if any(name.startswith(f"{other}.") for other in blocks)]
    found = {model.get_layer_depth(f"{name}.{next(iter(dict(block.named_parameters())))}")[0]
             for name, block in blocks.items()}  # fmt: skip
    assert found == set(range(1, sum(model.depths) + 1))
    if backbone in HIERARCHICAL:
        assert all(isinstance(block, Block) for layer in model.layers for block in layer.blocks)
        assert len(blocks) == sum(model.depths)


@every_backbone
def test_pretrained_weights_load_strictly(backbone, tmp_path):
    source = backbone("nano")
    state = {f"backbone.{k}": v for k, v in source.state_dict().items()}
    torch.save({"state_dict": {**state, "head.fc.weight": torch.zeros(1)}}, tmp_path / "good.pth")
    init = dict(type="Pretrained", checkpoint=str(tmp_path / "good.pth"), prefix="backbone.")
    model = backbone("nano", out_indices=(1, _stages(backbone) - 1), init_cfg=init)
    model.init_weights()
    for name, value in model.state_dict().items():
        assert torch.equal(value, source.state_dict()[name])
    assert model.is_init

    with pytest.raises(CheckpointMismatch, match=r"none of \d+ entries begins with prefix 'nothing\.'.*'backbone'"):
        backbone("nano", init_cfg=dict(init, prefix="nothing.")).init_weights()
    with pytest.raises(CheckpointMismatch, match=r"size mismatch|does not fit"):
        backbone("nano", in_channels=1, init_cfg=init).init_weights()


@every_hierarchical
def test_an_official_classifier_starts_a_feature_extractor(backbone, tmp_path):
    """What of a columnar model differs with the task, such as its position embedding, is a matter of its own tests."""
    source = backbone("nano")
    without_norms = {k: v for k, v in source.state_dict().items() if not k.startswith("outnorm")}
    head = {name: torch.zeros(1) for name in _names_of_the_head(backbone)}
    torch.save({"model": {**without_norms, **head}}, tmp_path / "imagenet.pth")
    model = backbone("nano", init_cfg=dict(type="Pretrained", checkpoint=str(tmp_path / "imagenet.pth")))
    model.init_weights()
    if backbone in OUT_NORMED:
        assert torch.equal(model.outnorm2.weight, torch.ones_like(model.outnorm2.weight))
    taken = {name for name in model.state_dict() if not name.startswith("outnorm")}
    assert all(torch.equal(model.state_dict()[name], source.state_dict()[name]) for name in taken)


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

    # Found by identity, since parts of a stage need not have the stage in their names.
    own = {id(value) for part in source.parts_of_stage(_stages(backbone) - 1) for value in part.parameters()}
    cut = [name for name, value in source.named_parameters() if id(value) in own and not name.startswith("outnorm")]
    assert cut
    torch.save({k: v for k, v in source.state_dict().items() if k not in cut}, tmp_path / "part.pth")
    with pytest.raises(CheckpointMismatch, match=rf"entries missing \['{re.escape(cut[0])}"):
        backbone("nano", init_cfg=spell(dict(entry, checkpoint=str(tmp_path / "part.pth")))).init_weights()
    with pytest.raises(ConfigError, match=r"unknown key 'prefx'.*Did you mean 'prefix'\?"):
        backbone("nano", init_cfg=spell(dict(entry, prefx="backbone."))).init_weights()
    with pytest.raises(ConfigError, match="checkpoint is None, expected a file"):
        backbone("nano", init_cfg=spell(dict(type=entry["type"]))).init_weights()


def test_pretrained_weights_need_a_type():
    """Else the option that replaces the weights of one recipe would end in MMEngine's KeyError in another without."""
    with pytest.raises(ConfigError, match=r"init_cfg: type missing, found \['checkpoint'\].*init_cfg.type=Pretrained"):
        BACKBONES[0]("nano", init_cfg=dict(checkpoint="weights.pth")).init_weights()


@every_out_normed
def test_out_norms_are_taken_all_or_none(backbone, tmp_path):
    """The final norm of a classifier is no output norm of a detector; an unknown norm is an error."""
    last = _stages(backbone) - 1
    classifier = backbone("nano", out_indices=(last,))
    torch.nn.init.constant_(getattr(classifier, f"outnorm{last}").weight, 7.0)
    path = tmp_path / "cls.pth"
    torch.save(classifier.state_dict(), path)
    for out_indices, weight in (((last,), 7.0), (tuple(range(last + 1)), 1.0), ((last - 1, last), 1.0)):
        init = dict(type="Pretrained", checkpoint=str(path))
        model = backbone("nano", out_indices=out_indices, init_cfg=init)
        model.init_weights()
        norm = getattr(model, f"outnorm{last}").weight.detach()
        assert float(norm.min()) == float(norm.max()) == weight
    for name in (f"outnorm{last + 1}.weight", f"outnorm{last}.scale", "outnorms.weight"):
        torch.save({**classifier.state_dict(), name: torch.ones(256)}, path)
        with pytest.raises(CheckpointMismatch, match=rf"1 unexpected \['{name}'"):
            backbone("nano", init_cfg=dict(type="Pretrained", checkpoint=str(path))).init_weights()
