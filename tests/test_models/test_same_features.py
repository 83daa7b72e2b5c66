"""One model, every implementation: CPU kernels, Triton in its interpreter and CUDA kernels on the emulator.

Features and gradients within the bounds of the operators (reliability matrix A1), against float64.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mmvmamba.models import FAMILIES
from mmvmamba.models.backbones.base import BaseBackbone
from mmvmamba.models.layers import ss2d
from mmvmamba.ops import use_backend
from mmvmamba.testing import assert_close, requires_extension

ROOT = Path(__file__).parents[2]
# The operators' bounds are 2e-6 and 1e-5 for one scan; a model runs a dozen of them, and as many products, in a row.
FEATURES, GRADIENTS = 2e-5, 1e-4


def run(model: BaseBackbone, image: Tensor) -> list[Tensor]:
    """Feature maps, gradient of the image and of every parameter, for a fixed weight of the features."""
    model.zero_grad()
    leaf = image.clone().requires_grad_()
    outs = model(leaf)
    sum((out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum() for out in outs).backward()
    assert leaf.grad is not None
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return [*(out.detach() for out in outs), leaf.grad, *grads]


def settle(model: BaseBackbone) -> None:
    """Give batch norms the statistics of random images."""
    for norm in model.modules():
        if isinstance(norm, torch.nn.modules.batchnorm._BatchNorm):
            norm.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.randn(4, 3, 64, 64))


def compare(
    family: str, calculate: Callable[[BaseBackbone, Tensor], list[Tensor]], size: tuple[int, int] = (33, 70)
) -> None:
    torch.manual_seed(0)
    model = FAMILIES[family](arch="nano")
    if model.stem_stride > 4:
        # Without statistics of their own, the batch norms of a new mobile network let its maps fade to nothing.
        settle(model)
    model.train(False)
    image = torch.randn(1, 3, *size)
    found = calculate(model, image)
    with use_backend("reference"):
        expected = run(model.double(), image.double())
    count = len(model.out_indices)
    assert len(found) == len(expected) > count + 10
    for i, (have, want) in enumerate(zip(found, expected, strict=True)):
        assert_close(f"tensor {i}", have, want, FEATURES if i < count else GRADIENTS)


@requires_extension()
@pytest.mark.ext
@pytest.mark.parametrize("family", FAMILIES)
def test_cpu_kernels(family: str) -> None:
    with use_backend("compiled"):
        compare(family, run)


def test_cuda_kernels_on_the_emulator(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests import cuda_emulation

    calls = []

    def counted(*args: object, **options: object) -> Tensor:
        calls.append(1)
        return cuda_emulation.scan2d(*args, **options)

    def calculate(model: BaseBackbone, image: Tensor) -> list[Tensor]:
        with monkeypatch.context() as patch:
            patch.setattr(ss2d, "scan2d", counted)
            return run(model, image)

    compare("vmamba", calculate)
    assert calls


def triton_in_this_process(family: str) -> None:
    with use_backend("triton"):
        compare(family, run, (9, 14))  # the interpreter is slow


@pytest.mark.parametrize("family", FAMILIES)
def test_triton_in_its_interpreter(family: str) -> None:
    code = (
        "import sys, types; package = types.ModuleType('tests'); package.__path__ = ['tests']\n"
        "sys.modules['tests'] = package\n"
        "from tests.test_models import test_same_features\n"
        f"test_same_features.triton_in_this_process({family!r}); print('same')"
    )
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "same", done.stdout + done.stderr
