"""What the runner loads is checked as a whole: wrong checkpoints of every kind are named and change nothing."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import EMAHook
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import nn

from mmvmamba.apis import check_weights
from mmvmamba.apis.guards import guard_loading
from mmvmamba.checkpoints.matching import load
from mmvmamba.engine import CheckpointCheckHook
from mmvmamba.errors import CheckpointError, CheckpointMismatch, ConfigError
from mmvmamba.models import VMamba
from tests.test_checkpoints.official_files import with_old_names

ARCH = dict(dims=[8, 16], depths=[1, 1], patch_embed="patchify", downsample="patch_merging")
OTHER_ARCH = dict(ARCH, depths=[2, 1])
FIRST = "backbone.layers.0.blocks.0.op.out_proj.weight"


class Detector(BaseModel):
    """A detector in miniature."""

    def __init__(self, classes: int = 3, arch: dict = ARCH) -> None:
        super().__init__()
        self.backbone = VMamba(arch, out_indices=(0, 1))
        self.roi_head = nn.Linear(16, classes)

    def forward(self, *_: object, **__: object) -> None:
        raise NotImplementedError


@pytest.fixture(scope="module")
def good():
    """The entries of a checkpoint that fits, all of them other than the model's."""
    return {name: torch.rand_like(value) for name, value in Detector().state_dict().items()}


def _without(state, beginning):
    return {name: value for name, value in state.items() if not name.startswith(beginning)}


def _with(state, value, name=FIRST):
    return {**state, name: value(state[name]) if callable(value) else value}


def _spoilt(number):
    def spoil(value):
        value = value.clone()
        value.view(-1)[1] = number
        return value

    return spoil


def _backbone_of(state):
    return {name.removeprefix("backbone."): value for name, value in _without(state, "roi").items()}


def _classifier(state):
    head = {"norm.weight": (16,), "norm.bias": (16,), "head.weight": (9, 16), "head.bias": (9,)}
    head = {f"classifier.{name}": torch.ones(shape) for name, shape in head.items()}
    return {**_without(_backbone_of(state), "outnorm"), **head}


OTHER = {"conv1.weight": torch.ones(1), "fc.bias": torch.ones(1)}
#: Kind -> (what the file holds, what the message says).
WRONG = {
    "one missing": (lambda s: {"state_dict": _without(s, FIRST)}, rf"1 of \d+ entries missing \['{FIRST}'\]"),
    "a stage missing": (
        lambda s: _without(s, "backbone.layers.1"),
        r"\d+ of \d+ entries missing \['backbone\.layers\.1",
    ),
    "the head missing": (
        lambda s: _without(s, "roi"),
        r"2 of \d+ entries missing \['roi_head.weight', 'roi_head.bias'",
    ),
    "one too many": (lambda s: _with(s, torch.ones(1), "backbone.extra"), r"1 unexpected \['backbone\.extra'\]"),
    "a prefix": (
        lambda s: {f"net.{k}": v for k, v in s.items()},
        r"\d\d of \d\d entries missing .* unexpected \['net\.",
    ),
    "another shape": (
        lambda s: _with(s, torch.ones(3, 3)),
        r"of another shape \['\S+ \(3, 3\) instead of \(8, 16\)'\]",
    ),
    "other classes": (
        lambda s: _with(s, torch.ones(80), "roi_head.bias"),
        r"roi_head\.bias \(80,\) instead of \(3,\)'\]",
    ),
    "no 1x1 kernel": (lambda s: _with(s, torch.ones(8, 16, 3, 3)), r"\(8, 16, 3, 3\) instead of \(8, 16\)"),
    "integers": (lambda s: _with(s, lambda v: v.long()), r"1 of another dtype \['\S+ torch\.int64 instead of"),
    "doubles": (lambda s: _with(s, lambda v: v.double()), "torch.float64 instead of torch.float32"),
    "complex": (lambda s: _with(s, lambda v: v.to(torch.complex64)), "torch.complex64 instead of torch.float32"),
    "NaN": (lambda s: {"state_dict": _with(s, _spoilt(float("nan")))}, rf"'{FIRST}' holds NaN"),
    "another variant": (
        lambda s: {k: torch.zeros_like(v) for k, v in Detector(arch=OTHER_ARCH).state_dict().items()},
        r"the checkpoint is VMamba with depths \(2, 1\) and dims \(8, 16\) \(detector\), the model is VMamba with "
        r"depths \(1, 1\) and dims \(8, 16\) \(detector\); \d+ unexpected",
    ),
    "averages only": (lambda s: {"ema_state_dict": _average(s)}, "'ema_state_dict'.*no tensors"),
    "optimizer only": (lambda s: {"optimizer": {"state": {}, "param_groups": []}}, "'optimizer'.*no tensors"),
    "old and new names": (lambda s: {**with_old_names(s, "backbone."), **s}, "mixes old and new names"),
    "a classifier": (
        lambda s: {"model": _classifier(s)},
        r"\(classifier\), the model is .* \(detector\);.*\. Weights of",
    ),
    "a backbone": (lambda s: {"model": _backbone_of(s)}, r"\(backbone\), the model is .* \(detector\);.*\. Weights of"),
    "another model": (lambda s: OTHER, r"2 unexpected \['conv1.weight', 'fc.bias'\]"),
}


