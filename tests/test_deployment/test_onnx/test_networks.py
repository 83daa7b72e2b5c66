"""Whole networks: every family at sizes the export did not know, refusals, and what the report says."""

import pytest
import torch
from torch import nn

from mmvmamba.deployment.onnx import compare_onnx, export_onnx, open_onnx, run_onnx, unsupported_parts
from mmvmamba.errors import ConfigError, MissingPackage, OutputError
from mmvmamba.models import FAMILIES, VMamba
from mmvmamba.models.deploy import fold_batch_norms

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

BOUND = 1e-4
SMALL = dict(dims=[8, 16], depths=[1, 1])


def small(**options):
    torch.manual_seed(0)
    return VMamba(SMALL | options, out_indices=(0, 1)).eval()


def images(count, smallest=40, largest=160, seed=0):
    torch.manual_seed(seed)
    sides = torch.randint(smallest, largest + 1, (count, 2)).tolist()
    return [torch.randn(1 + i % 2, 3, *size) for i, size in enumerate(sides)]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    model = small()
    file = tmp_path_factory.mktemp("onnx") / "deeper" / "small.onnx"
    return model, export_onnx(model, torch.randn(1, 3, 96, 128), file)


def test_twenty_sizes_agree(exported):
    model, report = exported
    runs = compare_onnx(model, report.path, images(20))
    assert len(runs) == 20 and len({run.shape for run in runs}) > 15
    assert max(run.error for run in runs) < BOUND
    assert all(run.pytorch_ms is None and run.exported_ms is None for run in runs)


def test_the_report_says_what_was_written(exported):
    model, report = exported
    assert report.path.is_file() and report.megabytes == pytest.approx(report.path.stat().st_size / 1e6)
    assert report.outputs == (("output_0", 4), ("output_1", 4)) and report.opset == 20
    assert set(report.sizes) == {"batch", "height", "width"} and report.sizes["batch"] == (1, None)
    assert report.sizes["height"][0] <= 40 and report.sizes["height"][1] is None
    opened = open_onnx(report.path)
    assert [value.name for value in opened.get_inputs()] == ["image"]
    assert opened.get_inputs()[0].shape[1] == 3
    assert [value.name for value in opened.get_outputs()] == ["output_0", "output_1"]
    # More operators than layers, fewer than a graph that was unrolled over positions would have.
    assert len(list(model.modules())) < report.nodes < 1000


def test_times_are_taken_when_asked_for(exported):
    model, report = exported
    (run,) = compare_onnx(model, report.path, images(1), repeats=2, threads=1)
    assert run.pytorch_ms > 0 and run.exported_ms > 0


def test_another_network_is_found_out(exported):
    """The comparison itself can fail: other weights, and outputs of other shapes."""
    _, report = exported
    torch.manual_seed(1)
    other = VMamba(SMALL, out_indices=(0, 1)).eval()
    assert compare_onnx(other, report.path, images(1))[0].error > BOUND
    fewer = VMamba(SMALL, out_indices=(1,)).eval()
    assert compare_onnx(fewer, report.path, images(1))[0].error == float("inf")


@pytest.mark.parametrize("option", [pytest.param("cascade", marks=pytest.mark.slow), "rotated"])
def test_other_scans(option, tmp_path):
    """The cascade is a selective_scan along rows and one along columns."""
    model = small(scan=option)
    report = export_onnx(model, torch.randn(1, 3, 96, 128), tmp_path / "scan.onnx")
    assert max(run.error for run in compare_onnx(model, report.path, images(5))) < BOUND


@pytest.mark.slow
@pytest.mark.parametrize(
    "family",
    # An export takes up to a minute, HRVMamba's two and a half: the others are for make test-slow.
    [
        family if family in ("vmamba", "vssd", "vim") else pytest.param(family, marks=pytest.mark.soak)
        for family in FAMILIES
    ],
)
def test_every_family_agrees_at_twenty_sizes(family, tmp_path):
    torch.manual_seed(0)
    model = FAMILIES[family]("nano").eval()
    report = export_onnx(model, torch.randn(1, 3, 160, 192), tmp_path / f"{family}.onnx")
    # Also below the smallest size of the report, which is what PyTorch could prove (129 for MobileMamba).
    runs = compare_onnx(model, report.path, images(20, smallest=70, largest=200))
    assert max(run.error for run in runs) < BOUND


