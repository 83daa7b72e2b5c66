"""What the benchmark does for a GPU, as far as it shows without one: a device of the tests takes the GPU's place."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable

import pytest
import torch

from benchmarks import contestants, floors, foreign_kernels, ops, table
from benchmarks.accelerator import MOST_SETS, ROTATED_BYTES, repeats_bitwise, rotating, sets_needed
from benchmarks.cases import (
    BACKWARD,
    BOUNDARIES,
    CORE,
    FORWARD,
    GPU_CASES,
    SCAN,
    SEQUENCE,
    Case,
    build_problem,
    choose_cases,
    expect,
    sampled,
    sampled_grad,
)
from benchmarks.contestants import Contestant
from benchmarks.floors import Rates, Work, work
from benchmarks.harness import Notes, Timing, interleave
from mmvmamba.testing import assert_close, requires_extension

H200 = Rates(4.3e12, 132, 1.98e9)
"""The rates the design study computes with."""


class FakeGpu:
    """Times by counting: each call takes one millisecond more than the one before."""

    type = "cpu"

    def __init__(self) -> None:
        self.calls = 0

    def time(self, run: Callable[[], object]) -> float:
        run()
        self.calls += 1
        return 1e-3 * self.calls

    def peak(self, run: Callable[[], object]) -> int:
        run()
        return 3 << 20

    def rates(self) -> Rates:
        return H200

    def facts(self) -> dict[str, object]:
        return {"gpu": "a fake"}


def total(passes: str, boundary: str = SCAN, group: str = "224") -> Work:
    """The work of all blocks of VMamba-T in bfloat16."""
    parts = [(case.blocks, work(case, boundary, passes, torch.bfloat16)) for case in choose_cases([group], "cuda")]
    return Work(*(sum(n * getattr(w, field) for n, w in parts) for field in ("bytes", "special", "instructions")))


def test_operation_counts_are_those_of_the_design_study() -> None:
    """Milliseconds of VMamba-T at 224x224, batch 128, from the table of the study: 0.58, 0.51; backward 0.77, 1.26.

    Its 0.51 is for "about 20" instructions.
    """
    forward, both = total(FORWARD), total(BACKWARD)
    assert forward.special / H200.special * 1e3 == pytest.approx(0.58, abs=0.005)
    assert forward.instructions / H200.issue * 1e3 == pytest.approx(0.51, rel=0.06)
    assert (both.special - forward.special) / H200.special * 1e3 == pytest.approx(0.77, abs=0.01)
    assert (both.instructions - forward.instructions) / H200.issue * 1e3 == pytest.approx(1.26, abs=0.005)


def test_bytes_are_every_tensor_once_for_each_pass() -> None:
    case = Case("c", "c", 2, 3, 5, 32, n=4)
    x, projections, out = 2 * 15 * 32, 2 * 15 * 4 * (2 + 8), 2 * 15 * 32
    parameters, weight, carries = 4 * 32 * (2 + 4 + 2), 4 * 10 * 32, 2 * 4 * 1 * 4 * 32
    forward = 2 * x + 2 * projections + 4 * out + 4 * parameters
    assert work(case, SCAN, FORWARD, torch.float16).bytes == forward
    backward = 2 * (2 * x + 2 * projections + 4 * parameters) + 4 * out + 4 * carries
    assert work(case, SCAN, BACKWARD, torch.float16).bytes == forward + 4 * carries + backward
    project = 2 * x + 2 * projections + 4 * weight
    assert work(case, CORE, FORWARD, torch.float16).bytes == forward + project
    more = 3 * 2 * x + 2 * 2 * projections + 2 * 4 * weight
    assert work(case, CORE, BACKWARD, torch.float16).bytes == forward + project + 4 * carries + backward + more
    sequence = Case("s", "s", 2, 1, 40, 32, n=4, boundaries=(SEQUENCE,))
    streams = 2 * 2 * 40 * 32 + 2 * 2 * 40 * 4
    assert work(sequence, SEQUENCE, FORWARD, torch.float32).bytes == 4 * (streams + 2 * 40 * 32 + 32 * 6)


def test_every_state_costs_a_decay() -> None:
    one, more = (work(Case("c", "c", 1, 2, 3, 8, n=n), SCAN, FORWARD, torch.float32) for n in (1, 16))
    assert (one.special, more.special) == (3 * 4 * 48, 18 * 4 * 48)
    assert (one.instructions, more.instructions) == (20 * 4 * 48, 95 * 4 * 48)


def test_the_floor_is_the_largest_limit() -> None:
    rates = Rates(1e12, 100, 1e9)
    assert Work(10**12, 1, 1).floor(rates) == (1.0, "HBM")
    assert Work(1, 10**12, 10**12).floor(rates) == (10**12 / 1.6e12, "special")
    assert Work(1, 1, 10**13).floor(rates) == (10**13 / 12.8e12, "issue")


def test_floors_are_printed_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert floors.main(["--shapes", "224", "sequence 1K", "--boundary", "scan"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 2 * 5 + 2
    (both,) = (line.split() for line in lines if line.startswith("VMamba-T at 224      forward+backward"))
    assert float(both[5]) == pytest.approx(total(BACKWARD).special / H200.special * 1e3, abs=1e-3)
    assert floors.main(["--shapes", "224", "--boundary", "scan", "--instructions", "40", "104"]) == 0
    (twice,) = (line.split() for line in capsys.readouterr().out.splitlines() if line.split()[:4] == both[:4])
    assert float(twice[6]) == pytest.approx(2 * float(both[6]), abs=2e-3)
    assert floors.main(["--shapes", "nothing"]) == 2
    assert "found 'nothing'" in capsys.readouterr().err


def test_shapes_of_a_gpu_have_its_batches() -> None:
    batches = {case.group: case.b for case in GPU_CASES}
    assert batches == {"224": 128, "512": 16, "800x1216": 2, "1536": 1, "odd": 3, "states": 64, "sequence": 8}
    assert [case.n for case in GPU_CASES if case.group == "states"] == [8, 16, 64]
    assert [case.length for case in GPU_CASES if case.group == "sequence"] == [1024 << k for k in range(7)]
    assert choose_cases(["1536"], "cuda")[0].shape == [1, 384, 384, 96]
    assert choose_cases(None)[0].b == 1


def test_input_sets_exceed_the_cache() -> None:
    assert sets_needed(ROTATED_BYTES * 3) == 2
    assert sets_needed(ROTATED_BYTES // 5) * (ROTATED_BYTES // 5) > ROTATED_BYTES
    assert sets_needed(1) == MOST_SETS
    seen: list[int] = []
    run = rotating([lambda i=i: seen.append(i) for i in range(3)])
    for _ in range(7):
        run()
    assert seen == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_another_input_set_shares_parameters_only(boundary: str) -> None:
    problem = build_problem(
        Case("c", "c", 2, 1 if boundary == SEQUENCE else 2, 3, 16, boundaries=(boundary,)), boundary, torch.float16
    )
    other = problem.another()
    different = {name for name, leaf in problem.leaves.items() if other.leaves[name] is not leaf}
    assert different == {SCAN: {"x", "projections"}, CORE: {"x"}, SEQUENCE: {"u", "delta", "B", "C"}}[boundary]
    for name in different:
        one, two = problem.leaves[name], other.leaves[name]
        assert one.dtype == two.dtype and one.shape == two.shape and not torch.equal(one, two) and two.requires_grad
    assert not torch.equal(problem.grad_out, other.grad_out)
    assert problem.stream_bytes() == sum(
        t.numel() * t.element_size() for t in (*(problem.leaves[n] for n in different), problem.grad_out)
    )


def test_bits_are_compared_not_values() -> None:
    nan, zeros = torch.tensor([float("nan")]), iter([0.0, -0.0])
    assert repeats_bitwise(lambda: {"out": nan.clone()})
    assert not repeats_bitwise(lambda: {"out": torch.tensor([next(zeros)])}, times=2)
    values = iter([1.0] * 9 + [1.0000001])
    assert not repeats_bitwise(lambda: {"out": torch.tensor([next(values)])})
    assert repeats_bitwise(lambda: {"out": torch.ones(3, dtype=torch.bfloat16)})


def test_a_turn_on_a_gpu_is_one_call_and_rounds_are_not_cut_short() -> None:
    order: list[str] = []
    gpu = FakeGpu()
    runs = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    timings = interleave(runs, 0.0, 200, measure=gpu.time, turn_seconds=0.0, least_rounds=30, clock=lambda: gpu.calls)
    assert timings["a"].rounds == timings["b"].rounds == 30
    assert "".join(order) == "ab" * 31  # one for warming up
    assert timings["a"] == Timing.of([1e-3 * n for n in range(1, 60, 2)])


@requires_extension()
@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_the_check_of_a_large_batch_looks_at_its_ends(monkeypatch, boundary: str) -> None:
    shape = (7, 1 if boundary == SEQUENCE else 3, 5, 40)
    problem = build_problem(Case("c", "c", *shape, n=2, boundaries=(boundary,)), boundary, torch.float32)
    assert problem.entries().tolist() == [0, 6]
    (ours,) = (c for c in contestants.contestants() if c.name == "compiled")
    assert ops.check_all([ours], problem, BACKWARD) == [ours]
    assert expect(problem, FORWARD)["out"].shape[0] == 2
    assert sampled_grad(problem).flatten(1).any(1).tolist() == [True, False, False, False, False, False, True]

    def last_wrong(leaves):
        out = ours.forward(leaves)
        factor = torch.ones(7, *[1] * (out.dim() - 1))
        factor[6] = 1.01
        return out * factor

    with pytest.raises(ops.DisagreementError, match="out differs from the reference"):
        ops.check_all([Contestant("wrong", last_wrong, (boundary,))], problem, FORWARD)


@requires_extension()
def test_long_maps_of_a_gpu_are_checked_with_the_compiled_kernels_in_float64(monkeypatch) -> None:
    problem = build_problem(Case("c", "c", 2, 5, 7, 20), SCAN, torch.float32)
    expected = expect(problem, BACKWARD)
    used = []
    monkeypatch.setattr(type(problem), "device", torch.device("cuda"))
    real = ops.expect.__globals__["use_backend"]
    monkeypatch.setitem(ops.expect.__globals__, "use_backend", lambda name: (used.append(name), real(name))[1])
    for name, value in expect(problem, BACKWARD).items():
        assert value.dtype == torch.float64
        assert_close(name, value, expected[name], 1e-11)
    assert used == ["compiled"]


def test_contestants_of_a_gpu_carry_their_reasons(monkeypatch) -> None:
    everyone = {c.name: c for c in contestants.contestants("cuda")}
    assert {"compiled", "reference", "upstream path", "selective_scan_cuda_oflex", "mamba_ssm"} <= set(everyone)
    big = Case("big", "big", 1, 100, 100, 96)
    assert everyone["mamba_ssm"].why_not(big, CORE, FORWARD) == "not installed"
    assert "l is 10000, over the declared limit of 4096" in everyone["reference"].why_not(big, SCAN, FORWARD)
    assert "limit of 1024" in everyone["upstream path"].why_not(Case("c", "c", 1, 40, 40, 96), CORE, BACKWARD)
    assert everyone["reference"].rounds(FORWARD) == 3
    assert everyone["mamba_ssm"].foreign and not everyone["compiled"].foreign


def reference_scan(u, delta, A, B, C, D, delta_bias):
    from mmvmamba.ops import selective_scan

    return selective_scan(u, delta, A, B, C, D, delta_bias, True, out_dtype=torch.float32, backend="reference")


def fake_oflex() -> types.ModuleType:
    """A module with the two functions of VMamba's extension, computed by our reference."""

    def fwd(u, delta, A, B, C, D, delta_bias, softplus, rows, float_out):
        assert (softplus, rows, float_out) == (True, 1, True)
        return reference_scan(u, delta, A, B, C, D, delta_bias), u.new_zeros(1), u.new_zeros(1)

    def bwd(u, delta, A, B, C, D, delta_bias, grad_out, states, softplus, rows):
        leaves = [t.detach().requires_grad_() for t in (u, delta, A, B, C, D, delta_bias)]
        with torch.enable_grad():
            out = reference_scan(*leaves)
        return (*(g.float() for g in torch.autograd.grad(out, leaves, grad_out)), u.new_zeros(1))

    module = types.ModuleType("selective_scan_cuda_oflex")
    module.fwd, module.bwd = fwd, bwd
    return module


