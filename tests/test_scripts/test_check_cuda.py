"""The gate of the CUDA kernels: reading machine code, judging counts, and all of it on a toy compiled by nvcc."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import check_cuda
import pytest
import sass

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "tests" / "data" / "sass"
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc on PATH")


def stored(arch: str, kernel: str) -> list[sass.Instruction]:
    functions = sass.parse((DATA / f"toy_{arch}.sass").read_text())
    (code,) = (code for name, code in functions.items() if f"scan2d_{kernel}_kernel" in name)
    return code


def code_of(*lines: str) -> list[sass.Instruction]:
    """Assemble a function from lines, 16 bytes each, as cuobjdump prints them."""
    text = "\n".join(f"        /*{16 * index:04x}*/  {line} ;  /* 0x00 */" for index, line in enumerate(lines))
    return sass.parse("\t\tFunction : f\n" + text)["f"]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_counts_of_the_toy_are_those_of_its_source(arch: str) -> None:
    code = stored(arch, "forward")
    loops = sass.find_loops(code)
    assert [sass.own_exponentials(loop, loops, code) for loop in loops] == [0, 64]  # segments, and tiles inside
    loop, inside = sass.tile_loop(code)
    assert loop == loops[1] and inside == []
    assert loop.body < loops[0].body
    counts = sass.count(code, loop, inside, ())
    assert (counts["MUFU.EX2"], counts["FFMA"]) == (64, 32)
    named = {name: sass.total(counts, name) for name in ("BAR", "LDG", "STG", "STS", "MUFU", "BRA", "LDL", "STL")}
    assert named == {"BAR": 2, "LDG": 1, "STG": 2, "STS": 1, "MUFU": 64, "BRA": 1, "LDL": 0, "STL": 0}
    assert sass.total(counts) == len(loop.body)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_a_loop_that_spills_shows_its_local_memory(arch: str) -> None:
    """For sm_80 the loop ends with a call that is a mere branch, which must not hide it."""
    code = stored(arch, "backward")
    loop, inside = sass.tile_loop(code)
    counts = sass.count(code, loop, inside, ())
    assert (counts["MUFU.EX2"], counts["FMUL"]) == (64, 64)
    assert sass.total(counts, "LDL", "STL") > 100
    found = check_cuda.local_memory_problems(arch, {"f": code}, {"f": "scan2d_backward_kernel<x>"})
    assert len(found) == 1 and "LDL or STL instructions, expected none" in found[0]
    assert len(check_cuda.local_memory_problems(arch, {"f": code}, {"f": "scan2d_aggregate_kernel<x>"})) == 1
    assert check_cuda.local_memory_problems(arch, {"f": code}, {"f": "another_kernel<x>"}) == []


def test_operands_and_guards_are_read() -> None:
    code = code_of("@!P0 BRA 0x30", "MUFU.EX2 R2, R3", "BRA.U !UP0, 0x0", "BSSY B0, 0x20", "EXIT")
    assert [one.target for one in code] == [0x30, None, 0x0, 0x20, None]
    assert [one.conditional for one in code[:3:2]] == [True, True]
    assert [one.name for one in code] == ["BRA", "MUFU", "BRA", "BSSY", "EXIT"]


def test_a_detour_behind_the_kernel_is_no_loop() -> None:
    code = code_of(
        "MOV R1, R2",
        "MUFU.EX2 R2, R3",  # 0x10: header
        "BRA.DIV UR4, 0x60",
        "SHFL.IDX PT, R1, R2, R3, R4",
        "@P0 BRA 0x10",
        "EXIT",
        "WARPSYNC 0xff",  # 0x60: taken where lanes came apart
        "BRA 0x40",
    )
    (loop,) = sass.find_loops(code)
    assert sorted(loop.body) == [0x10, 0x20, 0x30, 0x40]


def test_a_call_for_lanes_that_came_apart_is_passed_over() -> None:
    code = code_of(
        "MUFU.EX2 R2, R3",
        "BRA.CONV ~URZ, 0x40",
        "MOV R16, 0x40",
        "CALL.REL.NOINC 0x80",
        "@P0 CALL.REL.NOINC 0x60",  # 0x40: a mere branch out of the loop
        "BRA 0x0",
        "FADD R1, R2, R3",
        "EXIT",
        "WARPSYNC R17",  # 0x80
        "RET.REL.NODEC R16 0x0",
    )
    assert sass.subroutine_calls(code) == {0x30}
    (loop,) = sass.find_loops(code)
    assert sorted(loop.body) == [0x0, 0x10, 0x40, 0x50]


def test_a_block_behind_the_kernel_that_comes_back_is_part_of_its_loop() -> None:
    code = code_of("MUFU.EX2 R2, R3", "@P1 BRA 0x40", "@P0 BRA 0x0", "EXIT", "FADD R1, R2, R3", "BRA 0x20")
    (loop,) = sass.find_loops(code)
    assert sorted(loop.body) == [0x0, 0x10, 0x20, 0x40, 0x50]


def test_lanes_meet_where_the_barrier_says() -> None:
    """Without the jump from BSYNC to its BSSY's target this loop would lose its end."""
    code = code_of(
        "BSSY B1, 0x50", "@P1 BRA 0x30", "FADD R1, R2, R3", "BSYNC B1", "EXIT", "MUFU.EX2 R2, R3", "@P0 BRA 0x0", "EXIT"
    )
    (loop,) = sass.find_loops(code)
    assert sorted(loop.body) == [0x0, 0x10, 0x20, 0x30, 0x50, 0x60]


