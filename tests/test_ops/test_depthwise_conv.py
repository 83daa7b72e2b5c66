"""The depthwise convolution against PyTorch's in float64, on every instruction set, and what it promises besides."""

from __future__ import annotations

import itertools
import random
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmvmamba.errors import BackendError, ConfigError, OpInputError
from mmvmamba.ops import depthwise_conv2d
from mmvmamba.testing import (
    FORWARD_BOUND,
    PARAMETER_GRAD_BOUND,
    STREAM_GRAD_BOUND,
    assert_close,
    requires_extension,
)
from tests.test_ops.test_backends import PACKAGE, run
from tests.test_ops.test_exact import BACKENDS

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ROOT = PACKAGE.parent


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """What the issue asks for, in its own words."""
    out = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding="same", groups=x.shape[3])
    return (F.silu(out) if activation == "silu" else out).permute(0, 2, 3, 1)


def laid_out(x: Tensor, kind: str) -> Tensor:
    """The same map in another memory layout; what is not part of it is NaN."""
    b, h, w, d = x.shape
    if kind == "chunk":  # the second half of a projection twice as wide
        return torch.cat([torch.full_like(x, float("nan")), x], -1).chunk(2, -1)[1]
    if kind == "crop":
        padded = x.new_full((b, h + 2, w + 3, d), float("nan"))
        padded[:, 1:-1, 2:-1] = x
        return padded[:, 1:-1, 2:-1]
    if kind == "channel_first":
        return x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    if kind == "expanded":
        return x[:1, :, :1].expand(b, h, w, d)
    if kind == "offset":
        return torch.cat([x.new_full((5,), float("nan")), x.reshape(-1)])[5:].view(x.shape)
    return x


LAYOUTS = ("plain", "chunk", "crop", "channel_first", "expanded", "offset")


