"""Compile the CUDA kernels without a GPU and judge their machine code: ``python scripts/check_cuda.py --require-nvcc``.

Every ``csrc/cuda/**/*.cu`` is compiled for sm_80 and sm_90 with the flags of setup.py. Fails if

* a file does not compile;
* a scan2d kernel, forward, backward or aggregate, of any type or variant spills registers, has a stack frame or
  touches local memory;
* the tile loop of the two kernels in `KERNELS` (bfloat16, the variant that runs at the model's figures) has more
  instructions per element-direction than its limit, or 15 % more than ``scripts/cuda_record.json`` says.

``--update`` writes that record; do it in the commit that changes a kernel, and say why. The disassembler is the
cuobjdump of the toolkit or, where the toolkit has none, the one in Triton's wheel.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import importlib.util
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import sass

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "scripts" / "cuda_record.json"
ARCHS = ("sm_80", "sm_90")
JOBS = 2
GROWTH = 0.15
"""An instruction count may exceed the record by this share."""
HOT = re.compile(r"\bscan2d_(forward|backward|aggregate)_kernel\b")
POSITIONS = 16
"""Positions of one turn of a tile loop."""


class CheckError(RuntimeError):
    """The check cannot be done, or found something wrong."""


@dataclass(frozen=True)
class Kernel:
    """A kernel whose instructions are counted.

    Attributes:
        pattern: Its demangled name.
        channels: Channels of a lane, so that one turn of the tile loop is ``POSITIONS * channels`` element-directions.
        limits: Most instructions per element-direction, by arch.
        inner: The loops that are left inside the tile loop.
    """

    pattern: str
    channels: int
    limits: Mapping[str, float]
    inner: tuple[sass.InnerLoop, ...] = ()


_VARIANT = r"<(\w+::)*(__nv_)?[Bb][Ff]loat16, 2, true, 1>"
_ABSENT = sass.InnerLoop("neutral values for what a slice at the end of a route lacks", ("STS",), 0.0, without=("LDS",))
# The 4 warps of a full block share the 64 channels of a tile: each sums 16 of them over 64 positions, 16 in a turn.
_SUMS = sass.InnerLoop("sums over positions of the gradients of the weights", ("HMMA",), 4.0, without=("SHFL", "STS"))
_AROUND_SUMS = sass.InnerLoop("the channels and features of such sums", ("BRA",), 1.0, ("HMMA",), ("SHFL", "MUFU"))


def _exchange(turns: float) -> sass.InnerLoop:
    """The loop over the slices of the warps before this one, ``turns`` on average: the first has none, the last all."""
    return sass.InnerLoop("effects of the warps before", ("LDS", "FFMA"), turns, without=("STS", "HMMA"))


KERNELS = {
    "forward": Kernel(
        rf"\bscan2d_forward_kernel{_VARIANT}", 2, {"sm_90": 30.0}, (_ABSENT, _exchange(3.5))
    ),  # of 16 warps, two in a turn
    "backward": Kernel(
        rf"\bscan2d_backward_kernel{_VARIANT}",
        2,
        {"sm_90": 60.0},
        (_ABSENT, _exchange(1.5), _SUMS, _AROUND_SUMS),  # of 4
    ),
}

UNJUDGED = {
    f"{direction} {what}": (rf"\bscan2d_{direction}_kernel<(\w+::)*(__nv_)?[Bb][Ff]loat16, {variant}>", channels)
    for direction in ("forward", "backward")
    for what, variant, channels in (("one channel per lane", "1, true, 1", 1), ("any rank", "2, true, 0", 2))
}
"""Further kernels that ``--all`` counts: the pattern of the name, and channels of a lane."""


@dataclass(frozen=True)
class Resources:
    """What ptxas reports of one kernel for one arch; all but the registers in bytes."""

    name: str
    arch: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int

    @property
    def local(self) -> int:
        """Bytes of local memory in any form."""
        return self.stack + self.spill_stores + self.spill_loads


@dataclass(frozen=True)
class Count:
    """The tile loop of one kernel on one arch.

    Attributes:
        kernel: Which of `KERNELS`.
        arch: Such as ``sm_90``.
        opcodes: Instructions of one turn, those of the loops inside as often as declared.
        per_element: All of them per element-direction.
        once: The same with every instruction counted once, whatever loop inside it is in: nothing is declared there.
    """

    kernel: str
    arch: str
    opcodes: Mapping[str, float]
    per_element: float
    once: float = 0.0


# --- compile -------------------------------------------------------------------------------------------------------


def load_setup() -> ModuleType:
    """Return setup.py as a module: its flags and its way to the toolkit are the ones that are checked."""
    spec = importlib.util.spec_from_file_location("mmvmamba_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None  # for the type checker: it is a file with a Python suffix
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up here
    spec.loader.exec_module(module)
    return module


def compiler_flags(setup: ModuleType, home: Path) -> list[str]:
    """Return the flags nvcc gets from setup.py and from PyTorch's BuildExtension."""
    os.environ.setdefault("CUDA_HOME", str(home))
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns that there is no GPU
    from torch.utils import cpp_extension

    includes = [str(ROOT / "csrc"), *cpp_extension.include_paths("cuda"), sysconfig.get_path("include")]
    flags = setup.compile_args(setup.read_options({}), windows=False)["nvcc"]
    return [*flags, *cpp_extension.COMMON_NVCC_FLAGS, "-Xcompiler", "-fPIC", *(f"-I{path}" for path in includes)]