def test_loops_inside_count_as_often_as_declared() -> None:
    code = code_of(
        "MOV R1, R2",
        "MUFU.EX2 R2, R3",  # 0x10: tile loop
        "FFMA R1, R2, R3, R4",  # 0x20: loop inside
        "@P1 BRA 0x20",
        "FADD R1, R2, R3",  # 0x40: another, with a third inside
        "HMMA.1688.F32.TF32 R4, R12, R22, R4",  # 0x50
        "@P2 BRA 0x50",
        "@P2 BRA 0x40",
        "@P0 BRA 0x10",
        "EXIT",
    )
    loop, inside = sass.tile_loop(code)
    assert [inner.header for inner in inside] == [0x20, 0x40, 0x50]
    six, half = sass.InnerLoop("six", ("FFMA",), 6.0), sass.InnerLoop("half", ("FADD",), 0.5, within=("HMMA",))
    two, never = sass.InnerLoop("two", ("HMMA",), 2.0), sass.InnerLoop("never", ("FADD",), 99.0, without=("HMMA",))
    with pytest.raises(sass.SassError, match=r"not declared \(at 0x40, 4 instructions: 2 BRA, 1 FADD, 1 HMMA\)"):
        sass.turns_of(inside, code, [never, six, two])
    turns = sass.turns_of(inside, code, [never, six, half, two])
    assert turns == [6.0, 0.5, 2.0]
    assert sass.count(code, loop, inside, turns) == {
        "MUFU.EX2": 1, "FFMA": 6, "FADD": 0.5, "HMMA.1688.F32.TF32": 1.0, "BRA": 6 + 1 + 0.5 + 1,
    }  # fmt: skip