def _average(good, **changes):
    entries = {"steps": torch.tensor(4), **{f"module.{name}": value + 1 for name, value in good.items()}, **changes}
    return {name: value for name, value in entries.items() if value is not None}


def _runner(tmp_path, model, path, resume=False, hooks=(), **arguments):
    """Return a runner of the tools; ``arguments`` are those of the hook in its config."""
    configured = [dict(type="mmvmamba.CheckpointCheckHook", **arguments)] if arguments else []
    cfg = Config(dict(custom_hooks=[*configured, *hooks]))
    guard_loading(cfg)
    return Runner(model, str(tmp_path / "work"), load_from=str(path), resume=resume, custom_hooks=cfg.custom_hooks,
                  experiment_name=tmp_path.name, default_scope="mmengine")  # fmt: skip


def _unchanged(model, before):
    after = model.state_dict()
    return after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("road", ["load_from", "resume", "test.py"])
def test_wrong_checkpoints_are_named_and_change_nothing(kind, road, good, tmp_path):
    make, message = WRONG[kind]
    content, path, model = make(good), tmp_path / "x.pth", Detector()
    before = copy.deepcopy(model.state_dict())
    if road != "load_from":  # where weights of a backbone are no misunderstanding
        message = message.removesuffix(r"\. Weights of")
    state = next((content[key] for key in ("state_dict", "model") if key in content), content)
    if road == "resume" and any("." in name for name in state):
        content = _training(state)
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=message) as caught:
        _load(road, tmp_path, model, path)
    assert str(path) in str(caught.value)
    assert _unchanged(model, before)


def _load(road, tmp_path, model, path):
    if road == "test.py":
        load(model, check_weights(model, str(path)))
    else:
        _runner(tmp_path, model, path, resume=road == "resume").load_checkpoint(str(path))


@pytest.mark.parametrize("road", ["load_from", "resume", "test.py"])
def test_the_right_one_loads_on_every_road(road, good, tmp_path):
    torch.save(_training(good), tmp_path / "x.pth")
    model = Detector()
    _load(road, tmp_path, model, tmp_path / "x.pth")
    assert _unchanged(model, good)


#: Kind -> what stands in the file in place of a backbone's entries.
WRONG_BACKBONES = [
    kind for kind in WRONG if kind not in ("the head missing", "other classes", "a classifier", "a backbone")
]


@pytest.mark.parametrize("kind", sorted(WRONG_BACKBONES))
def test_wrong_backbones_are_named_and_change_nothing(kind, good, tmp_path):
    """The same by init_cfg; each file is that of a backbone."""
    make, message = WRONG[kind]
    content = make(good)
    for key in ("state_dict", None):
        part = content.get(key) if key else content
        if isinstance(part, dict) and any(name.startswith("backbone.") for name in part):
            content = {key: _backbone_of(part)} if key else _backbone_of(part)
    torch.save(content, tmp_path / "x.pth")
    model = VMamba(ARCH, out_indices=(0, 1), init_cfg=dict(type="Pretrained", checkpoint=str(tmp_path / "x.pth")))
    before = copy.deepcopy(model.state_dict())
    message = message.replace("backbone\\.", "").replace("backbone.", "").replace("detector", "backbone")
    with pytest.raises(CheckpointError, match=message) as caught:
        model.init_weights()
    assert str(tmp_path / "x.pth") in str(caught.value)
    assert _unchanged(model, before)
    assert not model.is_init


def test_a_detector_is_no_backbone(good, tmp_path):
    torch.save({"state_dict": good}, tmp_path / "x.pth")
    model = VMamba(ARCH, out_indices=(0, 1), init_cfg=dict(type="Pretrained", checkpoint=str(tmp_path / "x.pth")))
    with pytest.raises(CheckpointMismatch, match=r"parts \['backbone', 'roi_head'\].*Add prefix='backbone\.'"):
        model.init_weights()
    model.init_cfg["prefix"] = "backbone."
    model.init_weights()
    assert torch.equal(model.outnorm0.weight, good["backbone.outnorm0.weight"])


