"""Every command line of the benchmarks runs, on tiny inputs; figures are not looked at."""

from __future__ import annotations

import dataclasses
import json
import sys
import types

import pytest
import torch

from benchmarks import backbones, contestants, detectors, families, mobile, operator_shares, ops, table, upstream_path
from benchmarks.cases import BACKWARD, CORE, FORWARD, SCAN, SEQUENCE, Case, build_problem, expect, sampled_grad
from benchmarks.contestants import Contestant
from benchmarks.harness import Notes
from benchmarks.models import Peer
from mmvmamba.converters.base import load_converter
from mmvmamba.models.backbones import FAMILIES
from mmvmamba.ops.scan2d import CROSS_SCAN, order_to_permutation
from mmvmamba.testing import requires_extension


def _rows(path) -> list[dict]:
    content = json.loads(path.read_text())
    assert content["environment"]["threads"] == 1
    return content["rows"]


@requires_extension()
def test_ops(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "ops.json"
    arguments = ["--threads", "1", "--seconds", "0.01", "--shapes", "smoke", "--dtype", "float32", "bfloat16"]
    assert ops.main([*arguments, "--json", str(path)]) == 0
    rows = _rows(path)
    assert {row["contestant"] for row in rows} >= {"compiled", "reference", "upstream path"}
    assert {row["boundary"] for row in rows} == {"scan", "core", "sequence"}
    assert all(row["minimum"] > 0 and row["over_reference"] > 0 for row in rows)
    sums = [row for row in rows if row["case"] == "VMamba-T core at smoke" and row["contestant"] == "compiled"]
    assert {(row["pass"], row["dtype"]) for row in sums} == {
        (passes, dtype) for passes in (FORWARD, BACKWARD) for dtype in ("float32", "bfloat16")
    }
    assert "skipped: selective_scan_cuda_oflex" in capsys.readouterr().out
    assert table.main([str(path)]) == 0


def test_ops_names_an_unknown_shape(capsys: pytest.CaptureFixture[str]) -> None:
    assert ops.main(["--shapes", "225"]) == 2
    assert "found '225'" in capsys.readouterr().err


@pytest.mark.parametrize("boundary", [SCAN, CORE, SEQUENCE])
def test_a_wrong_contestant_ends_the_run(monkeypatch, boundary: str, capsys: pytest.CaptureFixture[str]) -> None:
    everyone = contestants.contestants()
    (right,) = (c for c in everyone if c.name == "reference")
    wrong = Contestant("wrong", lambda problem: right.forward(problem) * 1.01, (SCAN, CORE, SEQUENCE))
    monkeypatch.setattr(ops, "contestants", lambda: [right, wrong])
    assert ops.main(["--shapes", "smoke", "--seconds", "0.01", "--boundaries", boundary]) == 1
    assert "wrong: out differs from the reference" in capsys.readouterr().err


def test_a_wrong_gradient_ends_the_run(monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    (right,) = (c for c in contestants.contestants() if c.name == "reference")

    def forward(problem):
        out = right.forward(problem)
        return out.detach() + 1.01 * (out - out.detach())

    monkeypatch.setattr(ops, "contestants", lambda: [Contestant("wrong", forward, (SCAN,))])
    arguments = ["--shapes", "smoke", "--seconds", "0.01", "--boundaries", "scan"]
    assert ops.main([*arguments, "--passes", FORWARD]) == 0
    assert ops.main(arguments) == 1
    assert "wrong: x differs from the reference" in capsys.readouterr().err


@requires_extension()
@pytest.mark.parametrize("boundary", [SCAN, SEQUENCE])
def test_a_sample_of_channels_is_compared_where_all_would_not_fit(monkeypatch, boundary: str) -> None:
    case = dataclasses.replace(
        Case("sampled", "sampled", 2, 1 if boundary == SEQUENCE else 3, 5, 40, n=2), boundaries=(boundary,)
    )
    problem = build_problem(case, boundary, torch.float32)
    assert torch.equal(problem.channels(), torch.arange(40))
    (ours,) = (c for c in contestants.contestants() if c.name == "compiled")
    monkeypatch.setattr("benchmarks.cases.CHECK_BYTES", 1)
    assert len(set(problem.channels().tolist())) == 24
    ops.check_all([ours], problem, BACKWARD)
    axis = 1 if boundary == SEQUENCE else 3
    assert expect(problem, FORWARD)["out"].shape[axis] == 24
    assert sampled_grad(problem).count_nonzero() == problem.grad_out.numel() * 24 // 40


def test_limits_are_declared_with_a_reason() -> None:
    big = Case("big", "big", 2, 1, 16384, 1536, n=16, boundaries=(SEQUENCE,))
    everyone = {c.name: c for c in contestants.contestants()}
    assert "1024 MiB each for forward" in everyone["reference"].why_not(big, SEQUENCE, FORWARD)
    assert "over the declared limit of 3136" in everyone["upstream path"].why_not(
        Case("c", "c", 1, 64, 64, 192), CORE, BACKWARD
    )
    assert "no such boundary" in everyone["upstream path"].why_not(Case("c", "c", 1, 7, 7, 96), SCAN, FORWARD)
    assert everyone["upstream path"].why_not(Case("c", "c", 1, 56, 56, 96), CORE, BACKWARD) is None
    assert everyone["upstream path"].rounds(BACKWARD) == 2 and everyone["upstream path"].rounds(FORWARD) is None


def test_mambapy_takes_part_where_it_is_installed(monkeypatch) -> None:
    def pscan(decay, values):
        """What mambapy.pscan.pscan computes: h_t = decay_t h_(t-1) + values_t on (b, l, d, n)."""
        state, states = torch.zeros_like(values[:, 0]), []
        for now, value in zip(decay.unbind(1), values.unbind(1), strict=True):
            state = now * state + value
            states.append(state)
        return torch.stack(states, 1)

    package, module = types.ModuleType("mambapy"), types.ModuleType("mambapy.pscan")
    module.pscan = pscan
    monkeypatch.setitem(sys.modules, "mambapy", package)
    monkeypatch.setitem(sys.modules, "mambapy.pscan", module)
    monkeypatch.setattr(contestants.importlib.util, "find_spec", lambda name: object() if name == "mambapy" else None)
    (mambapy,) = (c for c in contestants.contestants() if c.name == "mambapy")
    case = Case("sequence", "sequence", 2, 1, 20, 16, n=3, boundaries=(SEQUENCE,))
    assert mambapy.why_not(case, SEQUENCE, FORWARD) is None
    ops.check_all([mambapy], build_problem(case, SEQUENCE, torch.float32), BACKWARD)


def test_restated_upstream_path_scans_and_merges_in_vmamba_s_order() -> None:
    x = torch.randn(2, 3, 4, 5)
    routes = torch.stack([order_to_permutation(order, 4, 5, x.device) for order in CROSS_SCAN])
    assert torch.equal(upstream_path.cross_scan(x), x.flatten(2)[:, :, routes].permute(0, 2, 1, 3))
    assert torch.equal(upstream_path.cross_merge(upstream_path.cross_scan(x), 4, 5), 4 * x.flatten(2))


@pytest.mark.parametrize("boundary", [CORE, SEQUENCE])
def test_restated_upstream_path_computes_the_reference(boundary: str) -> None:
    (upstream,) = (c for c in contestants.contestants() if c.name == "upstream path")
    case = Case("odd", "odd", 3, 1 if boundary == SEQUENCE else 5, 7, 20, n=3, boundaries=(boundary,))
    ops.check_all([upstream], build_problem(case, boundary, torch.float32), BACKWARD)


def test_whoever_cannot_take_part_is_no_row() -> None:
    nobody = Contestant("nobody", lambda problem: problem.grad_out, (SCAN,), problem="it is not there")
    notes = Notes()
    problem = build_problem(Case("c", "c", 1, 2, 2, 4), SCAN, torch.float32)
    assert ops.time_problem([nobody], problem, FORWARD, 0.01, notes) == []
    assert notes.lines == ["skipped: nobody: it is not there"]


@requires_extension()
def test_backbones(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    for module in ("mmdet", "mmpretrain"):
        pytest.importorskip(module)
    path = tmp_path / "backbones.json"
    arguments = ["--threads", "1", "--seconds", "0.01", "--variant", "nano", "--sizes", "64x96", "--train"]
    arguments += ["--optimizer", "--slope", "--slope-sides", "32", "64"]
    assert backbones.main([*arguments, "--json", str(path)]) == 0
    rows = _rows(path)
    names = {"VMamba-nano", "Swin-nano", "ConvNeXt-nano"}
    for passes in ("forward", "training step with AdamW"):
        assert {r["contestant"] for r in rows if r["case"] == "64x96" and r["pass"] == passes} >= names
    (share,) = (r["scan_share"] for r in rows if r.get("scan_share") and r["contestant"] == "VMamba-nano")
    assert 0 < share < 1
    assert {r["contestant"] for r in rows if r.get("slope") is not None} >= names
    assert all(r["over_swin"] > 0 for r in rows if "minimum" in r)
    assert table.main([str(path)]) == 0
    assert "this / Swin" in capsys.readouterr().out


def test_backbones_in_bfloat16_with_memory_and_without_peers(tmp_path) -> None:
    path = tmp_path / "backbones.json"
    arguments = ["--threads", "1", "--seconds", "0.01", "--variant", "nano", "--sizes", "32", "--dtype", "bfloat16"]
    arguments += ["--memory", "--memory-size", "64", "--memory-repeats", "1"]
    assert backbones.main([*arguments, "--models", "vmamba", "--json", str(path)]) == 0
    (peak,) = (row for row in _rows(path) if "step_bytes" in row)
    assert 0 < peak["step_bytes"] < peak["peak_bytes"]
    timed = [row for row in _rows(path) if "minimum" in row]
    assert [(row["contestant"], row["over_swin"]) for row in timed] == [("VMamba-nano", None)]


def test_backbones_refuse_a_size_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert backbones.main(["--sizes", "big"]) == 2
    assert "size is 'big'" in capsys.readouterr().err


def test_backbone_that_disagrees_with_the_reference_ends_the_run(monkeypatch, capsys) -> None:
    from mmvmamba.models.layers import SS2D

    right = SS2D.scan
    # The reference runs in float64: what is timed alone is wrong.
    monkeypatch.setattr(SS2D, "scan", lambda self, x: right(self, x) + (x.dtype != torch.float64) * x.flip(3))
    arguments = ["--threads", "1", "--seconds", "0.01", "--variant", "nano", "--sizes", "32", "--models", "vmamba"]
    assert backbones.main(arguments) == 1
    assert "differs from the reference" in capsys.readouterr().err


NANO = ["--threads", "1", "--seconds", "0.01", "--nano-peers", "--variants", "nano"]


@requires_extension()
def test_families(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("mmdet")
    path = tmp_path / "families.json"
    # Larger than 64: a step of one image wants more than one cell at the mobile families' stride of 64.
    assert families.main([*NANO, "--sizes", "96", "96x128", "--json", str(path)]) == 0
    rows = _rows(path)
    everyone = {"Swin-T", "vmamba tiny-s1l8", *(f"{family} nano" for family in FAMILIES)}
    for case in ("96", "96x128"):
        for passes in ("forward", "training step"):
            found = [row for row in rows if (row["case"], row["pass"]) == (case, passes)]
            assert {row["contestant"] for row in found} == everyone
            assert all(row["minimum"] > 0 and row["over_swin"] > 0 and row["flops"] > 0 for row in found)
            assert {row["contestant"]: row["per_flop"] for row in found}["vmamba tiny-s1l8"] == 1.0
    capsys.readouterr()
    assert table.main([str(path)]) == 0
    assert "time per multiply-add / VMamba-T's" in capsys.readouterr().out


def test_every_released_variant_is_timed_unless_told_otherwise(monkeypatch) -> None:
    built = []
    monkeypatch.setattr(families, "build", lambda family, variant: built.append((family, variant)))
    monkeypatch.setattr(families, "PEERS", {"swin": Peer("Swin", lambda _variant: torch.nn.Identity(), "torch")})
    families.Suite(families.parse([]))
    assert len(built) == len(set(built))
    assert set(built) == {(family, variant) for family in FAMILIES for variant in load_converter(family).released}


def test_families_refuse_what_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert families.main(["--families", "mambaout", "--variants", "tiny-s1l8"]) == 2
    assert "--variants names tiny-s1l8, expected variants of mambaout: femto" in capsys.readouterr().err
    assert families.main(["--rounds", "0"]) == 2
    assert "--rounds is 0" in capsys.readouterr().err


@pytest.mark.slow
def test_mobile(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("mmpretrain")
    pytest.importorskip("mmcv")
    path = tmp_path / "mobile.json"
    arguments = ["--size", "96", "--rounds", "3", "--seconds", "0", "--variants", "t2", "m1", "--json", str(path)]
    assert mobile.main(arguments) == 0
    rows = _rows(path)
    everyone = {"mobilemamba t2", "efficientvim m1", "MobileNetV3-Large", "EfficientNet-B0"}
    assert {(row["contestant"], row["form"]) for row in rows} == {
        (name, form) for name in everyone for form in (mobile.TRAINED, mobile.DEPLOYED)
    }
    assert all(row["minimum"] > 0 and row["flops"] > 0 and row["over EfficientNet-B0"] > 0 for row in rows)
    capsys.readouterr()
    assert table.main([str(path)]) == 0
    assert "this / MobileNetV3-Large, deployed" in capsys.readouterr().out
    assert mobile.main(["--variants", "m5"]) == 2
    assert "--variants names m5, expected variants of mobilemamba, efficientvim" in capsys.readouterr().err


def test_operator_shares(capsys) -> None:
    assert operator_shares.main(["mambaout", "nano", "--side", "64", "--runs", "1", "--top", "999"]) == 0
    shares = [float(line.split()[-1].rstrip("%")) for line in capsys.readouterr().out.splitlines()]
    assert len(shares) > 5 and sum(shares) == pytest.approx(100, abs=5)
    assert operator_shares.main(["mambaout", "micro"]) == 2
    assert "mambaout has no micro, expected variants among femto" in capsys.readouterr().err


@requires_extension()
def test_a_family_that_disagrees_with_the_reference_ends_the_run(monkeypatch, capsys) -> None:
    from mmvmamba.models.backbones import mambaout

    right = mambaout.convolve_depthwise
    # The reference runs in float64: what is timed alone is wrong.
    monkeypatch.setattr(
        mambaout, "convolve_depthwise", lambda conv, x: right(conv, x) + (x.dtype != torch.float64) * x.flip(3)
    )
    assert families.main([*NANO, "--sizes", "32", "--families", "mambaout"]) == 1
    assert "mambaout-nano: map 0 differs from the reference" in capsys.readouterr().err


@pytest.mark.parametrize("task", detectors.TASKS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_detectors(task: str, dtype: str, tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip(detectors.NEEDS[task])
    path = tmp_path / "detectors.json"
    arguments = ["--threads", "1", "--seconds", "0.01", "--nano", "--size", "64x96", "--tasks", task, "--dtype", dtype]
    arguments += ["--json", str(path)]
    assert detectors.main([*arguments, "--no-memory"]) == 0
    rows = _rows(path)
    for passes in (detectors.TRAINING, detectors.INFERENCE):
        found = {r["contestant"] for r in rows if r["pass"] == passes and r["over_swin"] > 0}
        assert found == {"VMamba-nano", "Swin-nano"}
    assert table.main([str(path)]) == 0


def test_memory_of_a_detector(tmp_path) -> None:
    pytest.importorskip("mmseg")
    path = tmp_path / "detectors.json"
    arguments = ["--threads", "1", "--seconds", "0.01", "--nano", "--size", "64", "--tasks", "upernet"]
    assert detectors.main([*arguments, "--backbones", "vmamba", "--json", str(path)]) == 0
    (peak,) = (row for row in _rows(path) if "step_bytes" in row)
    assert 0 < peak["step_bytes"] < peak["peak_bytes"]


def test_a_detector_whose_backbone_is_not_trained_ends_the_run(monkeypatch, capsys) -> None:
    pytest.importorskip("mmseg")
    right = detectors.build

    def build(*arguments):
        model = right(*arguments)
        model.backbone.register_parameter("unused", torch.nn.Parameter(torch.zeros(1)))
        return model

    monkeypatch.setattr(detectors, "build", build)
    assert (
        detectors.main(["--nano", "--size", "64", "--tasks", "upernet", "--backbones", "vmamba", "--threads", "1"]) == 1
    )
    assert "no gradient for unused" in capsys.readouterr().err