@pytest.mark.slow
def test_the_deployment_form(tmp_path):
    """Folded layers have operators of their own in eager mode."""
    torch.manual_seed(0)
    model = fold_batch_norms(FAMILIES["efficientvim"]("nano").eval())
    report = export_onnx(model, torch.randn(1, 3, 160, 192), tmp_path / "folded.onnx")
    assert max(run.error for run in compare_onnx(model, report.path, images(5, smallest=80))) < BOUND


class Head(nn.Module):
    """A classifier around a backbone; returns a dict."""

    def __init__(self):
        super().__init__()
        self.backbone, self.fc = small(), nn.Linear(16, 3)

    def forward(self, image):
        maps = self.backbone(image)
        return {"maps": list(maps), "scores": self.fc(maps[-1].mean((2, 3)))}


def test_a_fixed_size_and_nested_outputs(tmp_path):
    torch.manual_seed(0)
    model = Head().eval()
    report = export_onnx(model, torch.randn(2, 3, 64, 64), tmp_path / "head.onnx", dynamic=("batch",))
    assert report.sizes == {"batch": (1, None)}
    assert report.outputs == (("output_0", 4), ("output_1", 4), ("output_2", 2))
    assert compare_onnx(model, report.path, [torch.randn(5, 3, 64, 64)])[0].error < BOUND
    with pytest.raises(ConfigError, match=r"cannot run an image batch \(1, 3, 65, 64\)"):
        run_onnx(open_onnx(report.path), torch.randn(1, 3, 65, 64))


def test_what_cannot_be_written_is_said_before_anything_runs(tmp_path, monkeypatch):
    model = small()
    assert unsupported_parts(model) == []
    monkeypatch.setattr(torch.export, "export", lambda *_, **__: pytest.fail("recorded"))
    example, file = torch.randn(1, 3, 96, 128), tmp_path / "m.onnx"
    with pytest.raises(ConfigError, match=r"training mode, call eval\(\)"):
        export_onnx(small().train(), example, file)
    (reason,) = unsupported_parts(small().double())
    assert "float64" in reason and ".float()" in reason
    (reason,) = unsupported_parts(small().to("meta"))
    assert "not on the CPU" in reason
    with pytest.raises(ConfigError, match=r"dynamic is \('heigth',\).*Did you mean 'height'"):
        export_onnx(model, example, file, dynamic=("heigth",))
    with pytest.raises(ConfigError, match="dynamic is 'batch'"):
        export_onnx(model, example, file, dynamic="batch")
    with pytest.raises(ConfigError, match="opset is 11, expected 20"):
        export_onnx(model, example, file, opset=11)
    with pytest.raises(ConfigError, match=r"example is \(3, 96, 128\)"):
        export_onnx(model, example[0], file)
    with pytest.raises(ConfigError, match=r"ends in \.onnx"):
        export_onnx(model, example, tmp_path / "m.pt")
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        export_onnx(model, example, tmp_path / "file" / "m.onnx")


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingPackage, match=r"pip install 'mmvmamba\[export\]'"):
        export_onnx(small(), torch.randn(1, 3, 96, 128), tmp_path / "m.onnx")


def test_an_example_too_small_to_leave_its_size_free(tmp_path):
    with pytest.raises(ConfigError, match="example has height 8, .*Use height 16"):
        export_onnx(small(), torch.randn(1, 3, 8, 64), tmp_path / "m.onnx")


def test_a_file_that_is_none(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"no network")
    with pytest.raises(ConfigError, match="cannot be read by onnxruntime"):
        open_onnx(tmp_path / "m.onnx")


class Foreign(nn.Module):
    """Has an operator that ONNX lacks, or a decision that depends on values."""

    def __init__(self, decides):
        super().__init__()
        self.decides = decides

    def forward(self, image):
        if self.decides:
            return image if image.sum() > 0 else -image
        return torch.linalg.qr(image).Q


@pytest.mark.parametrize(("decides", "message"), [(True, "cannot be exported"), (False, "linalg_qr")])
def test_networks_that_are_no_graph_of_known_operators(decides, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        export_onnx(Foreign(decides).eval(), torch.randn(1, 3, 8, 8), tmp_path / "m.onnx", dynamic=())
    assert not (tmp_path / "m.onnx").exists()