@pytest.mark.parametrize("boundary", [CORE, SEQUENCE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_upstream_s_kernel_is_called_as_upstream_does(monkeypatch, boundary: str, dtype: torch.dtype) -> None:
    monkeypatch.setitem(sys.modules, "selective_scan_cuda_oflex", fake_oflex())
    monkeypatch.setattr(contestants, "_installed", lambda name: None)
    (oflex,) = (c for c in contestants.contestants("cuda") if c.name == "selective_scan_cuda_oflex")
    problem = build_problem(
        Case("c", "c", 2, 1 if boundary == SEQUENCE else 3, 7, 20, n=3, boundaries=(boundary,)), boundary, dtype
    )
    assert oflex.why_not(problem.case, boundary, BACKWARD) is None
    assert ops.check_all([oflex], problem, BACKWARD) == [oflex]


def test_mamba_s_kernel_is_called_as_mamba_does(monkeypatch) -> None:
    def selective_scan_fn(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
        assert z is None and delta_softplus is True
        return reference_scan(u, delta, A, B, C, D, delta_bias).to(u.dtype)

    module = types.ModuleType("mamba_ssm.ops.selective_scan_interface")
    module.selective_scan_fn = selective_scan_fn
    monkeypatch.setattr(contestants, "_installed", lambda name: None)
    monkeypatch.setitem(sys.modules, "mamba_ssm", types.ModuleType("mamba_ssm"))
    monkeypatch.setitem(sys.modules, "mamba_ssm.ops", types.ModuleType("mamba_ssm.ops"))
    monkeypatch.setitem(sys.modules, "mamba_ssm.ops.selective_scan_interface", module)
    (path,) = (c for c in contestants.contestants("cuda") if c.name == "mamba_ssm")
    assert path.forward.__closure__[0].cell_contents is foreign_kernels.mamba_ssm
    problem = build_problem(Case("c", "c", 2, 3, 7, 20, n=3), CORE, torch.float16)
    assert ops.check_all([path], problem, BACKWARD) == [path]


@requires_extension()
def test_rows_of_a_gpu(monkeypatch, tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    """All of the run but the device itself, on tensors of the CPU."""

    def wrong(problem):
        return contestants._ours("compiled")(problem) * 1.1

    ours = contestants.contestants("cpu")[0]
    everyone = [
        ours,
        Contestant("reference", contestants._ours("reference"), BOUNDARIES, loop_length={FORWARD: 50, BACKWARD: 50}),
        Contestant("mamba_ssm", wrong, BOUNDARIES, foreign=True),
    ]
    monkeypatch.setattr(ops, "contestants", lambda device: everyone)
    path = tmp_path / "gpu.json"
    options = ops.parse(["--shapes", "smoke", "--seconds", "0.01", "--json", str(path), "--dtype", "bfloat16"])
    ops.run_on_gpu(options, choose_cases(["smoke"], "cuda"), FakeGpu())
    content = json.loads(path.read_text())
    rows = content["rows"]
    assert content["environment"]["gpu"] == "a fake" and content["environment"]["copy_bytes_per_second"] == 4.3e12
    assert {row["contestant"] for row in rows} == {"compiled", "reference"}
    assert any(
        "mamba_ssm: out differs from the reference" in note and note.count("mamba_ssm") == 1
        for note in content["notes"]
    )
    for row in rows:
        assert row["floor"] > 0 and row["floor_share"] == pytest.approx(row["floor"] / row["median"])
        assert row["over_reference"] > 0 and row["over_oflex"] is None
    timed = [row for row in rows if row["shape"]]
    assert all(row["rounds"] >= 30 for row in timed if row["contestant"] == "compiled")
    assert {row["rounds"] for row in timed if row["contestant"] == "reference"} == {3}
    assert all(row["repeats_bitwise"] is True for row in timed if row["contestant"] == "compiled")
    assert all(row["gpu_peak_bytes"] == 3 << 20 and row["input_sets"] >= 2 for row in timed)
    (both,) = (r for r in rows if r["case"] == "VMamba-T scan at smoke" and r["pass"] == BACKWARD
               and r["contestant"] == "compiled")  # fmt: skip
    parts = [r for r in timed if r["boundary"] == SCAN and r["pass"] == BACKWARD and r["contestant"] == "compiled"]
    assert both["floor"] == pytest.approx(2 * parts[0]["floor"] + parts[1]["floor"])
    printed = capsys.readouterr().out
    assert "a fake: copy 4.30 TB/s, 132 multiprocessors at 1.98 GHz: 4.18 T special functions/s, 33.5 T" in printed
    assert "assumed for smoke stage 1, scan, forward, bfloat16:" in printed
    assert table.main([str(path)]) == 0
    assert "share of floor" in capsys.readouterr().out


def test_ours_that_disagrees_ends_the_run_on_a_gpu(monkeypatch) -> None:
    def wrong(problem):
        return contestants._ours("reference")(problem) * 1.1

    problem = build_problem(Case("c", "c", 1, 2, 3, 16), SCAN, torch.float32)
    everyone = [Contestant("compiled", wrong, BOUNDARIES)]
    with pytest.raises(ops.DisagreementError, match="compiled: out differs"):
        ops.time_on_gpu(everyone, problem, FORWARD, 0.01, Notes(), FakeGpu(), H200)


def test_what_is_sampled_comes_to_the_cpu() -> None:
    problem = build_problem(Case("c", "c", 6, 2, 3, 16), SCAN, torch.float16)
    found = sampled(problem, {"x": problem.leaves["x"], "A": problem.leaves["A"]})
    assert torch.equal(found["x"], problem.leaves["x"][[0, 5]]) and torch.equal(found["A"], problem.leaves["A"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_one_line_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert ops.main(["--device", "cuda"]) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and errors.startswith("--device cuda: ") and "expected a GPU" in errors
