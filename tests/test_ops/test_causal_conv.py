"""The causal convolution against PyTorch's in float64, on every instruction set, and what it promises besides."""

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
from mmvmamba.ops import causal_conv1d
from mmvmamba.testing import (
    FORWARD_BOUND,
    PARAMETER_GRAD_BOUND,
    STREAM_GRAD_BOUND,
    assert_close,
    requires_extension,
)
from tests.test_ops.test_backends import PACKAGE, run
from tests.test_ops.test_depthwise_conv import DTYPES, differentiate
from tests.test_ops.test_exact import BACKENDS

ROOT = PACKAGE.parent
BOTH = (False, True)


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, reverse: tuple[bool, ...], activation: str) -> Tensor:
    """Reversed copies and a convolution that looks to the left, as upstream does it."""
    outs = []
    for i, backwards in enumerate(reverse):
        sequence = (x.flip(1) if backwards else x).transpose(1, 2)
        width = weight.shape[2]
        z = F.conv1d(F.pad(sequence, (width - 1, 0)), weight[i, :, None], None if bias is None else bias[i],
                     groups=x.shape[2]).transpose(1, 2)  # fmt: skip
        outs.append(z.flip(1) if backwards else z)
    out = torch.stack(outs, 2)
    return F.silu(out) if activation == "silu" else out


def laid_out(x: Tensor, kind: str) -> Tensor:
    """The same numbers in another memory layout; what is not part of them is NaN."""
    if kind == "chunk":  # the second half of a projection twice as wide
        return torch.cat([torch.full_like(x, float("nan")), x], -1).chunk(2, -1)[1]
    if kind == "crop":
        padded = x.new_full((x.shape[0], x.shape[1] + 3, *x.shape[2:]), float("nan"))
        padded[:, 1:-2] = x
        return padded[:, 1:-2]
    if kind == "channel_first":
        return x.transpose(1, -1).contiguous().transpose(1, -1)
    if kind == "expanded":
        return x[:1, :1].expand(x.shape)
    if kind == "offset":
        return torch.cat([x.new_full((5,), float("nan")), x.reshape(-1)])[5:].view(x.shape)
    return x


LAYOUTS = ("plain", "chunk", "crop", "channel_first", "expanded", "offset")
DIRECTIONS = (BOTH, BOTH, BOTH, (False,), (True,), (True, False, True), (False, False))

Sample = tuple[list[Tensor | None], tuple[bool, ...], str, Tensor]


