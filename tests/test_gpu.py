"""What only a GPU can show: ``make test-gpu``. Deselected by ``make test``; fails, not skips, where there is no GPU."""

from __future__ import annotations

import pytest
import torch

from mmvmamba.ops import scan2d, selective_scan
from mmvmamba.testing import FORWARD_BOUND, PARAMETER_GRAD_BOUND, STREAM_GRAD_BOUND, assert_close
from tests.test_ops.samples import MAKERS

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _needs_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.fail("these tests need a CUDA GPU and a torch built for it; run them on such a machine")


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("seed", range(20))
def test_operators_on_device_tensors(make, seed: int) -> None:
    """The automatic choice on CUDA tensors gives the numbers of the float64 reference on the CPU."""
    sample = make(seed)
    expected_out, expected = sample.gradients("reference", double=True)
    for name, value in sample.tensors.items():
        sample.tensors[name] = None if value is None else value.cuda()
    if isinstance(sample.options.get("orders"), torch.Tensor):
        sample.options["orders"] = sample.options["orders"].cuda()
    leaves = {
        name: None if value is None else value.detach().requires_grad_() for name, value in sample.tensors.items()
    }
    out = sample.run(None, leaves)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weights = weights.to(sample.options.get("out_dtype") or sample.dtype).to("cuda", out.dtype)
    wanted = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    grads = torch.autograd.grad(out, list(wanted.values()), weights)
    assert_close("out", out.cpu(), expected_out, FORWARD_BOUND[sample.dtype])
    for name, grad in zip(wanted, grads, strict=True):
        bounds = STREAM_GRAD_BOUND if name in sample.streams else PARAMETER_GRAD_BOUND
        assert_close(f"gradient of {name}", grad.cpu(), expected[name], bounds[sample.dtype])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_backbone_trains_under_autocast(dtype: torch.dtype) -> None:
    from mmvmamba.models import VMamba

    model = VMamba(arch="nano").cuda().train()
    image = torch.randn(2, 3, 64, 96, device="cuda")
    with torch.autocast("cuda", dtype=dtype):
        outs = model(image)
    sum(out.float().square().mean() for out in outs).backward()
    assert all(out.isfinite().all() for out in outs)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_backbone_gives_the_same_features_as_on_the_cpu() -> None:
    from mmvmamba.models import VMamba

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    model = VMamba(arch="nano").eval()
    image = torch.randn(1, 3, 65, 97)
    with torch.no_grad():
        expected = model(image)
        actual = model.cuda()(image.cuda())
    for have, want in zip(actual, expected, strict=True):
        assert_close("features", have.cpu(), want, 3e-5)


def test_tensors_on_two_devices_are_refused() -> None:
    u = torch.randn(1, 4, 5, device="cuda")
    with pytest.raises(ValueError, match="argument 'B' is on cpu"):
        selective_scan(u, u, -torch.rand(4, 2, device="cuda"), torch.randn(1, 2, 5), torch.randn(1, 2, 5))
    with pytest.raises(ValueError, match="is on cpu"):
        scan2d(torch.randn(1, 2, 2, 4, device="cuda"), torch.randn(1, 2, 2, 1, 3), torch.randn(1, 4, 1), None,
               -torch.rand(1, 4, 1), orders=torch.arange(4)[None])  # fmt: skip