def test_the_plain_sum_counts_every_loop_inside_once(monkeypatch) -> None:
    code = code_of(
        "MOV R1, R2", *["MUFU.EX2 R2, R3"] * 32, "FFMA R1, R2, R3, R4", "@P1 BRA 0x210", "@P0 BRA 0x10", "EXIT"
    )
    six = sass.InnerLoop("six", ("FFMA",), 6.0)
    monkeypatch.setitem(check_cuda.KERNELS, "forward", check_cuda.Kernel("x", 2, {}, (six,)))
    found = check_cuda.count_tile_loop("forward", "sm_90", code)
    assert (found.per_element, found.once) == ((32 + 2 * 6 + 1) / 32, (32 + 2 + 1) / 32)
    resources = {("sm_90", "forward"): check_cuda.Resources("f", "sm_90", 99, 0, 0, 0)}
    head, row = check_cuda.count_table([found], resources, {}).splitlines()
    assert dict(zip(head.replace("per el-dir", "per").split(), row.split(), strict=True))["once"] == "1.09"
    names = {"f": "void mmvmamba::scan2d_forward_kernel<mmvmamba::BFloat16, 1, true, 1>(mmvmamba::ScanArgs)"}
    assert check_cuda.count_unjudged("sm_90", {"f": code, "g": code}, names) == [
        "forward one channel per lane on sm_90: 35 instructions, 2.19 per element-direction, each of the 1 loops "
        "inside counted once"
    ]


def test_files_of_one_name_have_objects_of_their_own(tmp_path: Path, monkeypatch) -> None:
    targets: list[Path] = []
    monkeypatch.setattr(check_cuda, "compiler_flags", lambda *_: [])
    monkeypatch.setattr(check_cuda, "compile_one", lambda nvcc, flags, source, target: targets.append(target) or PTXAS)
    sources = [tmp_path / "src" / place for place in ("scan.cu", "forward/scan.cu")]
    everything, objects, _ = check_cuda.compile_all(sources, tmp_path / "src", tmp_path, tmp_path / "out")
    assert sorted(targets) == sorted(objects.values()) == [tmp_path / "out/forward/scan.o", tmp_path / "out/scan.o"]
    assert len(everything) == 4


def test_code_without_exponentials_has_no_tile_loop() -> None:
    with pytest.raises(sass.SassError, match="found no loop with MUFU.EX2 among 1 loops"):
        sass.tile_loop(code_of("FADD R1, R2, R3", "@P0 BRA 0x0", "MUFU.EX2 R2, R3", "EXIT"))
    assert sass.find_loops([]) == []


def test_a_loop_that_hides_work_is_refused() -> None:
    tile = ["MUFU.EX2 R2, R3"] * 32
    with pytest.raises(check_cuda.CheckError, match="has 8 of them, expected at least one for each of the 32"):
        check_cuda.count_tile_loop("forward", "sm_90", code_of(*tile[:8], "@P0 BRA 0x0", "EXIT"))
    code = code_of(*tile, "CALL.REL.NOINC 0x240", "@P0 BRA 0x0", "EXIT", "NOP", "RET.REL.NODEC R2")
    with pytest.raises(check_cuda.CheckError, match="the tile loop has 1 calls"):
        check_cuda.count_tile_loop("forward", "sm_90", code)
    found = check_cuda.count_tile_loop("forward", "sm_90", code_of(*tile, "@P0 BRA 0x0", "EXIT"))
    assert found.per_element == pytest.approx(33 / 32)


PTXAS = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1fv' for 'sm_80'
ptxas info    : Function properties for _Z1fv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 143 registers, used 1 barriers, 372 bytes cmem[0]
ptxas info    : Compiling entry function '_Z1gv' for 'sm_90'
ptxas info    : Function properties for _Z1gv
    0 bytes stack frame, 24 bytes spill stores, 32 bytes spill loads