def sample(seed: int, dtype: torch.dtype | None = None) -> Sample:
    """Arguments x, weight and bias, the directions, the activation, and a gradient of the output."""
    pick = random.Random(seed)  # noqa: S311
    generator = torch.Generator().manual_seed(seed)
    dtype = dtype or DTYPES[seed % 4]
    b, length = pick.randint(1, 3), pick.choice((1, 2, 3, 4, 7, 63, 64, 65, 66, 67, 128, 130, 197, 250))
    d = pick.choice((1, 3, 8, 15, 16, 17, 32, 33, 48, 96, 100))
    reverse, width = pick.choice(DIRECTIONS), pick.choice((4, 4, 4, 1, 2, 3, 5, 9))

    def make(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    x = laid_out(make(b, length, d), pick.choice(LAYOUTS))
    weight = make(len(reverse), d, width, scale=width**-0.5)
    bias = make(len(reverse), d, scale=0.5) if pick.random() < 0.7 else None
    grad = laid_out(make(b, length, len(reverse), d), pick.choice(LAYOUTS))
    return [x, weight, bias], reverse, pick.choice(("silu", "silu", "none")), grad


def check(
    tensors: list[Tensor | None], out: Tensor, grads: list[Tensor], reverse: tuple[bool, ...], activation: str,
    grad: Tensor,
) -> None:  # fmt: skip
    x, dtype = tensors[0], tensors[0].dtype
    doubles = [None if value is None else value.double() for value in tensors]
    expected, expected_grads = differentiate(
        lambda *args: reference(*args, reverse, activation), doubles, grad.double()
    )
    assert out.dtype == dtype
    assert out.shape == (*x.shape[:2], len(reverse), x.shape[2])
    assert out.is_contiguous()
    assert_close("out", out, expected, FORWARD_BOUND[dtype])
    bounds = (STREAM_GRAD_BOUND, PARAMETER_GRAD_BOUND, PARAMETER_GRAD_BOUND)
    for name, found, want, bound in zip(("x", "weight", "bias"), grads, expected_grads, bounds, strict=False):
        assert found.dtype == dtype
        assert_close(f"gradient of {name}", found, want, bound[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", range(120))
def test_random_configurations(seed: int, backend: str) -> None:
    tensors, reverse, activation, grad = sample(seed)
    out, grads = differentiate(
        lambda *args: causal_conv1d(*args, reverse=reverse, activation=activation, backend=backend), tensors, grad
    )
    check(tensors, out, grads, reverse, activation, grad)


@requires_extension()
@pytest.mark.ext
@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_every_instruction_set(capability: str, tmp_path: Path) -> None:
    cases = [sample(seed) for seed in range(200, 280)]
    torch.save(cases, tmp_path / "in.pt")
    code = f"""
import torch
from mmvmamba.ops import causal_conv1d
results = []
for tensors, reverse, activation, grad in torch.load({str(tmp_path / "in.pt")!r}):
    leaves = [None if value is None else value.requires_grad_() for value in tensors]
    out = causal_conv1d(*leaves, reverse=reverse, activation=activation, backend="compiled")
    results.append((out.detach(), torch.autograd.grad(out, [leaf for leaf in leaves if leaf is not None], grad)))
torch.save(results, {str(tmp_path / "out.pt")!r})
print(torch.ops.mmvmamba.cpu_capability())
"""
    done = run(code, ROOT, ATEN_CPU_CAPABILITY=capability)
    assert done.returncode == 0, done.stderr
    best = run("import torch, mmvmamba.ops; print(torch.ops.mmvmamba.cpu_capability())", ROOT).stdout.strip()
    levels = ["default", "avx2", "avx512"]
    assert done.stdout.strip() == levels[min(levels.index(capability), levels.index(best))]
    for (tensors, reverse, activation, grad), (out, grads) in zip(cases, torch.load(tmp_path / "out.pt"), strict=True):
        check(tensors, out, grads, reverse, activation, grad)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reverse", [(False,), (True,)])
@pytest.mark.parametrize("width", [1, 4, 6])
def test_a_position_reaches_those_of_its_direction_alone(width: int, reverse: tuple[bool], backend: str) -> None:
    """A NaN of one sequence and channel shows at itself and at the positions after it, as far as the taps reach."""
    x, weight = torch.randn(3, 90, 20), torch.randn(1, 20, width)
    clean = causal_conv1d(x, weight, reverse=reverse, backend=backend)
    x[1, 63, 7] = float("nan")
    touched = causal_conv1d(x, weight, reverse=reverse, backend=backend).isnan()
    expected = torch.zeros_like(touched)
    reached = slice(63 - width + 1, 64) if reverse[0] else slice(63, 63 + width)
    expected[1, reached, 0, 7] = True
    assert torch.equal(touched, expected)
    assert not clean.isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_last_tap_meets_the_position_itself(backend: str) -> None:
    x, weight = torch.randn(1, 9, 5), torch.zeros(2, 5, 4)
    weight[:, :, 3] = 1
    assert torch.equal(causal_conv1d(x, weight, backend=backend), x[:, :, None].expand(1, 9, 2, 5))
    weight = torch.zeros(2, 5, 4)
    weight[:, :, 2] = 1
    out = causal_conv1d(x, weight, backend=backend)
    assert torch.equal(out[:, 1:, 0], x[:, :-1])
    assert torch.equal(out[:, :-1, 1], x[:, 1:])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["none", "silu"])
@pytest.mark.parametrize("width", [1, 3, 4])
def test_gradcheck(width: int, activation: str, bias: bool, backend: str) -> None:
    shapes = ((2, 5, 3), (2, 3, width)) + (((2, 3),) if bias else ())
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(
        lambda *args: causal_conv1d(*args, activation=activation, backend=backend), leaves, nondet_tol=0.0
    )


def test_second_derivative_of_the_reference_alone() -> None:
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((1, 4, 2), (2, 2, 3))]
    assert torch.autograd.gradgradcheck(
        lambda *args: causal_conv1d(*args, activation="silu", backend="reference"), leaves
    )
    out = torch.ops.mmvmamba.causal_conv1d(*leaves, None, [0, 1], 1)
    (grad,) = torch.autograd.grad(out.sum(), leaves[0], create_graph=True)
    with pytest.raises(BackendError, match="backend='reference'"):
        grad.sum().backward()


@pytest.mark.parametrize("needs", [(True, True, True), (True, False, False), (False, True, True)])
@pytest.mark.parametrize("activation", ["none", "silu"])
def test_opcheck(needs: tuple[bool, bool, bool], activation: str) -> None:
    for seed in (0, 7):
        (x, weight, bias), reverse, _, grad = sample(seed)
        code, directions = ["none", "silu"].index(activation), [int(value) for value in reverse]
        leaves = [
            None if value is None else value.detach().requires_grad_(needed)
            for value, needed in zip((x, weight, bias), needs, strict=True)
        ]
        torch.library.opcheck(torch.ops.mmvmamba.causal_conv1d.default, (*leaves, directions, code))
        arguments = (grad, x, weight, bias, directions, code, *needs)
        torch.library.opcheck(torch.ops.mmvmamba.causal_conv1d_backward.default, arguments)


@requires_extension()
@pytest.mark.ext
@pytest.mark.parametrize("activation", [0, 1])
def test_each_gradient_alone_is_what_it_is_among_all(activation: int) -> None:
    tensors = [torch.randn(2, 150, 20), torch.randn(2, 20, 4), torch.randn(2, 20)]
    grad = torch.randn(2, 150, 2, 20)
    arguments = (grad, *tensors, [0, 1], activation)
    every = torch.ops.mmvmamba.causal_conv1d_backward(*arguments, True, True, True)
    for needs in itertools.product((False, True), repeat=3):
        some = torch.ops.mmvmamba.causal_conv1d_backward(*arguments, *needs)
        for needed, found, want in zip(needs, some, every, strict=True):
            assert torch.equal(found, want) if needed else found.numel() == 0


@requires_extension()
@pytest.mark.ext
def test_results_do_not_depend_on_the_number_of_threads() -> None:
    before = torch.get_num_threads()
    large = [torch.randn(2, 500, 70), torch.randn(2, 70, 4), torch.randn(2, 70)]
    cases = [*map(sample, range(24)), (large, BOTH, "silu", torch.randn(2, 500, 2, 70))]
    try:
        results = []
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            results.append([])
            for tensors, reverse, activation, grad in cases:
                options = {"reverse": reverse, "activation": activation, "backend": "compiled"}
                out, grads = differentiate(
                    lambda *args, options=options: causal_conv1d(*args, **options), tensors, grad
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
def test_layouts_give_the_same_bits_and_nothing_beside_is_read(kind: str, dtype: torch.dtype, d: int) -> None:
    """What lies beside the sequence is NaN, which any sum it entered would show."""
    x, grad = laid_out(torch.randn(2, 70, d).to(dtype), kind), laid_out(torch.randn(2, 70, 2, d).to(dtype), kind)
    weight, bias = torch.randn(2, d, 4).to(dtype), torch.randn(2, d).to(dtype)

    def call(*args: Tensor) -> Tensor:
        return causal_conv1d(*args, activation="silu", backend="compiled")

    out, grads = differentiate(call, [x, weight, bias], grad)
    expected, expected_grads = differentiate(call, [x.contiguous(), weight, bias], grad.contiguous())
    assert not out.isnan().any()
    for found, want in zip([out, *grads], [expected, *expected_grads], strict=True):
        assert torch.equal(found, want)


@requires_extension()
@pytest.mark.ext
def test_halves_of_a_projection_are_not_copied() -> None:
    half = torch.randn(1, 100, 64).chunk(2, -1)[1]
    with torch.profiler.profile() as profile:
        causal_conv1d(half, torch.randn(2, 32, 4), activation="silu", backend="compiled")
    names = {event.key for event in profile.key_averages()}
    assert "mmvmamba::causal_conv1d" in names
    assert not names & {"aten::copy_", "aten::clone"}, names


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 4, 5), (2, 0, 5), (2, 4, 0)])
def test_nothing_to_convolve(shape: tuple[int, ...], backend: str) -> None:
    b, length, d = shape
    tensors = [torch.randn(shape), torch.randn(2, d, 4), torch.randn(2, d)]
    grad = torch.ones(b, length, 2, d)
    out, grads = differentiate(lambda *args: causal_conv1d(*args, activation="silu", backend=backend), tensors, grad)
    assert out.shape == grad.shape
    for gradient, value in zip(grads, tensors, strict=True):
        assert gradient.shape == value.shape
        assert not gradient.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_as_for_a_convolution(dtype: torch.dtype, backend: str) -> None:
    x, weight, bias = torch.randn(1, 9, 20), torch.randn(2, 20, 4), torch.randn(2, 20)
    leaves = [value.clone().requires_grad_() for value in (x, weight, bias)]
    with torch.autocast("cpu", dtype):
        out = causal_conv1d(*leaves, activation="silu", backend=backend)
        mixed = causal_conv1d(x.to(dtype), weight, bias, activation="silu", backend=backend)
        double = causal_conv1d(x.double(), weight.double(), backend=backend)
    assert out.dtype == mixed.dtype == dtype
    assert double.dtype == torch.float64
    low = [value.to(dtype) for value in (x, weight, bias)]
    assert torch.equal(out, causal_conv1d(*low, activation="silu", backend=backend))
    assert torch.equal(out, mixed)
    for grad in torch.autograd.grad(out.sum(), leaves):
        assert grad.dtype == torch.float32