def test_a_classifier_trained_here_needs_no_prefix(good, tmp_path):
    state = {name: value for name, value in good.items() if not name.startswith(("roi", "backbone.outnorm0"))}
    torch.save({"state_dict": {**state, "head.fc.weight": torch.ones(9, 16)}}, tmp_path / "x.pth")
    model = VMamba(ARCH, out_indices=(0, 1), init_cfg=dict(type="Pretrained", checkpoint=str(tmp_path / "x.pth")))
    match = model.read_pretrained(str(tmp_path / "x.pth"))
    assert set(match.unused) == {"outnorm1.weight", "outnorm1.bias", "head.fc.weight"}
    assert match.line().startswith(
        f"VMamba with depths (1, 1) and dims (8, 16): {match.total - 4}/{match.total} tensors"
    )
    model.init_weights()
    assert torch.equal(model.state_dict()[FIRST.removeprefix("backbone.")], good[FIRST])
    assert torch.equal(model.outnorm1.weight, torch.ones(16))


def test_what_fits_is_loaded_and_reported_once(good, tmp_path, caplog):
    path = tmp_path / "x.pth"
    torch.save({"state_dict": {f"module.{name}": value.half() for name, value in good.items()}}, path)
    model = Detector()
    runner = _runner(tmp_path, model, path)
    with caplog.at_level(logging.INFO, logger=runner.logger.name):
        runner.logger.addHandler(caplog.handler)
        runner.load_or_resume()
    assert all(torch.equal(value, good[name].half().float()) for name, value in model.state_dict().items())
    line = f"Detector (VMamba with depths (1, 1) and dims (8, 16)): {len(good)}/{len(good)} tensors from {str(path)!r}"
    assert [record.message for record in caplog.records].count(line) == 1


def test_old_official_names_load(good, tmp_path):
    torch.save({"state_dict": with_old_names(good, "backbone.")}, tmp_path / "x.pth")
    model = Detector()
    _runner(tmp_path, model, tmp_path / "x.pth").load_or_resume()
    assert all(torch.equal(value, good[name]) for name, value in model.state_dict().items())


def test_heads_start_anew_by_name(good, tmp_path):
    torch.save({"state_dict": good}, tmp_path / "x.pth")
    model = Detector(classes=7)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointMismatch, match=r"2 of another shape.*allow_missing=\[\.\.\.\]"):
        _runner(tmp_path, model, tmp_path / "x.pth").load_or_resume()
    assert _unchanged(model, before)
    with pytest.raises(ConfigError, match=r"'roi_haed' is the beginning of no name.*'roi_head'"):
        _runner(tmp_path, model, tmp_path / "x.pth", allow_missing=["roi_haed"]).load_or_resume()
    assert _unchanged(model, before)
    _runner(tmp_path, model, tmp_path / "x.pth", allow_missing=["roi_head"]).load_or_resume()
    for name, value in model.state_dict().items():
        assert torch.equal(value, (before if name.startswith("roi_head") else good)[name])


def test_half_a_head_is_not_loaded(good, tmp_path):
    """The bias would fit; without its weight it belongs to nothing."""
    torch.save({"state_dict": {**good, "roi_head.weight": torch.ones(3, 9)}}, tmp_path / "x.pth")
    model = Detector()
    before = copy.deepcopy(model.state_dict())
    _runner(tmp_path, model, tmp_path / "x.pth", allow_missing=["roi_head"]).load_or_resume()
    assert torch.equal(model.roi_head.bias, before["roi_head.bias"])


def _training(good, **changes):
    content = {
        "state_dict": good,
        "meta": {"epoch": 1, "iter": 2},
        "message_hub": {},
        "optimizer": {"state": {}},
        **changes,
    }
    return {name: value for name, value in content.items() if value is not None}


@pytest.mark.parametrize("missing", ["meta", "message_hub", "optimizer"])
def test_a_resume_needs_the_state_of_a_training(missing, good, tmp_path):
    torch.save(_training(good, **{missing: None}), tmp_path / "x.pth")
    model = Detector()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointMismatch, match=f"has no {missing}, expected the state of a training"):
        _runner(tmp_path, model, tmp_path / "x.pth", resume=True).load_checkpoint(str(tmp_path / "x.pth"))
    assert _unchanged(model, before)


