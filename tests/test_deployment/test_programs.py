"""Programs of torch.export: any image size, written, and read in a fresh process that has our operators and no more."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmvmamba.deployment.checks import compare, random_images, require_equal
from mmvmamba.deployment.programs import is_compiled_package, load_program, record, save_program
from mmvmamba.errors import ConfigError
from mmvmamba.models import FAMILIES, VMamba

ROOT = Path(__file__).parents[2]
TINY = dict(dims=[8, 16], depths=[1, 1])
#: Families whose recording takes more than a few seconds.
SLOW = {"msvmamba", "efficientvmamba", "vssd", "shufflemamba", "mobilemamba", "efficientvim", "hrvmamba"}


def _tiny() -> VMamba:
    return VMamba(TINY, out_indices=(0, 1)).eval()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A network and its program's file."""
    torch.manual_seed(1)
    model = _tiny()
    recorded = record(model)
    return model, recorded, save_program(recorded, tmp_path_factory.mktemp("programs") / "tiny.pt2")


def test_twenty_random_sizes(tiny):
    model, recorded, file = tiny
    assert recorded.sizes["batch"] == (1, None)
    assert all(low <= 64 and high is None for low, high in recorded.sizes.values())
    runs = compare(model, load_program(file), random_images(recorded.sizes, recorded.shape, 20))
    assert len({run.shape for run in runs}) > 15
    require_equal(runs, 1e-5)


def _fresh(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True)


def test_what_loading_needs(tiny, tmp_path):
    """``import mmvmamba.ops`` and nothing of the models or of mm*; without it PyTorch does not know the operators."""
    model, _, file = tiny
    image = torch.randn(1, 3, 70, 90)
    with torch.no_grad():
        torch.save((image, model(image)), tmp_path / "pair.pt")
    read = (
        f"image, expected = torch.load({str(tmp_path / 'pair.pt')!r}, weights_only=True)\n"
        f"program = torch.export.load({str(file)!r}).module()\n"
        "with torch.no_grad(): found = program(image)\n"
        "assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected))\n"
        "print([n for n in ('mmengine', 'mmcv', 'mmvmamba.models') if n in sys.modules])"
    )
    done = _fresh("import sys, torch, mmvmamba.ops\n" + read)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
    done = _fresh("import sys, torch\n" + read)
    assert done.returncode != 0 and "mmvmamba" in done.stderr


def _with_norms(family: str) -> nn.Module:
    """Return a nano network whose batch norms do something: many start with a weight of 0."""
    model = FAMILIES[family]("nano").eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.running_mean.normal_(std=0.2)
                module.running_var.uniform_(0.5, 2.0)
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(std=0.2)
    return model


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in FAMILIES]
)
def test_every_family_exports_for_any_size(family):
    """Odd and even sides, and 224, at which position embeddings are not resized."""
    model = _with_norms(family)
    recorded = record(model)
    assert all(high is None for _, high in recorded.sizes.values())
    # MobileMamba's smallest maps have a stride of 64, and PyTorch asks for three rows of them.
    least = 129 if family == "mobilemamba" else 97
    assert all(recorded.sizes[side][0] <= least for side in ("height", "width"))
    program = recorded.program.module()
    images = [torch.randn(shape) for shape in ((1, 3, least, 161), (3, 3, 224, 224), (2, 3, 200, least + 2))]
    require_equal(compare(model, program, images), 1e-4)


def test_fixed_dimensions_stay():
    model = _tiny()
    recorded = record(model, torch.randn(1, 3, 48, 64), dynamic=("width",))
    assert list(recorded.sizes) == ["width"] and recorded.shape == (1, 3, 48, 64)
    program = recorded.program.module()
    with torch.no_grad():
        image = torch.randn(1, 3, 48, 99)
        assert torch.allclose(program(image)[1], model(image)[1], atol=1e-5)
        with pytest.raises((AssertionError, RuntimeError)):
            program(torch.randn(1, 3, 49, 64))


def test_bad_input(tmp_path):
    model = _tiny()
    with pytest.raises(ConfigError, match=r"dynamic is \('hight',\), expected some of \('batch', 'height', 'width'\)"):
        record(model, dynamic=("hight",))
    with pytest.raises(ConfigError, match="training mode, call eval"):
        record(_tiny().train())
    with pytest.raises(ConfigError, match="ends in .pt2"):
        save_program(record(nn.ReLU().eval()), tmp_path / "model.pth")
    with pytest.raises(ConfigError, match="is no archive of PyTorch"):
        load_program(tmp_path / "absent.pt2")
    (tmp_path / "text.pt2").write_text("no")
    with pytest.raises(ConfigError, match="is no archive of PyTorch"):
        is_compiled_package(tmp_path / "text.pt2")


def test_what_looks_at_values_cannot_be_exported():
    class Odd(nn.Module):
        def forward(self, image):
            return image if float(image.sum()) > 0 else -image

    with pytest.raises(ConfigError, match="Odd cannot be exported for free batch, height, width"):
        record(Odd().eval())