def compile_one(nvcc: Path, flags: Sequence[str], source: Path, target: Path) -> str:
    """Compile one file for all of `ARCHS` and return what ptxas reports.

    Raises:
        CheckError: It does not compile.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    codes = [f"-gencode=arch=compute_{arch[3:]},code={arch}" for arch in ARCHS]
    command = [str(nvcc), "-c", "-Xptxas=-v", *flags, *codes, str(source), "-o", str(target)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        raise CheckError(f"{source} does not compile (exit code {answer.returncode}):\n{answer.stderr[-4000:]}")
    return answer.stderr + answer.stdout


def parse_ptxas(text: str) -> list[Resources]:
    """Read the report of ``ptxas -v``; names stay mangled."""
    found = []
    entries = re.split(r"^ptxas info\s*: Compiling entry function ", text, flags=re.MULTILINE)[1:]
    for entry in entries:
        head = re.match(r"'(\S+)' for '(\S+)'", entry)
        numbers = {
            key: [int(n) for n in re.findall(rf"(\d+) {words}", entry)]
            for key, words in (
                ("registers", "registers"),
                ("stack", "bytes (?:stack frame|cumulative stack size)"),
                ("stores", "bytes spill stores"),
                ("loads", "bytes spill loads"),
            )
        }
        if head is None or not numbers["registers"] or not numbers["stores"]:
            raise CheckError(
                f"ptxas reports in a form that is not known here, expected that of CUDA 12 or 13:\n{entry}"
            )
        worst = {key: max(values, default=0) for key, values in numbers.items()}
        found.append(Resources(head[1], head[2], worst["registers"], worst["stack"], worst["stores"], worst["loads"]))
    return found


def find_cuobjdump(home: Path) -> Path:
    """Return the toolkit's cuobjdump, else that of Triton's wheel.

    Raises:
        CheckError: There is neither.
    """
    places = [home / "bin" / "cuobjdump"]
    if (spec := importlib.util.find_spec("triton")) is not None and spec.origin is not None:
        places.append(Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    for place in places:
        if place.is_file():
            return place
    looked = ", ".join(map(str, places))
    raise CheckError(f"found no cuobjdump at {looked}, expected one. Install triton, which brings it.")


def disassemble(cuobjdump: Path, object_file: Path, arch: str) -> dict[str, list[sass.Instruction]]:
    """Return the functions of an object file, by mangled name; a file with host code only has none.

    Raises:
        CheckError: The disassembler failed.
    """
    command = [str(cuobjdump), "-sass", "-arch", arch, str(object_file)]
    # It starts nvdisasm, which lies beside it and need not be on PATH.
    environment = dict(os.environ, PATH=f"{cuobjdump.parent}{os.pathsep}{os.environ.get('PATH', '')}")
    answer = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if answer.returncode != 0:
        raise CheckError(f"{' '.join(command)} ended with {answer.returncode}, expected 0:\n{answer.stderr[-2000:]}")
    return sass.parse(answer.stdout)


def demangle(names: Sequence[str]) -> dict[str, str]:
    """Return the C++ names of mangled ones.

    Raises:
        CheckError: There is no c++filt.
    """
    if shutil.which("c++filt") is None:
        raise CheckError("found no c++filt on PATH, expected the one that comes with g++. Install binutils.")
    answer = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return dict(zip(names, answer.stdout.splitlines(), strict=True))


# --- judge ---------------------------------------------------------------------------------------------------------


def resource_problems(everything: Sequence[Resources], names: Mapping[str, str]) -> list[str]:
    """Return one line for each hot kernel with a spill, a stack frame or local memory."""
    return [
        f"{names[one.name]} on {one.arch}: {one.stack} bytes stack frame, {one.spill_stores} bytes spill stores, "
        f"{one.spill_loads} bytes spill loads, expected none. Give it fewer live values or more registers."
        for one in everything
        if HOT.search(names[one.name]) and one.local
    ]


def local_memory_problems(
    arch: str, functions: Mapping[str, Sequence[sass.Instruction]], names: Mapping[str, str]
) -> list[str]:
    """Return one line for each hot kernel whose machine code reads or writes local memory."""
    problems = []
    for mangled, code in functions.items():
        used = sum(one.name in ("LDL", "STL") for one in code)
        if used and HOT.search(names.get(mangled, mangled)):
            problems.append(f"{names[mangled]} on {arch}: {used} LDL or STL instructions, expected none")
    return problems


def count_tile_loop(key: str, arch: str, code: Sequence[sass.Instruction]) -> Count:
    """Count the instructions of one turn of a kernel's tile loop.

    Raises:
        CheckError: The loop is not what `KERNELS` says of it.
    """
    kernel = KERNELS[key]
    try:
        loop, inside = sass.tile_loop(code)
        turns = sass.turns_of(inside, code, kernel.inner)
    except sass.SassError as error:
        raise CheckError(f"{key} on {arch}: {error}") from error
    opcodes = sass.count(code, loop, inside, turns)
    turn = POSITIONS * kernel.channels
    if (found := opcodes.get(sass.EXP2, 0.0)) < turn:
        raise CheckError(
            f"{key} on {arch}: the loop with the most {sass.EXP2} has {found:g} of them, expected at least one for "
            f"each of the {turn} element-directions of a turn. Unroll the tile, or correct KERNELS."
        )
    if hidden := len(sass.subroutine_calls(code) & loop.body):
        raise CheckError(
            f"{key} on {arch}: the tile loop has {hidden} calls, expected none: they hide work. Inline them."
        )
    return Count(key, arch, opcodes, sass.total(opcodes) / turn, len(loop.body) / turn)


def count_problems(counts: Sequence[Count], record: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Return one line for each count over its limit or too far over the record, or without a record."""
    problems = []
    for one in counts:
        what = f"{one.kernel} on {one.arch}: {one.per_element:.2f} instructions per element-direction"
        limit, before = KERNELS[one.kernel].limits.get(one.arch), record.get(one.arch, {}).get(one.kernel)
        if limit is not None and one.per_element > limit:
            problems.append(f"{what}, over the limit of {limit:g}. Make the tile loop shorter.")
        if before is None:
            problems.append(f"{what}, found no record of it in {RECORD.name}. Run with --update.")
        elif one.per_element > before * (1 + GROWTH):
            grown = one.per_element / before - 1
            problems.append(
                f"{what}, {grown:.0%} over the {before:.2f} of {RECORD.name}, expected at most {GROWTH:.0%}. Find out "
                "why; where it is worth it, run with --update and say why in the commit."
            )
    return problems