def test_a_resume_skips_nothing(good, tmp_path):
    torch.save(_training({**good, "roi_head.bias": torch.ones(9)}), tmp_path / "x.pth")
    runner = _runner(tmp_path, Detector(), tmp_path / "x.pth", resume=True, allow_missing=["roi_head"])
    with pytest.raises(CheckpointMismatch, match="Resume with the config"):
        runner.load_checkpoint(str(tmp_path / "x.pth"))


EMA = dict(type="EMAHook", momentum=0.1)


def test_averages_are_checked_on_a_resume(good, tmp_path):
    path, model = tmp_path / "x.pth", Detector()
    before = copy.deepcopy(model.state_dict())
    torch.save(_training(good, ema_state_dict=_average(good)), path)
    with pytest.raises(CheckpointMismatch, match="averaged weights.*Put its EMAHook into custom_hooks"):
        _runner(tmp_path, model, path, resume=True).load_checkpoint(str(path))
    assert _unchanged(model, before)
    for changes, message in (
        ({f"module.{FIRST}": None}, rf"\(ema_state_dict\) does not fit .* 1 of \d+ entries missing \['{FIRST}'\]"),
        ({f"module.{FIRST}": torch.ones(2)}, r"ema_state_dict.*1 of another shape"),
        ({"odd": torch.ones(2)}, r"ema_state_dict.*1 unexpected \['odd'\]"),
    ):
        torch.save(_training(good, ema_state_dict=_average(good, **changes)), path)
        runner = _runner(tmp_path, model, path, resume=True, hooks=[EMA])
        runner.call_hook("before_run")
        with pytest.raises(CheckpointMismatch, match=message):
            runner.load_checkpoint(str(path))
        assert _unchanged(model, before)
    torch.save(_training(good, ema_state_dict=_average(good)), path)
    runner = _runner(tmp_path, model, path, resume=True, hooks=[EMA])
    runner.call_hook("before_run")
    runner.load_checkpoint(str(path))
    hook = next(hook for hook in runner.hooks if isinstance(hook, EMAHook))
    assert int(hook.ema_model.steps) == 4
    for name, value in model.state_dict().items():  # MMEngine stores them the other way round
        assert torch.equal(value, good[name] + 1)
        assert torch.equal(hook.ema_model.module.state_dict()[name], good[name])


def test_an_average_is_not_begun_anew_on_a_resume(good, tmp_path):
    path, model = tmp_path / "x.pth", Detector()
    before = copy.deepcopy(model.state_dict())
    torch.save(_training(good), path)
    runner = _runner(tmp_path, model, path, resume=True, hooks=[EMA])
    runner.call_hook("before_run")
    with pytest.raises(CheckpointMismatch, match="has no ema_state_dict, expected the averaged weights"):
        runner.load_checkpoint(str(path))
    assert _unchanged(model, before)
    runner = _runner(tmp_path, model, path, hooks=[EMA])
    runner.call_hook("before_run")
    runner.load_checkpoint(str(path))
    assert _unchanged(model, good)


def _stepped(model, kind):
    optimizer = kind(model.parameters(), lr=0.1)
    for value in model.parameters():
        value.grad = torch.ones_like(value)
    optimizer.step()
    return optimizer


def _sgd(parameters, lr):
    return torch.optim.SGD(parameters, lr, momentum=0.9)


@pytest.mark.parametrize(
    ("stored", "own", "message"),
    [
        (torch.optim.AdamW, _sgd, r"fit the optimizer SGD: found lr, betas.*expected dampening, momentum as well"),
        (_sgd, torch.optim.AdamW, r"fit the optimizer AdamW: found .*expected betas, eps as well"),
        (
            _sgd,
            lambda p, lr: _sgd(list(p)[1:], lr),
            r"fit the optimizer SGD: found 1 groups of \d+ parameters, expected 1 of \d+",
        ),
        (None, _sgd, r"fit the optimizer SGD: found state, expected a state and param_groups"),
    ],
)
def test_a_resume_needs_the_same_optimizer(stored, own, message, good, tmp_path):
    path, model = tmp_path / "x.pth", Detector()
    before = copy.deepcopy(model.state_dict())
    state = _stepped(Detector(), stored).state_dict() if stored else {"state": {}}
    torch.save(_training(good, optimizer=state), path)
    runner = _runner(tmp_path, model, path, resume=True)
    runner.optim_wrapper = OptimWrapper(own(model.parameters(), lr=0.1))
    with pytest.raises(CheckpointMismatch, match=message):
        runner.load_checkpoint(str(path))
    assert _unchanged(model, before)
    runner.optim_wrapper = OptimWrapperDict(all=OptimWrapper(own(model.parameters(), lr=0.1)))
    with pytest.raises(CheckpointMismatch, match="has the state of the optimizers state.*, expected all"):
        runner.load_checkpoint(str(path))
    torch.save(_training(good, optimizer={"all": state}), path)
    with pytest.raises(CheckpointMismatch, match=rf"optimizer 'all'\) does not {message}"):
        runner.load_checkpoint(str(path))