def sample(seed: int, dtype: torch.dtype | None = None) -> tuple[list[Tensor | None], str, Tensor]:
    """Arguments x, weight and bias, the activation, and a gradient of the output."""
    pick = random.Random(seed)  # noqa: S311
    generator = torch.Generator().manual_seed(seed)
    dtype = dtype or DTYPES[seed % 4]
    b, h, w = pick.randint(1, 3), pick.choice((1, 2, 5, 7, 14, 29, 57)), pick.choice((1, 2, 3, 4, 6, 7, 8, 13, 18))
    d = pick.choice((1, 3, 8, 15, 16, 17, 32, 33, 48, 96, 100))
    kh, kw = pick.choice(((3, 3), (3, 3), (5, 5), (7, 7), (1, 1), (3, 1), (1, 5), (3, 5)))

    def make(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    x = laid_out(make(b, h, w, d), pick.choice(LAYOUTS))
    weight = make(d, 1, kh, kw, scale=(kh * kw) ** -0.5)
    bias = make(d, scale=0.5) if pick.random() < 0.7 else None
    grad = laid_out(make(b, h, w, d), pick.choice(LAYOUTS))
    return [x, weight, bias], pick.choice(("silu", "silu", "none")), grad


def differentiate(function, tensors: list[Tensor | None], grad: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Output and the gradients of the tensors that are there."""
    leaves = [None if value is None else value.detach().requires_grad_() for value in tensors]
    out = function(*leaves)
    return out.detach(), list(torch.autograd.grad(out, [leaf for leaf in leaves if leaf is not None], grad))


def check(tensors: list[Tensor | None], out: Tensor, grads: list[Tensor], activation: str, grad: Tensor) -> None:
    x, dtype = tensors[0], tensors[0].dtype
    doubles = [None if value is None else value.double() for value in tensors]
    expected, expected_grads = differentiate(lambda *args: reference(*args, activation), doubles, grad.double())
    assert out.dtype == dtype
    assert out.shape == x.shape
    assert_close("out", out, expected, FORWARD_BOUND[dtype])
    bounds = (STREAM_GRAD_BOUND, PARAMETER_GRAD_BOUND, PARAMETER_GRAD_BOUND)
    for name, found, want, bound in zip(("x", "weight", "bias"), grads, expected_grads, bounds, strict=False):
        assert found.dtype == dtype
        assert_close(f"gradient of {name}", found, want, bound[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", range(120))
def test_random_configurations(seed: int, backend: str) -> None:
    tensors, activation, grad = sample(seed)
    out, grads = differentiate(
        lambda *args: depthwise_conv2d(*args, activation=activation, backend=backend), tensors, grad
    )
    check(tensors, out, grads, activation, grad)


@requires_extension()
@pytest.mark.ext
@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_every_instruction_set(capability: str, tmp_path: Path) -> None:
    cases = [sample(seed) for seed in range(200, 280)]
    torch.save(cases, tmp_path / "in.pt")
    code = f"""
import torch
from mmvmamba.ops import depthwise_conv2d
results = []
for tensors, activation, grad in torch.load({str(tmp_path / "in.pt")!r}):
    leaves = [None if value is None else value.requires_grad_() for value in tensors]
    out = depthwise_conv2d(*leaves, activation=activation, backend="compiled")
    results.append((out.detach(), torch.autograd.grad(out, [leaf for leaf in leaves if leaf is not None], grad)))
torch.save(results, {str(tmp_path / "out.pt")!r})
print(torch.ops.mmvmamba.cpu_capability())
"""
    done = run(code, ROOT, ATEN_CPU_CAPABILITY=capability)
    assert done.returncode == 0, done.stderr
    best = run("import torch, mmvmamba.ops; print(torch.ops.mmvmamba.cpu_capability())", ROOT).stdout.strip()
    levels = ["default", "avx2", "avx512"]
    assert done.stdout.strip() == levels[min(levels.index(capability), levels.index(best))]
    for (tensors, activation, grad), (out, grads) in zip(cases, torch.load(tmp_path / "out.pt"), strict=True):
        check(tensors, out, grads, activation, grad)


CONVERSIONS = """
import torch
from mmvmamba.ops import depthwise_conv2d
for dtype in (torch.bfloat16, torch.float16):
    every = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(dtype).view(1, 64, 64, 16)
    one = torch.ones(16, 1, 1, 1, dtype=dtype)
    same = depthwise_conv2d(every, one, backend="compiled")
    assert torch.equal(same.isnan(), every.isnan()) and torch.equal(same[~every.isnan()], every[~every.isnan()])
    for seed in range(50):
        factor = torch.randn(16, generator=torch.Generator().manual_seed(seed)) * 2.0 ** (seed - 25)
        factor[0] = 1 + 2.0 ** -7  # exact products halfway between two numbers
        factor = factor.to(dtype)
        rounded = depthwise_conv2d(every, factor.view(16, 1, 1, 1), backend="compiled")
        expected = (every.float() * factor.float()).to(dtype)
        known = ~expected.isnan()
        assert torch.equal(rounded.isnan(), ~known) and torch.equal(rounded[known], expected[known]), (dtype, seed)
print("ok")
"""


@requires_extension()
@pytest.mark.ext
@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_half_precision_is_rounded_to_nearest_even(capability: str) -> None:
    """Every number of 16 bits there and back, and products with 50 factors, as PyTorch converts them."""
    done = run(CONVERSIONS, ROOT, ATEN_CPU_CAPABILITY=capability)
    assert done.stdout.strip() == "ok", done.stderr


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 1, 9, 3), (2, 9, 1, 16), (1, 3, 3, 100), (1, 2, 300, 17)])
@pytest.mark.parametrize("side", [1, 3, 5, 7, 11])
def test_kernels_larger_than_the_map(shape: tuple[int, ...], side: int, backend: str) -> None:
    d = shape[3]
    tensors = [torch.randn(shape), torch.randn(d, 1, side, side) / side, torch.randn(d)]
    grad = torch.randn(shape)
    out, grads = differentiate(lambda *args: depthwise_conv2d(*args, activation="silu", backend=backend), tensors, grad)
    check(tensors, out, grads, "silu", grad)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["none", "silu"])
@pytest.mark.parametrize("sides", [(3, 3), (5, 1), (1, 3)])
def test_gradcheck(sides: tuple[int, int], activation: str, bias: bool, backend: str) -> None:
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 1, *sides, dtype=torch.float64, requires_grad=True)
    leaves = [x, weight] + ([torch.randn(3, dtype=torch.float64, requires_grad=True)] if bias else [])
    assert torch.autograd.gradcheck(
        lambda *args: depthwise_conv2d(*args, activation=activation, backend=backend), leaves, nondet_tol=0.0
    )


def test_second_derivative_of_the_reference_alone() -> None:
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((1, 3, 2, 2), (2, 1, 3, 3))]
    assert torch.autograd.gradgradcheck(
        lambda *args: depthwise_conv2d(*args, activation="silu", backend="reference"), leaves
    )
    out = torch.ops.mmvmamba.depthwise_conv2d(*leaves, None, 1)
    (grad,) = torch.autograd.grad(out.sum(), leaves[0], create_graph=True)
    with pytest.raises(BackendError, match="backend='reference'"):
        grad.sum().backward()


@pytest.mark.parametrize("needs", [(True, True, True), (True, False, False), (False, True, True)])
@pytest.mark.parametrize("activation", ["none", "silu"])
def test_opcheck(needs: tuple[bool, bool, bool], activation: str) -> None:
    for seed in (0, 7):
        (x, weight, bias), _, grad = sample(seed)
        code = ["none", "silu"].index(activation)
        leaves = [
            None if value is None else value.detach().requires_grad_(needed)
            for value, needed in zip((x, weight, bias), needs, strict=True)
        ]
        torch.library.opcheck(torch.ops.mmvmamba.depthwise_conv2d.default, (*leaves, code))
        arguments = (grad, x, weight, bias, code, *needs)
        torch.library.opcheck(torch.ops.mmvmamba.depthwise_conv2d_backward.default, arguments)


@requires_extension()
@pytest.mark.ext
@pytest.mark.parametrize("activation", ["none", "silu"])
def test_each_gradient_alone_is_what_it_is_among_all(activation: str) -> None:
    tensors = [torch.randn(2, 30, 9, 20), torch.randn(20, 1, 3, 3), torch.randn(20)]
    grad = torch.randn(2, 30, 9, 20)
    code = ["none", "silu"].index(activation)
    every = torch.ops.mmvmamba.depthwise_conv2d_backward(grad, *tensors, code, True, True, True)
    for needs in itertools.product((False, True), repeat=3):
        some = torch.ops.mmvmamba.depthwise_conv2d_backward(grad, *tensors, code, *needs)
        for needed, found, want in zip(needs, some, every, strict=True):
            # With dx the map is cut alike, so the sums have the same order.
            assert torch.equal(found, want) if needed else found.numel() == 0


@requires_extension()
@pytest.mark.ext
def test_results_do_not_depend_on_the_number_of_threads() -> None:
    before = torch.get_num_threads()
    cases = [(*sample(seed)[:2], sample(seed)[2]) for seed in range(24)]
    large = [torch.randn(1, 90, 31, 40), torch.randn(40, 1, 3, 3), torch.randn(40)]
    cases.append((large, "silu", torch.randn(1, 90, 31, 40)))
    try:
        results = []
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            results.append([])
            for tensors, activation, grad in cases:
                out, grads = differentiate(
                    lambda *args, activation=activation: depthwise_conv2d(
                        *args, activation=activation, backend="compiled"
                    ),
                    tensors,
                    grad,
                )
                results[-1] += [out, *grads]
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    finally:
        torch.set_num_threads(before)


@requires_extension()
@pytest.mark.ext
@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [5, 16, 40])
def test_layouts_give_the_same_bits_and_nothing_beside_a_map_is_read(kind: str, dtype: torch.dtype, d: int) -> None:
    """What lies beside the map is NaN, which any sum it entered would show."""
    x, grad = (laid_out(torch.randn(2, 6, 9, d).to(dtype), kind) for _ in range(2))
    weight, bias = torch.randn(d, 1, 3, 3).to(dtype), torch.randn(d).to(dtype)

    def call(*args: Tensor) -> Tensor:
        return depthwise_conv2d(*args, activation="silu", backend="compiled")

    out, grads = differentiate(call, [x, weight, bias], grad)
    expected, expected_grads = differentiate(call, [x.contiguous(), weight, bias], grad.contiguous())
    assert not out.isnan().any()
    for found, want in zip([out, *grads], [expected, *expected_grads], strict=True):
        assert torch.equal(found, want)


@requires_extension()
@pytest.mark.ext
def test_halves_of_a_projection_are_not_copied() -> None:
    projection = torch.randn(1, 20, 20, 64)
    half = projection.chunk(2, -1)[1]
    with torch.profiler.profile() as profile:
        depthwise_conv2d(half, torch.randn(32, 1, 3, 3), activation="silu", backend="compiled")
    names = {event.key for event in profile.key_averages()}
    assert "mmvmamba::depthwise_conv2d" in names
    assert not names & {"aten::copy_", "aten::clone"}, names


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_crosses_maps_or_channels(backend: str) -> None:
    x = torch.randn(3, 5, 6, 20)
    weight = torch.randn(20, 1, 3, 3)
    clean = depthwise_conv2d(x, weight, backend=backend)
    x[1, 2, 3, 7] = float("nan")
    touched = depthwise_conv2d(x, weight, backend=backend).isnan()
    expected = torch.zeros_like(touched)
    expected[1, 1:4, 2:5, 7] = True
    assert torch.equal(touched, expected)
    assert not clean.isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_silu_at_its_ends(backend: str) -> None:
    x = torch.tensor([-1e30, -1e4, -100.0, -87.0, -20.0, -1e-3, 0.0, 1e-3, 20.0, 100.0, 1e30]).view(1, 1, -1, 1)
    one = torch.ones(1, 1, 1, 1)
    tensors = [x, one]
    out, grads = differentiate(
        lambda *args: depthwise_conv2d(*args, activation="silu", backend=backend), tensors, torch.ones_like(x)
    )
    leaf = x.double().requires_grad_()
    exact = F.silu(leaf)
    (slope,) = torch.autograd.grad(exact.sum(), leaf)
    torch.testing.assert_close(out.double(), exact.detach(), rtol=1e-5, atol=1e-36)
    torch.testing.assert_close(grads[0].double(), slope, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)])
def test_nothing_to_convolve(shape: tuple[int, ...], backend: str) -> None:
    d = shape[3]
    tensors = [torch.randn(shape), torch.randn(d, 1, 3, 3), torch.randn(d)]
    out, grads = differentiate(
        lambda *args: depthwise_conv2d(*args, activation="silu", backend=backend), tensors, torch.ones(shape)
    )
    assert out.shape == shape
    for grad, value in zip(grads, tensors, strict=True):
        assert grad.shape == value.shape
        assert not grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_as_for_a_convolution(dtype: torch.dtype, backend: str) -> None:
    x, weight, bias = torch.randn(1, 5, 6, 20), torch.randn(20, 1, 3, 3), torch.randn(20)
    leaves = [value.clone().requires_grad_() for value in (x, weight, bias)]
    with torch.autocast("cpu", dtype):
        out = depthwise_conv2d(*leaves, activation="silu", backend=backend)
        mixed = depthwise_conv2d(x.to(dtype), weight, bias, activation="silu", backend=backend)
        double = depthwise_conv2d(x.double(), weight.double(), backend=backend)
        plain = F.conv2d(x.permute(0, 3, 1, 2), weight, padding=1, groups=20)
    assert out.dtype == mixed.dtype == plain.dtype == dtype
    assert double.dtype == torch.float64
    low = [value.to(dtype) for value in (x, weight, bias)]
    assert torch.equal(out, depthwise_conv2d(*low, activation="silu", backend=backend))
    assert torch.equal(out, mixed)
    for grad in torch.autograd.grad(out.sum(), leaves):
        assert grad.dtype == torch.float32


def test_forward_mode_is_right_or_refused() -> None:
    x, tangent, weight = torch.randn(1, 4, 5, 3), torch.randn(1, 4, 5, 3), torch.randn(3, 1, 3, 3)
    expected = torch.func.jvp(lambda value: reference(value, weight, None, "silu"), (x,), (tangent,))[1]
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        out = depthwise_conv2d(dual, weight, activation="silu")
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(out).tangent, expected)


@requires_extension()
@pytest.mark.ext
def test_forward_mode_is_refused_by_the_compiled_backend() -> None:
    x, weight = torch.randn(1, 4, 5, 3), torch.randn(3, 1, 3, 3)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.randn_like(x))
        with pytest.raises(BackendError, match="no forward-mode derivative"):
            depthwise_conv2d(dual, weight, backend="compiled")


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_agrees_with_eager(dynamic: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(depthwise_conv2d, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for h, w in ((4, 5), (7, 3)):
        args = [torch.randn(shape, requires_grad=True) for shape in ((2, h, w, 6), (6, 1, 3, 3), (6,))]
        for enabled in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                eager, traced = (call(*args, activation="silu") for call in (depthwise_conv2d, compiled))
            assert torch.equal(traced, eager)
            expected = torch.autograd.grad(eager.sum(), args)
            for grad, want in zip(torch.autograd.grad(traced.sum(), args), expected, strict=True):
                torch.testing.assert_close(grad, want, rtol=1e-5, atol=1e-5)


def test_the_plain_kernels_of_the_dispatcher() -> None:
    """What runs where nothing is compiled, with every choice of gradients."""
    from mmvmamba.ops.depthwise_conv import operator

    for seed in range(0, 40, 4):
        (x, weight, bias), activation, grad = sample(seed, torch.float64)
        code = ["none", "silu"].index(activation)
        out = operator._fallback_forward(x, weight, bias, code)
        every = operator._fallback_backward(grad, x, weight, bias, code, True, True, True)
        check([x, weight, bias], out, [value for value in every if value.numel()], activation, grad)
        for needs in itertools.product((False, True), repeat=3):
            some = operator._fallback_backward(grad, x, weight, bias, code, *needs)
            for needed, found, want in zip(needs, some, every, strict=True):
                assert torch.equal(found, want) if needed else found.numel() == 0


D_ = 6
BAD = {
    "x is a list": ("x", [1.0], "is a list"),
    "x has rank 3": ("x", torch.randn(4, 5, D_), "has 3 dimensions"),
    "x is integer": ("x", torch.ones(2, 4, 5, D_, dtype=torch.int64), "dtype torch.int64"),
    "x is sparse": ("x", torch.randn(2, 4, 5, D_).to_sparse(), "layout torch.sparse_coo"),
    "x is channel-first": ("x", torch.randn(2, D_, 4, 5), "has 5 channels"),
    "weight has rank 3": ("weight", torch.randn(D_, 3, 3), "has 3 dimensions"),
    "weight is dense": ("weight", torch.randn(D_, D_, 3, 3), r"shape \(6, 6, 3, 3\)"),
    "weight has other channels": ("weight", torch.randn(5, 1, 3, 3), r"shape \(5, 1, 3, 3\)"),
    "weight has an even side": ("weight", torch.randn(D_, 1, 3, 4), "has sides 3 and 4"),
    "weight has no side": ("weight", torch.randn(D_, 1, 0, 3), "has sides 0 and 3"),
    "weight has another dtype": ("weight", torch.randn(D_, 1, 3, 3).bfloat16(), "dtype torch.bfloat16"),
    "weight is on another device": ("weight", torch.randn(D_, 1, 3, 3, device="meta"), "is on meta"),
    "bias is a number": ("bias", 1.0, "is a float"),
    "bias has other channels": ("bias", torch.randn(5), r"shape \(5,\)"),
    "bias has another dtype": ("bias", torch.randn(D_).double(), "dtype torch.float64"),
    "activation is unknown": ("activation", "sillu", "is 'sillu'"),
    "activation is None": ("activation", None, "is None"),
    "activation is a list": ("activation", ["silu"], r"is \['silu'\]"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("argument", "value", "found"), BAD.values(), ids=BAD)
def test_bad_input(argument: str, value: object, found: str, backend: str) -> None:
    good = {"x": torch.randn(2, 4, 5, D_), "weight": torch.randn(D_, 1, 3, 3), "bias": torch.randn(D_)}
    with pytest.raises(OpInputError, match=rf"depthwise_conv2d: argument '{argument}' .*{found}.*; expected .+\. .+"):
        depthwise_conv2d(**(good | {argument: value}), backend=backend)


def test_bad_backend_and_keyword() -> None:
    x, weight = torch.randn(1, 2, 2, 3), torch.randn(3, 1, 3, 3)
    with pytest.raises(ConfigError, match="unknown backend 'compild'"):
        depthwise_conv2d(x, weight, backend="compild")
    with pytest.raises(TypeError, match="activatoin"):
        depthwise_conv2d(x, weight, activatoin="silu")
    with pytest.raises(OpInputError, match=re.escape("Did you mean 'silu'")):
        depthwise_conv2d(x, weight, activation="sillu")


@requires_extension()
@pytest.mark.ext
def test_the_raw_operator_checks_what_protects_memory() -> None:
    x, weight = torch.randn(1, 4, 5, 3), torch.randn(3, 1, 3, 3)
    forward, backward = torch.ops.mmvmamba.depthwise_conv2d, torch.ops.mmvmamba.depthwise_conv2d_backward
    needs = (True, True, True)
    bad = [
        (forward, (x[0], weight, None, 0)),
        (forward, (x, weight[:2], None, 0)),
        (forward, (x, weight[..., :2], None, 0)),
        (forward, (x, weight, torch.randn(2), 0)),
        (forward, (x, weight, None, 2)),
        (forward, (x.int(), weight, None, 0)),
        (backward, (torch.randn(1, 4, 4, 3), x, weight, None, 0, *needs)),
        (backward, (torch.randn(4, 5, 3), x, weight, None, 0, *needs)),
    ]
    for operator, arguments in bad:
        with pytest.raises(RuntimeError):
            operator(*arguments)