def read_record(path: Path) -> dict[str, dict[str, float]]:
    """Return instructions per element-direction by arch and kernel; empty where there is no record yet."""
    if not path.is_file():
        return {}
    content = json.loads(path.read_text())
    return {arch: {key: float(value) for key, value in kernels.items()} for arch, kernels in content["archs"].items()}


def write_record(path: Path, counts: Sequence[Count], release: str) -> None:
    """Write the record."""
    archs: dict[str, dict[str, float]] = {}
    for one in counts:
        archs.setdefault(one.arch, {})[one.kernel] = round(one.per_element, 4)
    content = {"what": "SASS instructions per element-direction in the tile loops", "nvcc": release, "archs": archs}
    path.write_text(json.dumps(content, indent=2) + "\n")


# --- show ----------------------------------------------------------------------------------------------------------

_COLUMNS = ("MUFU", "LDS/STS", "LDG/STG", "HMMA", "SHFL", "BAR", "LDL/STL")


def count_table(
    counts: Sequence[Count], resources: Mapping[tuple[str, str], Resources], record: Mapping[str, Mapping[str, float]]
) -> str:
    """Return the table of the tile loops: instructions of one turn, and per element-direction.

    The columns from ``record`` on belong to ``per el-dir``; ``once`` is the sum without the declared turns.
    """
    head = f"{'kernel':9} {'arch':6} {'regs':>5} {'turn':>6} {'per el-dir':>10} {'once':>6} {'record':>7} {'limit':>6} "
    lines = [head + " ".join(f"{column:>8}" for column in _COLUMNS)]
    for one in counts:
        limit, before = KERNELS[one.kernel].limits.get(one.arch), record.get(one.arch, {}).get(one.kernel)
        cells = [
            f"{one.kernel:9} {one.arch:6} {resources[one.arch, one.kernel].registers:5}",
            f"{sass.total(one.opcodes):6.0f} {one.per_element:10.2f} {one.once:6.2f}",
            f"{'-' if before is None else format(before, '.2f'):>7} {'-' if limit is None else format(limit, 'g'):>6}",
            *(f"{sass.total(one.opcodes, *column.split('/')):8.0f}" for column in _COLUMNS),
        ]
        lines.append(" ".join(cells))
    return "\n".join(lines)