def test_forward_mode_is_right_or_refused() -> None:
    x, tangent, weight = torch.randn(1, 6, 3), torch.randn(1, 6, 3), torch.randn(2, 3, 4)
    expected = torch.func.jvp(lambda value: reference(value, weight, None, BOTH, "silu"), (x,), (tangent,))[1]
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        out = causal_conv1d(dual, weight, activation="silu")
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(out).tangent, expected)


@requires_extension()
@pytest.mark.ext
def test_forward_mode_is_refused_by_the_compiled_backend() -> None:
    x, weight = torch.randn(1, 6, 3), torch.randn(2, 3, 4)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.randn_like(x))
        with pytest.raises(BackendError, match="no forward-mode derivative"):
            causal_conv1d(dual, weight, backend="compiled")


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_agrees_with_eager(dynamic: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(causal_conv1d, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for length in (5, 7):
        args = [torch.randn(shape, requires_grad=True) for shape in ((2, length, 6), (2, 6, 4), (2, 6))]
        for enabled in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                eager, traced = (call(*args, activation="silu") for call in (causal_conv1d, compiled))
            assert torch.equal(traced, eager)
            expected = torch.autograd.grad(eager.sum(), args)
            for grad, want in zip(torch.autograd.grad(traced.sum(), args), expected, strict=True):
                torch.testing.assert_close(grad, want, rtol=1e-5, atol=1e-5)


def test_the_plain_kernels_of_the_dispatcher() -> None:
    """What runs where nothing is compiled, with every choice of gradients."""
    from mmvmamba.ops.causal_conv import operator

    for seed in range(0, 40, 4):
        (x, weight, bias), reverse, activation, grad = sample(seed, torch.float64)
        options = [int(value) for value in reverse], ["none", "silu"].index(activation)
        out = operator._fallback_forward(x, weight, bias, *options)
        every = operator._fallback_backward(grad, x, weight, bias, *options, True, True, True)
        check([x, weight, bias], out, [value for value in every if value.numel()], reverse, activation, grad)
        for needs in itertools.product((False, True), repeat=3):
            some = operator._fallback_backward(grad, x, weight, bias, *options, *needs)
            for needed, found, want in zip(needs, some, every, strict=True):
                assert torch.equal(found, want) if needed else found.numel() == 0


D_ = 6
BAD = {
    "x is a list": ("x", [1.0], "is a list"),
    "x has rank 4": ("x", torch.randn(2, 1, 5, D_), "has 4 dimensions"),
    "x is integer": ("x", torch.ones(2, 5, D_, dtype=torch.int64), "dtype torch.int64"),
    "x is sparse": ("x", torch.randn(2, 5, D_).to_sparse(), "layout torch.sparse_coo"),
    "x is channel-first": ("x", torch.randn(2, D_, 5), "has 5 channels"),
    "weight has rank 2": ("weight", torch.randn(D_, 4), "has 2 dimensions"),
    "weight has other channels": ("weight", torch.randn(2, 7, 4), r"shape \(2, 7, 4\)"),
    "weight has no direction": ("weight", torch.randn(0, D_, 4), r"shape \(0, 6, 4\)"),
    "weight has no taps": ("weight", torch.randn(2, D_, 0), r"shape \(2, 6, 0\)"),
    "weight has another dtype": ("weight", torch.randn(2, D_, 4).bfloat16(), "dtype torch.bfloat16"),
    "weight is on another device": ("weight", torch.randn(2, D_, 4, device="meta"), "is on meta"),
    "bias is a number": ("bias", 1.0, "is a float"),
    "bias is of one direction": ("bias", torch.randn(D_), "has shape|has 1 dimensions"),
    "bias has another dtype": ("bias", torch.randn(2, D_).double(), "dtype torch.float64"),
    "reverse is a bool": ("reverse", True, "is True"),
    "reverse holds numbers": ("reverse", (0, 1), r"is \(0, 1\)"),
    "reverse is too short": ("reverse", (True,), "has 1 entries"),
    "activation is unknown": ("activation", "sillu", "is 'sillu'"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("argument", "value", "found"), BAD.values(), ids=BAD)
def test_bad_input(argument: str, value: object, found: str, backend: str) -> None:
    good = {"x": torch.randn(2, 5, D_), "weight": torch.randn(2, D_, 4), "bias": torch.randn(2, D_)}
    with pytest.raises(OpInputError, match=rf"causal_conv1d: argument '{argument}' .*({found}).*; expected .+\. .+"):
        causal_conv1d(**(good | {argument: value}), backend=backend)


def test_bad_backend_and_keyword() -> None:
    x, weight = torch.randn(1, 4, 3), torch.randn(2, 3, 4)
    with pytest.raises(ConfigError, match="unknown backend 'compild'"):
        causal_conv1d(x, weight, backend="compild")
    with pytest.raises(TypeError, match="activatoin"):
        causal_conv1d(x, weight, activatoin="silu")
    with pytest.raises(OpInputError, match=re.escape("Did you mean 'silu'")):
        causal_conv1d(x, weight, activation="sillu")


@requires_extension()
@pytest.mark.ext
def test_the_raw_operator_checks_what_protects_memory() -> None:
    x, weight = torch.randn(1, 5, 3), torch.randn(2, 3, 4)
    forward, backward = torch.ops.mmvmamba.causal_conv1d, torch.ops.mmvmamba.causal_conv1d_backward
    needs = (True, True, True)
    bad = [
        (forward, (x[0], weight, None, [0, 1], 0)),
        (forward, (x, weight[:, :2], None, [0, 1], 0)),
        (forward, (x, weight[..., :0], None, [0, 1], 0)),
        (forward, (x, weight[:0], None, [], 0)),
        (forward, (x, weight, torch.randn(3), [0, 1], 0)),
        (forward, (x, weight, None, [0], 0)),
        (forward, (x, weight, None, [0, 1], 2)),
        (forward, (x.int(), weight, None, [0, 1], 0)),
        (backward, (torch.randn(1, 4, 2, 3), x, weight, None, [0, 1], 0, *needs)),
        (backward, (torch.randn(1, 5, 3), x, weight, None, [0, 1], 0, *needs)),
    ]
    for operator, arguments in bad:
        with pytest.raises(RuntimeError):
            operator(*arguments)
