"""Compile every Triton kernel for sm_90 and sm_80 without a GPU; print what the machine code needs.

The operators are called as users call them, on CPU tensors, while every launch is compiled and not run: what is
checked is what would run, specialised as Triton specialises it. Fails if something does not compile, a launch grid is
too large, or a hot kernel (`scan2d`, n = 1, r = 6, not the first pass over segments; all of state space duality) spills
more than `LARGEST_SPILL`.

Usage: ``python scripts/check_triton.py [--hot]``
"""

from __future__ import annotations

import argparse
import contextlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

CAPABILITIES = (90, 80)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Case(NamedTuple):
    """One call of an operator and its gradients; r = 0 is `selective_scan`, and with heads (of d channels) an `ssd`."""

    dtype: str
    n: int
    r: int
    side: int = 16
    d: int = 96
    routes: str = "orders"
    options: bool = True
    softplus: bool = True
    heads: int = 0
    groups: int = 1


HOT = tuple(Case(dtype, 1, 6, side) for dtype in DTYPES for side in (8, 16))
"""Sides 8 and 16: a route that is scanned whole, and one that is cut into segments."""
LARGEST_SPILL = {"tile_forward_kernel": 0, "tile_backward_kernel": 160}
"""Bytes of registers that a hot kernel may keep in memory; for the gradients what float32 printed on sm_80."""
LARGEST_SSD_SPILL = {"chunk_forward_kernel": 8}
"""The same for `SSD`, of which all others spill nothing: what float32 printed on both, where no states are saved."""
OTHERS = (
    *(Case(dtype, n, r, side) for dtype in DTYPES for n, r in ((1, 24), (16, 6), (16, 24)) for side in (8, 16)),
    *(Case(dtype, n, 0, side) for dtype in DTYPES for n in (1, 16) for side in (8, 16)),
    *(Case("bf16", n, 6, side, routes="list") for n in (1, 16) for side in (8, 16)),
    *(Case("bf16", 1, r, 16, options=False) for r in (0, 6)),
    *(Case("bf16", 1, r, 16, softplus=False) for r in (0, 6)),
    # Odd numbers of channels and positions, few channels, and the other sizes that tiles are padded to
    *(
        Case(dtype, n, r, 13, d)
        for dtype in ("bf16", "fp32")
        for n, r, d in ((1, 6, 33), (1, 6, 8), (1, 0, 33), (3, 1, 8))
    ),
    *(Case("bf16", 1, r, 16) for r in (1, 3, 12, 48)),
    *(Case("bf16", 65, 0, 9, 70, routes, options=False, heads=2) for routes in ("blocked", "causal")),
)
SSD = (
    *(Case(dtype, 64, 0, side, 64, heads=4) for dtype in DTYPES for side in (7, 56)),  # of VSSD
    *(Case(dtype, 16, 0, 14, 32, "blocked", heads=4, groups=2) for dtype in ("bf16", "fp32")),
    *(Case(dtype, 64, 0, 56, 64, "causal", heads=4) for dtype in DTYPES),
)
"""State space duality; none of its kernels spills but that of the causal form's gradients."""


@dataclass(frozen=True)
class Report:
    """What one compiled kernel needs, per thread."""

    kernel: str
    case: Case
    flags: str
    capability: int
    registers: int
    spills: int
    local_accesses: int
    shared_bytes: int
    loops: tuple[int, ...]
    elements: int
    """Element-directions of a lane in one turn of a loop."""

    @property
    def hot(self) -> bool:
        """Whether spills are a failure: kernels for tiles but the first pass over segments, and those of `SSD`."""
        if self.case in SSD:
            return self.kernel != "chunk_backward_kernel"
        walks = self.kernel.startswith("tile") and "AGGREGATE" not in self.flags.split()
        return self.case in HOT and walks

    def __str__(self) -> str:
        per_element = [round(size / self.elements, 1) for size in self.loops]
        return (
            f"sm_{self.capability} {self.kernel} {self.case.dtype} n={self.case.n} r={self.case.r}: "
            f"{self.registers} registers, {self.spills} spills, {self.local_accesses} local accesses, "
            f"{self.shared_bytes} bytes shared, instructions of its loops {list(self.loops)}, per element-direction "
            f"{per_element}; {self.flags}{' (hot)' if self.hot else ''}"
        )


class _NoGpu:
    """What Triton asks its driver for before it compiles; the number of a device is its compute capability."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)


@contextlib.contextmanager
def compiled_not_run(capability: int) -> Iterator[list[tuple[str, tuple[int, ...], Any]]]:
    """Compile what is launched and launch nothing; yields the (name, grid, kernel) of every launch."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    launches: list[tuple[str, tuple[int, ...], Any]] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: tuple[int, ...], **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, **(kwargs | {"warmup": True}))
        launches.append((self.__name__, grid, kernel))
        return kernel

    with mock.patch.object(JITFunction, "run", compile_only), mock.patch.object(driver, "_active", _NoGpu(capability)):
        yield launches