def resource_table(everything: Sequence[Resources], names: Mapping[str, str]) -> str:
    """Return the table of all kernels."""
    lines = [f"{'arch':6} {'regs':>5} {'stack':>6} {'stores':>6} {'loads':>6}  kernel"]
    for one in sorted(everything, key=lambda r: (names[r.name], r.arch)):
        name = re.sub(r"\(.*", "", names[one.name]).removeprefix("void ")
        lines.append(f"{one.arch:6} {one.registers:5} {one.stack:6} {one.spill_stores:6} {one.spill_loads:6}  {name}")
    return "\n".join(lines)


# --- run -----------------------------------------------------------------------------------------------------------


def compile_all(
    sources: Sequence[Path], folder: Path, home: Path, output: Path
) -> tuple[list[Resources], dict[Path, Path], float]:
    """Compile every file of a folder, `JOBS` at a time; return what ptxas reports, the objects, and the seconds.

    Raises:
        CheckError: One does not compile.
    """
    flags = compiler_flags(load_setup(), home)
    # Named by their place, so that two files of one name in two folders do not share an object.
    objects = {source: output / source.relative_to(folder).with_suffix(".o") for source in sources}
    begin = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(JOBS) as pool:
        pending = [pool.submit(compile_one, home / "bin" / "nvcc", flags, *pair) for pair in objects.items()]
        try:
            reports = [one.result() for one in pending]
        except CheckError:
            pool.shutdown(cancel_futures=True)
            raise
    seconds = time.perf_counter() - begin
    return [one for report in reports for one in parse_ptxas(report)], objects, seconds


def examine(
    objects: Sequence[Path], cuobjdump: Path, names: Mapping[str, str], show_loops: bool = False
) -> tuple[list[Count], list[str]]:
    """Disassemble the objects; return the counts of `KERNELS` and what is wrong with the machine code.

    Raises:
        CheckError: The disassembler failed.
    """
    counts, problems = [], []
    for arch in ARCHS:
        code: dict[str, list[sass.Instruction]] = {}
        for path in objects:
            code |= disassemble(cuobjdump, path, arch)
        problems += local_memory_problems(arch, code, names)
        if show_loops:
            print("\n".join(count_unjudged(arch, code, names)))
        for key, kernel in KERNELS.items():
            found = [mangled for mangled in code if re.search(kernel.pattern, names.get(mangled, mangled))]
            if len(found) != 1:
                problems.append(f"{key} on {arch}: found {len(found)} kernels named {kernel.pattern}, expected one")
                continue
            if show_loops:
                print_loops(f"{key} {arch}", code[found[0]])
            try:
                counts.append(count_tile_loop(key, arch, code[found[0]]))
            except CheckError as error:
                problems.append(str(error))
    return counts, problems


