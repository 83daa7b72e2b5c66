"""Compile the Triton kernels for sm_90 and sm_80 without a GPU; print what the machine code needs.

Fails if a hot kernel (`scan2d`, n = 1, r = 6, forward or backward) spills registers or touches local memory.

Usage: ``python -m scripts.check_triton`` or ``python scripts/check_triton.py``
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FORWARD, ADJOINT, BACKWARD = "forward_kernel", "adjoint_kernel", "backward_kernel"
CAPABILITIES = (90, 80)
# Kernel, dtype of the streams, n, r (0: selective_scan)
VARIANTS = tuple(
    (kernel, dtype, n, r)
    for kernel in (FORWARD, ADJOINT, BACKWARD)
    for dtype, n, r in (("bf16", 1, 6), ("fp32", 1, 6), ("bf16", 1, 24), ("bf16", 16, 6), ("fp32", 16, 0))
)
HOT = tuple((kernel, dtype, 1, 6) for kernel in (FORWARD, BACKWARD) for dtype in ("bf16", "fp32"))
CHANNELS = 96

_STREAMS = {"x_ptr", "dt_ptr", "b_ptr", "c_ptr", "g_ptr"}
_LISTS = {"route_ptr"}


@dataclass(frozen=True)
class Report:
    """What one compiled kernel needs, per thread."""

    kernel: str
    dtype: str
    n: int
    r: int
    capability: int
    registers: int
    spills: int
    local_accesses: int
    shared_bytes: int
    loops: tuple[int, ...]

    @property
    def hot(self) -> bool:
        """Whether spills of this kernel are a failure."""
        return (self.kernel, self.dtype, self.n, self.r) in HOT

    def __str__(self) -> str:
        return (
            f"sm_{self.capability} {self.kernel} {self.dtype} n={self.n} r={self.r}: {self.registers} registers, "
            f"{self.spills} spills, {self.local_accesses} local accesses, {self.shared_bytes} bytes shared, "
            f"instructions of its loops {list(self.loops)}{' (hot)' if self.hot else ''}"
        )


def compile_variant(kernel: str, dtype: str, n: int, r: int, capability: int) -> Report:
    """Compile one kernel as `mmvmamba.ops.triton_launch` launches it and read its machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from mmvmamba.ops import triton_scan, triton_scan_backward
    from mmvmamba.ops.triton_launch import backward_registers, channels_per_program

    function: Any = getattr(triton_scan if kernel == FORWARD else triton_scan_backward, kernel)
    constants: dict[str, Any] = {
        "ROUTE": 1 if r else 0, "SOFTPLUS": True, "HAS_BIAS": True, "HAS_D": True, "AGGREGATE": False,
        "SEGMENTED": False, "SAVE": True, "HAS_LAST": r == 0, "HAS_START": False,
        "RANK": triton.next_power_of_2(r) if r else 0, "BLOCK_N": n,
        "BLOCK_D": channels_per_program(CHANNELS, n, r, kernel != FORWARD),
    }  # fmt: skip
    # Of a stride 1 Triton makes a constant: channels of maps are contiguous, and so are positions of sequences.
    constants |= {"n": 1} if n == 1 else {}
    unit = ("xs_c", "ds_c", "bs_c", "cs_c", "gs_c", "ys_c", "dxs_c", "dds_c")
    constants |= {name if r else name.replace("s_c", "s_p"): 1 for name in unit}
    names = function.arg_names
    constants = {name: value for name, value in constants.items() if name in names}
    signature = {name: "constexpr" if name in constants else _type_of(name, dtype) for name in names}
    attrs = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")
    }  # fmt: skip
    source = ASTSource(function, signature, {(names.index(k),): v for k, v in constants.items()}, attrs)
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": 1, "maxnreg": backward_registers(n, r) if kernel == BACKWARD else None},
    )
    return _read(compiled, kernel, dtype, n, r, capability)


def _type_of(name: str, dtype: str) -> str:
    if name in _STREAMS:
        return f"*{dtype}"
    if name.endswith("_ptr"):
        return "*i64" if name in _LISTS else "*fp32"
    return "i64" if name == "codes" else "i32"


def _read(compiled: Any, kernel: str, dtype: str, n: int, r: int, capability: int) -> Report:
    from triton.backends import nvidia

    tools = Path(next(iter(nvidia.__path__))) / "bin"
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "kernel.cubin")
        binary.write_bytes(compiled.asm["cubin"])
        usage = _run(tools / "cuobjdump", "-res-usage", str(binary))
        sass = _run(tools / "nvdisasm", "-c", str(binary))
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    if not found:
        raise RuntimeError(f"cuobjdump -res-usage printed no resource usage: {usage!r}; expected REG, STACK, LOCAL")
    registers, stack, _, local = map(int, found.groups())
    accesses = len(re.findall(r"\b(?:LDL|STL)\b", sass))
    shared = compiled.metadata.shared
    return Report(kernel, dtype, n, r, capability, registers, stack + local, accesses, shared, loop_sizes(sass))


def loop_sizes(sass: str) -> tuple[int, ...]:
    """Instructions of every loop that takes an exponential, in the order of the code."""
    labels: dict[str, int] = {}
    code: list[str] = []
    for line in sass.splitlines():
        label = re.match(r"(\.L_\S+):", line)
        if label:
            labels[label.group(1)] = len(code)
        elif re.search(r"/\*[0-9a-f]{4,}\*/", line):
            code.append(line)
    sizes = []
    for at, line in enumerate(code):
        jump = re.search(r"BRA\S*\s.*?(\.L_\w+)", line)
        start = labels.get(jump.group(1), at + 1) if jump else at + 1
        body = code[start : at + 1]
        if any("MUFU.EX2" in part for part in body):
            sizes.append(len(body))
    return tuple(sizes)


def _run(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def problems(reports: list[Report]) -> list[str]:
    """Return what is wrong with the hot kernels, in words."""
    return [f"{report}: expected no spills and no local memory" for report in reports
            if report.hot and (report.spills or report.local_accesses)]  # fmt: skip


def check(variants: tuple[tuple[str, str, int, int], ...] = VARIANTS) -> list[Report]:
    """Compile ``variants`` for every capability, printing each report."""
    reports = []
    for capability in CAPABILITIES:
        for variant in variants:
            reports.append(compile_variant(*variant, capability))
            print(reports[-1], flush=True)
    return reports


def main() -> int:
    """Print every report; return 1 if a hot kernel spills."""
    found = problems(check())
    for problem in found:
        print("FAILED:", problem, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    sys.exit(main())