@pytest.mark.parametrize("older", [False, True])
def test_the_same_optimizer_is_resumed(older, good, tmp_path):
    """Also one of a PyTorch that did not have all of today's switches."""
    path, model = tmp_path / "x.pth", Detector()
    state = _stepped(Detector(), torch.optim.AdamW).state_dict()
    if older:
        state["param_groups"] = [
            {key: group[key] for key in ("lr", "betas", "eps", "weight_decay", "params")}
            for group in state["param_groups"]
        ]
    torch.save(_training(good, optimizer=state), path)
    runner = _runner(tmp_path, model, path, resume=True)
    runner.optim_wrapper = OptimWrapper(torch.optim.AdamW(model.parameters(), lr=0.1))
    runner.load_checkpoint(str(path))
    runner.optim_wrapper.load_state_dict(state)
    runner.optim_wrapper.optimizer.step()
    assert _unchanged(model, good)


def test_an_entry_with_and_without_the_wrapper_is_ambiguous(good, tmp_path):
    path, model = tmp_path / "x.pth", Detector()
    before = copy.deepcopy(model.state_dict())
    torch.save({"state_dict": {**good, f"module.{FIRST}": good[FIRST] + 1}}, path)
    with pytest.raises(CheckpointMismatch, match=rf"'{FIRST}' and 'module.{FIRST}' are both '{FIRST}'"):
        _runner(tmp_path, model, path).load_or_resume()
    assert _unchanged(model, before)


def test_versions_of_modules_reach_mmengine(good, tmp_path):
    """Those of the model, since what is loaded is converted already."""
    torch.save({"state_dict": with_old_names(good, "backbone.")}, tmp_path / "x.pth")
    model, content = Detector(), {"state_dict": dict(good)}
    runner = _runner(tmp_path, model, tmp_path / "x.pth")
    runner.call_hook("after_load_checkpoint", checkpoint=content)
    assert content["state_dict"]._metadata == model.state_dict()._metadata
    content = _training(good, ema_state_dict=_average(good))
    runner = _runner(tmp_path, model, tmp_path / "x.pth", resume=True, hooks=[EMA])
    runner.call_hook("before_run")
    runner.call_hook("after_load_checkpoint", checkpoint=content)
    hook = next(hook for hook in runner.hooks if isinstance(hook, EMAHook))
    expected = {name: value for name, value in hook.ema_model.state_dict()._metadata.items() if name}
    assert content["ema_state_dict"]._metadata == expected


def test_other_models_pass_untouched(tmp_path):
    """A ResNet in the same process: MMEngine's own road, its names, and a whole network for a backbone."""
    pytest.importorskip("mmdet")
    from mmdet.models import ResNet

    source = ResNet(18)
    state = source.state_dict()
    torch.save({**state, "fc.weight": torch.ones(3, 512)}, tmp_path / "resnet.pth")
    model = ResNet(18, init_cfg=dict(type="Pretrained", checkpoint=str(tmp_path / "resnet.pth")))
    model.init_weights()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    torch.save({"state_dict": state}, tmp_path / "detector.pth")
    other = ResNet(18)
    other.data_preprocessor = nn.Identity()
    check_weights(other, str(tmp_path / "detector.pth"))


@pytest.mark.parametrize("own", ["CheckpointCheckHook", "mmvmamba.CheckpointCheckHook", CheckpointCheckHook])
def test_the_tools_add_it_to_every_config(own):
    """Once, and not where the config has its own."""
    for given in ([], None, [dict(type="NumClassCheckHook")]):
        cfg = Config(dict(custom_hooks=given))
        guard_loading(cfg)
        guard_loading(cfg)
        assert cfg.custom_hooks == [*(given or []), dict(type="mmvmamba.CheckpointCheckHook")]
    cfg = Config(dict(custom_hooks=[dict(type=own, allow_missing=["head"])]))
    guard_loading(cfg)
    assert [hook.allow_missing for hook in cfg.custom_hooks] == [["head"]]


def test_registered_under_the_scope_of_mmvmamba():
    hook = HOOKS.build(dict(type="mmvmamba.CheckpointCheckHook", allow_missing=["head.fc"]))
    assert hook.allow_missing == ("head.fc",)
    assert hook.priority == "VERY_HIGH"
    with pytest.raises(ConfigError, match="expected a sequence of names"):
        CheckpointCheckHook(allow_missing="head")