ptxas info    : Used 32 registers, used 0 barriers, 272 bytes cumulative stack size
"""


def test_the_report_of_ptxas_is_read() -> None:
    f, g = check_cuda.parse_ptxas(PTXAS)
    assert f == check_cuda.Resources("_Z1fv", "sm_80", 143, 0, 0, 0) and f.local == 0
    assert g == check_cuda.Resources("_Z1gv", "sm_90", 32, 272, 24, 32)
    hot = check_cuda.resource_problems(
        [f, g], {"_Z1fv": "void scan2d_forward_kernel<a>()", "_Z1gv": "scan2d_backward_kernel<b>"}
    )
    assert len(hot) == 1 and "scan2d_backward_kernel<b> on sm_90: 272 bytes stack frame, 24 bytes spill" in hot[0]
    assert len(check_cuda.resource_problems([g], {"_Z1gv": "void scan2d_aggregate_kernel<a>()"})) == 1
    assert check_cuda.resource_problems([g], {"_Z1gv": "a_kernel"}) == []
    with pytest.raises(check_cuda.CheckError, match="in a form that is not known"):
        check_cuda.parse_ptxas("ptxas info : Compiling entry function '_Z1fv' for 'sm_80'\nsomething else\n")


def counted(per_element: float, kernel: str = "forward", arch: str = "sm_90") -> check_cuda.Count:
    return check_cuda.Count(kernel, arch, {}, per_element)


def test_counts_are_held_to_limit_and_record() -> None:
    record = {"sm_90": {"forward": 20.0, "backward": 59.0}}
    assert check_cuda.count_problems([counted(22.9), counted(60.0, "backward")], record) == []
    (grown,) = check_cuda.count_problems([counted(23.1)], record)
    assert "23.10 instructions per element-direction, 16% over the 20.00" in grown
    (over,) = check_cuda.count_problems([counted(60.1, "backward")], record)
    assert "over the limit of 60" in over
    (missing,) = check_cuda.count_problems([counted(20.0, arch="sm_80")], record)
    assert "found no record" in missing


def test_record_comes_back_as_written(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    assert check_cuda.read_record(path) == {}
    check_cuda.write_record(path, [counted(20.125), counted(50.0, "backward"), counted(21.0, arch="sm_80")], "13.0")
    assert check_cuda.read_record(path) == {"sm_90": {"forward": 20.125, "backward": 50.0}, "sm_80": {"forward": 21.0}}
    assert json.loads(path.read_text())["nvcc"] == "13.0"


def run(tmp_path: Path, source: str, *arguments: str) -> int:
    folder = tmp_path / "sources" / "inner"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "toy.cu").write_text(source)
    places = ["--sources", str(folder.parent), "--output", str(tmp_path / "out"), "--record", str(tmp_path / "r.json")]
    return check_cuda.main(["--require-nvcc", *places, *arguments])


@needs_nvcc
def test_the_whole_check_on_a_toy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = (DATA / "toy.cu").read_text()
    assert run(tmp_path, good) == 1
    assert capsys.readouterr().err.count("found no record") == 4  # two kernels on two archs
    assert run(tmp_path, good, "--update") == 0
    assert run(tmp_path, good) == 0
    shown = capsys.readouterr().out
    assert "compiled 1 CUDA files for sm_80 and sm_90 in" in shown and "0 with local memory" in shown
    longer = good.replace("exp2_approx(stage[t * V + v])", "exp2_approx(exp2_approx(stage[t * V + v]))")
    assert longer != good and run(tmp_path, longer) == 1
    assert "forward on sm_90" in capsys.readouterr().err


@needs_nvcc
def test_a_kernel_that_spills_fails_and_is_not_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "#define TOY_SPILL\n" + (DATA / "toy.cu").read_text(), "--update") == 1
    errors = capsys.readouterr().err
    assert "scan2d_backward_kernel<mmvmamba::bfloat16, 2, true, 1>" in errors and "bytes spill stores" in errors
    assert not (tmp_path / "r.json").exists()


@needs_nvcc
def test_what_does_not_compile_or_is_not_there_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "this is no C++\n") == 1
    assert "toy.cu does not compile" in capsys.readouterr().err
    assert run(tmp_path, "int host() { return 1; }\n") == 1
    assert "found 0 kernels named" in capsys.readouterr().err
    empty = tmp_path / "empty"
    empty.mkdir()
    assert check_cuda.main(["--sources", str(empty)]) == 1
    assert "found no .cu file under" in capsys.readouterr().err


def test_without_nvcc_the_check_says_so(monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    assert check_cuda.main([]) == 0
    assert check_cuda.main(["--require-nvcc"]) == 1
    line = "check_cuda: there is no nvcc on PATH and no CUDA_HOME, so nothing was checked\n"
    assert capsys.readouterr().err == 2 * line