def count_unjudged(arch: str, code: Mapping[str, Sequence[sass.Instruction]], names: Mapping[str, str]) -> list[str]:
    """Return one line for each kernel of `UNJUDGED`: its tile loop with every instruction counted once."""
    lines = []
    for what, (pattern, channels) in UNJUDGED.items():
        for mangled in (name for name in code if re.search(pattern, names.get(name, name))):
            loop, inside = sass.tile_loop(code[mangled])
            lines.append(
                f"{what} on {arch}: {len(loop.body)} instructions, {len(loop.body) / (POSITIONS * channels):.2f} per "
                f"element-direction, each of the {len(inside)} loops inside counted once"
            )
    return lines


def print_loops(what: str, code: Sequence[sass.Instruction]) -> None:
    """Print every loop of a function."""
    loops = sass.find_loops(code)
    for loop in loops:
        own = sass.own_exponentials(loop, loops, code)
        print(f"{what}: {own} {sass.EXP2} of its own, loop {sass.describe(loop, code)}")


def check(
    home: Path, folder: Path, output: Path, record_file: Path = RECORD, update: bool = False, show_all: bool = False
) -> list[str]:
    """Compile, disassemble, print the tables; return what is wrong.

    Args:
        home: The toolkit.
        folder: Where the sources are.
        output: Where the objects go.
        record_file: What the counts are compared with.
        update: Write that file, unless there is local memory.
        show_all: Print every kernel and every loop of the counted ones.

    Raises:
        CheckError: The check could not be finished.
    """
    sources = sorted(folder.rglob("*.cu"), key=lambda path: (-path.stat().st_size, path))
    if not sources:
        raise CheckError(
            f"found no .cu file under {folder}, expected the CUDA kernels. Run it in a complete source tree."
        )
    everything, objects, seconds = compile_all(sources, folder, home, output)
    print(f"compiled {len(sources)} CUDA files for {' and '.join(ARCHS)} in {seconds:.0f} s, {JOBS} at a time")
    cuobjdump = find_cuobjdump(home)
    names = demangle(sorted({one.name for one in everything}))
    hot = [one for one in everything if HOT.search(names[one.name])]
    if show_all:
        print(resource_table(everything, names))
    worst = max((one.registers for one in hot), default=0)
    spilling = sum(one.local > 0 for one in hot)
    print(
        f"{len(everything)} kernels, {len(hot)} of them scan2d: at most {worst} registers, {spilling} with local memory"
    )
    problems = resource_problems(everything, names)
    counts, found = examine(list(objects.values()), cuobjdump, names, show_all)
    problems += found
    if update and not problems:
        write_record(record_file, counts, nvcc_release(home))
    record = read_record(record_file)
    of_kernel = {
        (one.arch, key): one for one in hot for key, k in KERNELS.items() if re.search(k.pattern, names[one.name])
    }
    print(count_table(counts, of_kernel, record))
    return [*problems, *count_problems(counts, record)]


def nvcc_release(home: Path) -> str:
    """Return the release of nvcc such as ``13.0``."""
    answer = subprocess.run([str(home / "bin" / "nvcc"), "--version"], capture_output=True, text=True, check=False)
    found = re.search(r"release (\d+\.\d+)", answer.stdout)
    return found[1] if found else "unknown"


def main(arguments: Sequence[str] | None = None) -> int:
    """Check and print; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--require-nvcc", action="store_true", help="fail where there is no nvcc, as CI does")
    parser.add_argument("--update", action="store_true", help="write the record")
    parser.add_argument("--record", type=Path, default=RECORD, help="file with the counts to compare with")
    parser.add_argument("--all", action="store_true", help="print every kernel and loop, count more kernels")
    parser.add_argument("--sources", type=Path, default=ROOT / "csrc" / "cuda", help="folder with the .cu files")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "check_cuda", help="folder for the objects")
    options = parser.parse_args(arguments)
    home = load_setup().find_cuda_home(os.environ)
    if home is None:
        print("check_cuda: there is no nvcc on PATH and no CUDA_HOME, so nothing was checked", file=sys.stderr)
        return 1 if options.require_nvcc else 0
    try:
        problems = check(home, options.sources, options.output, options.record, options.update, options.all)
    except CheckError as error:
        problems = [str(error)]
    for problem in problems:
        print(f"check_cuda: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