def call(case: Case) -> None:
    """Call forward, with and without saved states, and backward of the operator of ``case``."""
    if case.heads:
        return _call_ssd(case)
    if case.r == 0:
        return _call_selective_scan(case)
    from mmvmamba.ops.scan2d import triton_kernels

    dtype, side, d, n, r, k = DTYPES[case.dtype], case.side, case.d, case.n, case.r, 4
    x = torch.zeros(2, side, side, d, dtype=dtype)
    inputs: list[Tensor | None] = [
        x, torch.zeros(2, side, side, k, r + 2 * n, dtype=dtype), torch.zeros(k, d, r),
        torch.zeros(k, d) if case.options else None, torch.zeros(k, d, n),
        torch.zeros(k, d) if case.options else None,
    ]  # fmt: skip
    listed = torch.arange(side * side).expand(k, -1) if case.routes == "list" else None
    rest = ([0, 1, 2, 3] if listed is None else [], listed, case.softplus)
    forward: Any = triton_kernels.forward
    forward(*inputs, *rest, dtype, False)
    out, carries = forward(*inputs, *rest, dtype, True)
    backward: Any = triton_kernels.backward
    backward(out, *inputs, *rest, carries)
    return None


def _call_selective_scan(case: Case) -> None:
    from mmvmamba.ops.selective_scan import triton_kernels

    dtype, length, d, n = DTYPES[case.dtype], case.side**2, case.d, case.n
    u, projection = torch.zeros(2, d, length, dtype=dtype), torch.zeros(2, 1, n, length, dtype=dtype)
    options = [torch.zeros(d), torch.zeros(d)] if case.options else [None, None]
    inputs: list[Tensor | None] = [u, u, torch.zeros(d, n), projection, projection, *options]
    forward: Any = triton_kernels.forward
    forward(*inputs, case.softplus, dtype, False)
    out, last_state, carries = forward(*inputs, case.softplus, dtype, True)
    backward: Any = triton_kernels.backward
    for grad_last_state in (None, last_state):
        backward(out, grad_last_state, *inputs, case.softplus, carries)


def _call_ssd(case: Case) -> None:
    """On slices of one wide map, as a layer has them."""
    from mmvmamba.ops.ssd import triton_kernels
    from mmvmamba.ops.ssd.causal import triton_kernels as causal_kernels

    dtype, length, k, p, g, n = DTYPES[case.dtype], case.side**2, case.heads, case.d, case.groups, case.n
    wide = torch.zeros(2, length, k * p + 2 * g * n + k, dtype=dtype)
    x, B, C, weight = wide.split([k * p, g * n, g * n, k], -1)
    x, B, C = x.unflatten(-1, (k, p)), B.unflatten(-1, (g, n)), C.unflatten(-1, (g, n))
    vector = torch.zeros(k) if case.options else None
    if case.routes == "causal":
        start = torch.zeros(2, k, n, p) if case.options else None
        inputs = (x, weight, torch.zeros(k), B, C, vector, vector, start)
        causal_kernels.forward(*inputs, case.softplus, False, dtype, False)
        out, last_state, carries = causal_kernels.forward(*inputs, case.softplus, False, dtype, True)
        causal_kernels.backward(out, last_state if case.options else None, *inputs, case.softplus, False, carries)
        return
    weighted, skip = (weight, vector) if case.options else (None, None)
    blocked = case.routes == "blocked"
    out, state = triton_kernels.non_causal_forward(x, weighted, B, C, skip, blocked, dtype)
    triton_kernels.non_causal_backward(out, x, weighted, B, C, skip, blocked, state)


def compile_case(case: Case, capability: int) -> list[Report]:
    """Compile what ``case`` launches and read its machine code."""
    with compiled_not_run(capability) as launches:
        call(case)
    reports = []
    for name, grid, kernel in {id(kernel): launch for launch in launches for kernel in launch[2:]}.values():
        if len(grid) > 1 and max(grid[1:]) > 65_535:
            raise RuntimeError(f"{name} of {case}: grid {grid}; expected at most 65,535 beyond the first axis")
        reports.append(_read(kernel, name, case, capability))
    return reports


def _read(kernel: Any, name: str, case: Case, capability: int) -> Report:
    from triton.backends import nvidia

    tools = Path(next(iter(nvidia.__path__))) / "bin"
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "kernel.cubin")
        binary.write_bytes(kernel.asm["cubin"])
        usage = _run(tools / "cuobjdump", "-res-usage", str(binary))
        sass = _run(tools / "nvdisasm", "-c", str(binary))
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    if not found:
        raise RuntimeError(f"cuobjdump -res-usage printed no resource usage: {usage!r}; expected REG, STACK, LOCAL")
    registers, stack, _, local = map(int, found.groups())
    names = kernel.src.fn.arg_names
    constants = {names[path[0]]: value for path, value in kernel.src.constants.items()}
    flags = " ".join(
        key if value is True else f"{key}={value}" for key, value in constants.items() if key.isupper() and value
    )
    return Report(
        name, case, flags, capability, registers, stack + local, len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        kernel.metadata.shared, loop_sizes(sass), max(1, constants.get("BLOCK_D", 32) * constants.get("TILE", 1) // 32),
    )  # fmt: skip


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
    allowed = LARGEST_SPILL | LARGEST_SSD_SPILL
    return [
        f"{report}: expected at most {allowed.get(report.kernel, 0)} bytes of spills"
        for report in reports
        if report.hot and report.spills > allowed.get(report.kernel, 0)
    ]


def check(cases: tuple[Case, ...], capabilities: tuple[int, ...] = CAPABILITIES) -> list[Report]:
    """Compile ``cases`` for every capability, printing each report."""
    reports = []
    for capability in capabilities:
        for case in cases:
            for report in compile_case(case, capability):
                reports.append(report)
                print(report, flush=True)
    return reports


def main() -> int:
    """Print every report; return 1 if a hot kernel spills."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hot", action="store_true", help="only the hot kernels")
    found = problems(check(HOT + SSD if parser.parse_args().hot else HOT + SSD + OTHERS))
    for problem in found:
        print("FAILED:", problem, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    sys.exit(main())
