"""Packages of AOTInductor: PyTorch's numbers at random sizes, read in a fresh process."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from mmvmamba.deployment import aotinductor
from mmvmamba.deployment.aotinductor import check_compiler, compile_package, load_package
from mmvmamba.deployment.checks import compare, random_images, require_equal
from mmvmamba.deployment.programs import load_program, record, save_program
from mmvmamba.errors import ConfigError
from mmvmamba.models import VMamba

ROOT = Path(__file__).parents[2]


def _tiny() -> VMamba:
    return VMamba(dict(dims=[8], depths=[1]), out_indices=(0,)).eval()


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    torch.manual_seed(1)
    model = _tiny()
    recorded = record(model)
    file = tmp_path_factory.mktemp("packages") / "tiny.pt2"
    assert compile_package(recorded, file) > 0
    return model, recorded, file


@pytest.mark.slow
def test_twenty_random_sizes(package):
    model, recorded, file = package
    runs = compare(model, load_package(file), random_images(recorded.sizes, recorded.shape, 20))
    require_equal(runs, 1e-5)


@pytest.mark.slow
def test_what_loading_needs(package, tmp_path):
    """``import mmvmamba.ops``, and neither the models nor a compiler."""
    model, _, file = package
    image = torch.randn(1, 3, 70, 90)
    with torch.no_grad():
        torch.save((image, model(image)), tmp_path / "pair.pt")
    code = (
        "import os, sys, torch, mmvmamba.ops\n"
        "os.environ['CXX'] = '/no/compiler'\n"
        f"image, expected = torch.load({str(tmp_path / 'pair.pt')!r}, weights_only=True)\n"
        f"found = torch._inductor.aoti_load_package({str(file)!r})(image)\n"
        "assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected))\n"
        "print([n for n in ('mmengine', 'mmvmamba.models') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_programs_and_packages_are_told_apart(package, tmp_path):
    _, recorded, file = package
    program = save_program(recorded, tmp_path / "program.pt2")
    with pytest.raises(ConfigError, match="Load it with load_package"):
        load_program(file)
    with pytest.raises(ConfigError, match="Load it with load_program"):
        load_package(program)


def test_types_are_written_as_they_are_read(tmp_path):
    """The two numberings are PyTorch's own: the one that it writes, and the one that TorchScript shows."""
    from torch._export.serde.schema import ScalarType
    from torch._export.serde.serialize import _TORCH_TO_SERIALIZE_DTYPE as WRITTEN

    @torch.jit.script
    def as_read(x: torch.Tensor) -> int:
        return x.dtype

    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert aotinductor._READ_AS[int(WRITTEN[dtype])] == as_read(torch.zeros(1, dtype=dtype))
    assert aotinductor._READ_AS[int(ScalarType.FLOAT)] == 6

    calls = {"nodes": [{"inputs": [{"arg": {"as_scalar_type": 7}}, {"arg": {"as_int": 7}}]}]}
    with zipfile.ZipFile(tmp_path / "p.pt2", "w") as archive:
        archive.writestr("p/data/aotinductor/model/a.wrapper.json", json.dumps(calls))
        archive.writestr("p/other.json", json.dumps(calls))
    aotinductor._mend_types(tmp_path / "p.pt2")
    with zipfile.ZipFile(tmp_path / "p.pt2") as archive:
        mended = json.loads(archive.read("p/data/aotinductor/model/a.wrapper.json"))
        assert json.loads(archive.read("p/other.json")) == calls
    assert mended == {"nodes": [{"inputs": [{"arg": {"as_scalar_type": 6}}, {"arg": {"as_int": 7}}]}]}
    assert [path.name for path in tmp_path.iterdir()] == ["p.pt2"]


def test_without_a_compiler(monkeypatch):
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def none() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    with pytest.raises(ConfigError, match=r"no C\+\+ compiler was found.*apt-get install g\+\+"):
        check_compiler()
