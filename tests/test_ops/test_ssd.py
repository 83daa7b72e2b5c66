"""State space duality: closed forms, the recurrence, strong decays, memory layouts, gradients, bad arguments.

Random configurations, guard bands, threads and the like are in the tests of all operators (`tests.test_ops.samples`).
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mmvmamba.envs import triton_interpreted
from mmvmamba.errors import BackendError, ConfigError, OpInputError
from mmvmamba.ops import flops, ssd, ssd_non_causal, ssd_read, ssd_state
from mmvmamba.ops.extension import HAS_EXTENSION
from mmvmamba.ops.ssd.reference import ssd_chunked_reference, ssd_recurrence
from mmvmamba.testing import assert_close, requires_extension
from tests.test_ops.samples import ssd_non_causal_sample, ssd_sample
from tests.test_ops.test_exact import BACKENDS

HEAD_GROUPS = ("interleaved", "blocked")
LENGTHS = (1, 5, 63, 64, 65, 200)


def double(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).requires_grad_()


def causal_inputs(b=2, length=5, k=4, p=3, g=2, n=2, make=double) -> dict[str, Tensor]:
    return {
        "x": make(b, length, k, p),
        "dt": make(b, length, k),
        "decay": (-torch.rand(k, dtype=make(1).dtype)).requires_grad_(),
        "b_in": make(b, length, g, n),
        "c_out": make(b, length, g, n),
        "skip": make(k),
        "dt_bias": make(k),
        "initial_state": make(b, k, n, p),
    }


def non_causal_inputs(b=2, length=5, k=4, p=3, g=2, n=2, make=double) -> dict[str, Tensor]:
    given = causal_inputs(b, length, k, p, g, n, make)
    return {"x": given["x"], "weight": given["dt"]} | {name: given[name] for name in ("b_in", "c_out", "skip")}


def group_of(head_groups: str, k: int, g: int) -> list[int]:
    return [j // (k // g) if head_groups == "blocked" else j % g for j in range(k)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("head_groups", HEAD_GROUPS)
@pytest.mark.parametrize(("k", "g"), [(1, 1), (4, 1), (4, 2), (6, 3), (4, 4)])
def test_non_causal_in_the_words_of_the_definition(backend: str, head_groups: str, k: int, g: int) -> None:
    x, weight, B, C, skip = non_causal_inputs(length=7, k=k, g=g, n=5).values()
    chosen = group_of(head_groups, k, g)
    state = torch.einsum("blkn,blk,blkp->bknp", B[:, :, chosen], weight, x)
    out = torch.einsum("blkn,bknp->blkp", C[:, :, chosen], state)
    options = {"head_groups": head_groups, "backend": backend}
    assert_close("state", ssd_state(x, weight, B, **options), state, 1e-13)
    assert_close("read", ssd_read(state, C, **options), out, 1e-13)
    assert_close("out", ssd_non_causal(x, weight, B, C, skip, **options), out + skip[:, None] * x, 1e-13)
    ones = torch.ones_like(weight)
    assert torch.equal(ssd_state(x, None, B, **options), ssd_state(x, ones, B, **options))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("head_groups", HEAD_GROUPS)
@pytest.mark.parametrize("length", LENGTHS)
def test_causal_is_the_recurrence(backend: str, head_groups: str, length: int) -> None:
    given = causal_inputs(length=length, k=6, g=3, p=5, n=4)
    blocked = head_groups == "blocked"
    expected = ssd_recurrence(**given, dt_softplus=True, blocked=blocked)
    weights = [torch.randn_like(value) for value in expected]
    wanted = torch.autograd.grad(expected, list(given.values()), weights)
    found = ssd(**given, dt_softplus=True, return_last_state=True, head_groups=head_groups, backend=backend)
    for name, value, want in zip(("out", "last state"), found, expected, strict=True):
        assert_close(name, value, want, 1e-12)
    for name, grad, want in zip(given, torch.autograd.grad(found, list(given.values()), weights), wanted, strict=True):
        assert_close(f"gradient of {name}", grad, want, 1e-11)


@pytest.mark.parametrize("chunk", [1, 2, 7, 64, 1000])
def test_the_size_of_a_chunk_changes_rounding_alone(chunk: int) -> None:
    given = causal_inputs(length=30)
    expected = ssd(**given, dt_softplus=True, backend="reference")
    assert_close("out", ssd(**given, dt_softplus=True, chunk_size=chunk, backend="reference"), expected, 1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sequence_may_be_cut_anywhere(backend: str) -> None:
    """The last state of a part is the first of the next."""
    given = {name: value.detach() for name, value in causal_inputs(length=150).items()}
    whole, last = ssd(**given, dt_softplus=True, return_last_state=True, backend=backend)
    state, parts = given["initial_state"], []
    for cut in (slice(0, 64), slice(64, 101), slice(101, 150)):
        part = {name: given[name][:, cut] for name in ("x", "dt", "b_in", "c_out")}
        out, state = ssd(**given | part | {"initial_state": state}, dt_softplus=True, return_last_state=True,
                         backend=backend)  # fmt: skip
        parts.append(out)
    assert_close("out", torch.cat(parts, 1), whole, 1e-12)
    assert_close("state", state, last, 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_weak_decays_behind_a_strong_one_keep_their_precision(backend: str) -> None:
    """Differences of sums of logarithms would be off by 1e-3 here; float32 against float64."""
    torch.manual_seed(0)
    given = {name: value.detach() for name, value in causal_inputs(length=128, k=2, g=1, p=8, n=8).items()}
    given["dt"] = torch.rand_like(given["dt"]) * 0.01
    given["dt"][:, ::20] = 5000.0
    given["x"][:, ::20] *= 1e-3
    given["decay"] = -torch.ones_like(given["decay"])
    del given["dt_bias"], given["initial_state"]
    low = {name: value.float() for name, value in given.items()}
    exact = {name: value.double().requires_grad_() for name, value in low.items()}
    leaves = {name: value.requires_grad_() for name, value in low.items()}
    expected, out = ssd(**exact, backend="reference"), ssd(**leaves, backend=backend)
    assert_close("out", out, expected, 2e-6)
    weights = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, list(exact.values()), weights)
    for name, grad, want in zip(low, torch.autograd.grad(out, list(leaves.values()), weights.float()), wanted,
                                strict=True):  # fmt: skip
        assert_close(f"gradient of {name}", grad, want, 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_causality_is_bitwise(backend: str) -> None:
    for seed in range(20):
        sample = ssd_sample(seed)
        given = {name: None if v is None else v.contiguous() for name, v in sample.tensors.items()}
        length = given["x"].shape[1]
        t = (7 * seed + 3) % length
        changed = dict(given)
        for name in sample.streams:
            changed[name] = given[name].clone()
            changed[name][:, t:] += 1
        before, after = sample.run(backend, given), sample.run(backend, changed)
        # PyTorch's products may take another path for what comes at other places; ours do not.
        assert_close("before", after[:, :t], before[:, :t], 0.0 if backend == "compiled" else 1e-2)
        assert not torch.equal(before[:, t:], after[:, t:])


@requires_extension()
@pytest.mark.ext
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_parts_of_a_projection_are_read_in_place(dtype: torch.dtype) -> None:
    """The values of contiguous copies in every bit, for slices of one wide map as a layer has them."""
    b, length, k, p, n = 2, 70, 2, 24, 9
    wide = torch.randn(b, length, k * p + 2 * n + k).to(dtype)
    x, B, C, dt = wide.split([k * p, n, n, k], -1)
    x, B, C = x.unflatten(-1, (k, p)), B.unsqueeze(2), C.unsqueeze(2)
    copies = [value.contiguous() for value in (x, dt, B, C)]
    decay = -torch.rand(k)
    assert torch.equal(ssd_non_causal(x, dt, B, C), ssd_non_causal(*copies))
    assert torch.equal(ssd(x, dt, decay, B, C, dt_softplus=True),
                       ssd(*copies[:2], decay, *copies[2:], dt_softplus=True))  # fmt: skip


EMPTY = {"batch": (0, 4, 2, 3), "length": (2, 0, 2, 3), "channels": (2, 4, 2, 0)}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", EMPTY.values(), ids=EMPTY)
def test_nothing(backend: str, shape: tuple[int, int, int, int]) -> None:
    b, length, k, p = shape
    given = causal_inputs(b, length, k, p, 1, 3)
    out, state = ssd(**given, return_last_state=True, backend=backend)
    assert out.shape == shape
    assert torch.equal(state, given["initial_state"]) or length > 0
    for grad, leaf in zip(torch.autograd.grad(out.sum() + state.sum(), list(given.values())), given.values(),
                          strict=True):  # fmt: skip
        assert grad.shape == leaf.shape
    given = non_causal_inputs(b, length, k, p, 1, 3)
    out = ssd_non_causal(**given, backend=backend)
    assert out.shape == shape
    for grad, leaf in zip(torch.autograd.grad(out.sum(), list(given.values())), given.values(), strict=True):
        assert grad.shape == leaf.shape
        assert not grad.any()
    state = ssd_state(given["x"], None, given["b_in"], backend=backend)
    assert state.shape == (b, k, 3, p)
    assert not state.any()


OPTIONS = list(itertools.product((False, True), repeat=3))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("skip", "weighted", "blocked"), OPTIONS)
def test_gradcheck_non_causal(backend: str, skip: bool, weighted: bool, blocked: bool) -> None:
    given = non_causal_inputs()
    given = given | ({} if skip else {"skip": None}) | ({} if weighted else {"weight": None})
    names = [name for name, value in given.items() if value is not None]
    options = {"head_groups": HEAD_GROUPS[blocked], "backend": backend}

    def call(*values: Tensor) -> Tensor:
        return ssd_non_causal(**given | dict(zip(names, values, strict=True)), **options)

    assert torch.autograd.gradcheck(call, [given[name] for name in names], nondet_tol=0.0)
    halves = [given["x"], given["b_in"]], [double(2, 4, 2, 3), given["c_out"]]
    assert torch.autograd.gradcheck(lambda x, B: ssd_state(x, given["weight"], B, **options), halves[0])
    assert torch.autograd.gradcheck(lambda state, C: ssd_read(state, C, **options), halves[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("optional", "softplus", "blocked"), OPTIONS)
def test_gradcheck_causal(backend: str, optional: bool, softplus: bool, blocked: bool) -> None:
    given = causal_inputs()
    if not optional:
        given |= dict.fromkeys(("skip", "dt_bias", "initial_state"))
    names = [name for name, value in given.items() if value is not None]

    def call(*values: Tensor) -> tuple[Tensor, Tensor]:
        out = ssd(**given | dict(zip(names, values, strict=True)), dt_softplus=softplus, return_last_state=True,
                  head_groups=HEAD_GROUPS[blocked], backend=backend)  # fmt: skip
        return out[0], out[1]

    assert torch.autograd.gradcheck(call, [given[name] for name in names], nondet_tol=0.0)


def test_second_derivatives() -> None:
    given = causal_inputs(b=1, length=3, k=2, p=1, g=1, n=1)
    reference = {"dt_softplus": True, "backend": "reference"}
    assert torch.autograd.gradgradcheck(
        lambda *v: ssd(**dict(zip(given, v, strict=True)), **reference), list(given.values())
    )
    if HAS_EXTENSION:
        (grad,) = torch.autograd.grad(ssd(**given, backend="compiled").square().sum(), given["x"], create_graph=True)
        with pytest.raises(BackendError, match="backend='reference'"):
            grad.sum().backward()


def raw_arguments(index: int) -> tuple[str, list, list]:
    """Arguments of an operator of the dispatcher: name, tensors, the rest."""
    name = ("ssd_state", "ssd_read", "ssd_non_causal", "ssd")[index % 4]
    sample = (ssd_sample if name == "ssd" else ssd_non_causal_sample)(index)
    tensors, blocked = list(sample.tensors.values()), sample.options["head_groups"] == "blocked"
    out_dtype = sample.options["out_dtype"] or sample.dtype
    if name == "ssd_state":
        return name, tensors[:3], [blocked]
    if name == "ssd_read":
        return name, [ssd_state(*tensors[:3]), tensors[3]], [blocked, out_dtype]
    if name == "ssd":
        return name, tensors, [sample.options["dt_softplus"], blocked, out_dtype]
    return name, tensors, [blocked, out_dtype]


@pytest.mark.parametrize("index", range(12))
def test_opcheck(index: int) -> None:
    name, tensors, options = raw_arguments(index)
    operators = torch.ops.mmvmamba
    leaves = [None if value is None else value.detach().requires_grad_() for value in tensors]
    save = [True] if name == "ssd" else []
    torch.library.opcheck(getattr(operators, name).default, (*leaves, *options, *save))
    outputs = getattr(operators, name)(*tensors, *options, *save)
    first = outputs[0] if isinstance(outputs, tuple) else outputs
    grads = [torch.randn_like(first)] + ([torch.randn_like(outputs[1])] if name == "ssd" else [])
    saved = [outputs[-1]] if isinstance(outputs, tuple) else []
    without_dtype = options if name == "ssd_state" else options[:-1]
    torch.library.opcheck(getattr(operators, f"{name}_backward").default, (*grads, *tensors, *without_dtype, *saved))


class Mixer(torch.nn.Module):
    """Both forms, for traces."""

    def forward(self, x: Tensor, dt: Tensor, decay: Tensor, B: Tensor, C: Tensor) -> Tensor:
        return ssd(x, dt, decay, B, C, dt_softplus=True) + ssd_non_causal(x, dt, B, C)


def mixer_inputs(length: int) -> list[Tensor]:
    given = causal_inputs(length=length, make=lambda *shape: torch.randn(shape).requires_grad_())
    return [given[name] for name in ("x", "dt", "decay", "b_in", "c_out")]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_agrees_with_eager(dynamic: bool) -> None:
    torch._dynamo.reset()
    traced = torch.compile(Mixer(), fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for length in (70, 9):
        args = mixer_inputs(length)
        eager, out = Mixer()(*args), traced(*args)
        torch.testing.assert_close(out, eager, rtol=1e-5, atol=1e-5)
        expected = torch.autograd.grad(eager.square().sum(), args)
        for grad, want in zip(torch.autograd.grad(out.square().sum(), args), expected, strict=True):
            torch.testing.assert_close(grad, want, rtol=1e-4, atol=1e-4)


@requires_extension()
@pytest.mark.ext
def test_export_keeps_the_operators_as_nodes() -> None:
    args = tuple(value.detach() for value in mixer_inputs(9))
    program = torch.export.export(Mixer(), args)
    nodes = [node.target for node in program.graph.nodes if node.op == "call_function"]
    operators = torch.ops.mmvmamba
    assert nodes.count(operators.ssd.default) == nodes.count(operators.ssd_non_causal.default) == 1
    torch.testing.assert_close(program.module()(*args), Mixer()(*args), rtol=0, atol=0)


def test_meta_tensors_have_shapes() -> None:
    args = [value.detach().to("meta") for value in mixer_inputs(9)]
    assert Mixer()(*args).shape == args[0].shape


def test_flops() -> None:
    b, length, k, p, g, n = 2, 100, 4, 3, 2, 5
    given = non_causal_inputs(b, length, k, p, g, n, lambda *shape: torch.randn(shape))
    arguments = (*(tuple(value.shape) for value in given.values()), True, torch.float32)
    products = 2 * b * length * k * p * n
    assert flops.ssd_non_causal_flops(*arguments) == 2 * products + 3 * b * length * k * p
    with FlopCounterMode(display=False) as mode:
        ssd_read(ssd_state(given["x"], given["weight"], given["b_in"]), given["c_out"])
    # The compiled operators count the weight too; PyTorch's counter knows products alone.
    assert mode.get_total_flops() in (2 * products, 2 * products + b * length * k * p)


BAD = {
    "x has rank 3": ("x", torch.randn(2, 5, 4), "has 3 dimensions"),
    "x is a list": ("x", [1.0], "is a list"),
    "x is integer": ("x", torch.ones(2, 5, 4, 3, dtype=torch.int32), "dtype torch.int32"),
    "b_in has 3 groups": ("b_in", torch.randn(2, 5, 3, 2), "has 3 groups"),
    "b_in has no group": ("b_in", torch.randn(2, 5, 0, 2), "has 0 groups"),
    "b_in has no states": ("b_in", torch.randn(2, 5, 2, 0), "has shape"),
    "b_in has another length": ("b_in", torch.randn(2, 6, 2, 2), r"shape \(2, 6, 2, 2\)"),
    "c_out has other states": ("c_out", torch.randn(2, 5, 2, 3), r"shape \(2, 5, 2, 3\)"),
    "skip has another length": ("skip", torch.randn(3), r"shape \(3,\)"),
    "skip is half": ("skip", torch.randn(4).half(), "dtype torch.float16"),
    "head_groups is unknown": ("head_groups", "block", "is 'block'"),
    "out_dtype is integer": ("out_dtype", torch.int32, "torch.int32"),
}
BAD_CAUSAL = BAD | {
    "dt has another length": ("dt", torch.rand(2, 4, 4), r"shape \(2, 4, 4\)"),
    "decay has rank 2": ("decay", torch.rand(4, 1), r"shape \(4, 1\)"),
    "decay is bfloat16": ("decay", torch.rand(4).bfloat16(), "dtype torch.bfloat16"),
    "dt_bias is double": ("dt_bias", torch.rand(4).double(), "dtype torch.float64"),
    "initial_state is turned": ("initial_state", torch.randn(2, 4, 3, 2), r"shape \(2, 4, 3, 2\)"),
    "dt_softplus is a number": ("dt_softplus", 1, "is 1"),
    "chunk_size is zero": ("chunk_size", 0, "is 0"),
    "chunk_size is a bool": ("chunk_size", True, "is True"),
}
BAD_NON_CAUSAL = BAD | {
    "weight has rank 4": ("weight", torch.rand(2, 5, 4, 1), r"shape \(2, 5, 4, 1\)"),
    "weight is double": ("weight", torch.rand(2, 5, 4).double(), "dtype torch.float64"),
}


@pytest.mark.parametrize(("argument", "value", "found"), BAD_CAUSAL.values(), ids=BAD_CAUSAL)
def test_bad_arguments_of_the_causal_form(argument: str, value: object, found: str) -> None:
    given = causal_inputs(make=lambda *shape: torch.randn(shape)) | {argument: value}
    with pytest.raises(OpInputError, match=rf"ssd: argument '{argument}' .*{found}.*; expected .+\. .+"):
        ssd(**given)


@pytest.mark.parametrize(("argument", "value", "found"), BAD_NON_CAUSAL.values(), ids=BAD_NON_CAUSAL)
def test_bad_arguments_of_the_non_causal_form(argument: str, value: object, found: str) -> None:
    given = non_causal_inputs(make=lambda *shape: torch.randn(shape)) | {argument: value}
    with pytest.raises(OpInputError, match=rf"ssd_non_causal: argument '{argument}' .*{found}.*; expected .+\. .+"):
        ssd_non_causal(**given)


def test_bad_arguments_of_the_halves() -> None:
    x, state = torch.randn(2, 5, 4, 3), torch.randn(2, 4, 2, 3)
    with pytest.raises(OpInputError, match="ssd_state: argument 'weight'"):
        ssd_state(x, torch.rand(2, 5), torch.randn(2, 5, 1, 2))
    with pytest.raises(OpInputError, match="ssd_read: argument 'c_out' has shape"):
        ssd_read(state, torch.randn(2, 5, 1, 3))
    with pytest.raises(ConfigError, match="unknown backend 'cuda'"):
        ssd_read(state, torch.randn(2, 5, 1, 2), backend="cuda")
    if not triton_interpreted():
        with pytest.raises(BackendError, match="TRITON_INTERPRET=1"):
            ssd_read(state, torch.randn(2, 5, 1, 2), backend="triton")


def test_the_chunks_of_the_reference_are_the_recurrence_in_float32() -> None:
    given = {name: value.detach().float() for name, value in causal_inputs(length=100).items()}
    exact = ssd_recurrence(**{name: value.double() for name, value in given.items()}, dt_softplus=True, blocked=False)
    found = ssd_chunked_reference(**given, dt_softplus=True, blocked=False)
    for value, want in zip(found, exact, strict=True):
        assert_close("value", value, want, 2e-6)
