"""Compile the CUDA kernels of ``csrc/cuda`` for the CPU emulator of ``csrc/check/cuda_emulator.hh`` and call them.

The emulated kernels are operators of their own, ``mmvmamba_emulated::<name>``, with the schemas of
`mmvmamba.ops.library`; they take CPU tensors. `scan2d` and `selective_scan` here are what the functions of the same
name in `mmvmamba.ops` would be on a GPU, and `emulated` turns a sample of the operator tests into one that calls them.

``MMVMAMBA_EMULATED_FLAGS`` adds flags of g++. With ``-fsanitize=address --param asan-stack=0``, and libasan.so in
``LD_PRELOAD``, reads and writes beside a tensor are found.

``python tests/cuda_emulation.py`` compiles them (only what changed since the last time) and prints the library's path.
"""

from __future__ import annotations

import dataclasses
import fcntl
import functools
import hashlib
import json
import os
import platform
import re
import shlex
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import cpp_extension

from mmvmamba import ops
from mmvmamba.ops import CROSS_SCAN, ScanOrder, library

if TYPE_CHECKING:
    from tests.test_ops.samples import Sample

ROOT = Path(__file__).parents[1]
CACHE = ROOT / "build" / "emulated"
"""Objects and the library; ignored by git."""
NAMESPACE = "mmvmamba_emulated"
OPERATORS = ("selective_scan", "selective_scan_backward", "scan2d", "scan2d_backward")
COMPILATIONS = 2  # at the same time
COMPILE_SECONDS = 900
CHECKS = ("-fsanitize=alignment,bounds,shift", "-fno-sanitize-recover=all")

_LIBRARY = torch.library.Library(NAMESPACE, "DEF")
for _schema in library.SCHEMAS:
    if _schema.split("(")[0] in OPERATORS:
        _LIBRARY.define(_schema)


def sources() -> list[Path]:
    """The CUDA sources of the extension."""
    folder = ROOT / "csrc" / "cuda"
    return sorted([*folder.glob("*.cu"), *(folder / "instantiations").glob("*.cu")])


def compiler_flags() -> list[str]:
    """Those of setup.py as far as they concern meaning; products and sums are fused as nvcc fuses them."""
    version = re.search(r'TORCH_TARGET_VERSION = "(\w+)"', (ROOT / "setup.py").read_text())
    assert version, "setup.py does not say which version of the stable ABI it uses"
    flags = ["-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-fno-trapping-math", "-fno-math-errno"]
    # Shared memory holds words of several types, which nvcc does not mind.
    flags += ["-fno-strict-aliasing"]
    # Vectors at odd addresses end a launch on a GPU, but nothing here without this; arrays of a lane are watched too.
    flags += list(CHECKS)
    flags += ["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-unused-parameter"]
    flags += ["-DMMVMAMBA_EMULATE_CUDA", f"-DTORCH_TARGET_VERSION={version[1]}"]
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") and platform.machine() in ("x86_64", "AMD64"):
        flags += ["-mavx2", "-mfma"]
    includes = [str(ROOT / "csrc"), *cpp_extension.include_paths("cpu")]
    return [*flags, f"-I{includes[0]}", *(f"-isystem{path}" for path in includes[1:]), *more_flags()]


def more_flags() -> list[str]:
    """Those of the environment."""
    return shlex.split(os.environ.get("MMVMAMBA_EMULATED_FLAGS", ""))


def build(files: Sequence[Path], folder: Path = CACHE) -> Path:
    """Compile ``files`` into one library in ``folder``, reusing what is there and up to date; return its path.

    Raises:
        RuntimeError: The compiler fails; the message holds what it printed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder), ThreadPoolExecutor(COMPILATIONS) as pool:
        objects = list(pool.map(lambda file: _compile(file, folder), files))
        digest = hashlib.sha256(b"".join(path.read_bytes() for path in objects)).hexdigest()[:16]
        result = folder / f"emulated_{digest}.so"
        if not result.is_file():
            for old in folder.glob("emulated_*.so"):
                old.unlink()
            places = [f"-L{path}" for path in cpp_extension.library_paths("cpu")]
            building = result.with_suffix(".part")
            flags = ["-shared", "-pthread", *CHECKS, *more_flags()]
            _run([*flags, "-o", str(building), *map(str, objects), *places, "-ltorch_cpu"])
            building.rename(result)
    return result


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time: others wait for the objects that the first one makes."""
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile(file: Path, folder: Path) -> Path:
    """The object of ``file``; compiled if the flags, it or a header of ours that it includes changed."""
    stem = hashlib.sha256(str(file).encode()).hexdigest()[:8]
    target = folder / f"{file.stem}_{stem}.o"
    record = target.with_suffix(".json")
    flags = compiler_flags()
    if target.is_file() and record.is_file() and json.loads(record.read_text()) == _record(flags, record):
        return target
    record.unlink(missing_ok=True)
    used = target.with_suffix(".d")
    _run([*flags, "-x", "c++", "-c", "-MMD", "-MF", str(used), "-o", str(target), str(file)])
    names = used.read_text().replace("\\\n", " ").split(":", 1)[1].split()
    record.write_text(json.dumps({"files": names}))
    record.write_text(json.dumps(_record(flags, record)))
    return target


def _record(flags: list[str], record: Path) -> dict[str, Any]:
    """What an object depends on: flags, compiler, PyTorch, and the contents now of the files named in ``record``."""
    names = json.loads(record.read_text())["files"]
    contents = [Path(name).read_bytes() if Path(name).is_file() else b"" for name in names]
    hashes = [hashlib.sha256(content).hexdigest() for content in contents]
    return {"flags": flags, "tools": [_compiler_version(), torch.__version__], "files": names, "hashes": hashes}


@functools.cache
def _compiler_version() -> str:
    return subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True).stdout


def _run(arguments: list[str]) -> None:
    done = subprocess.run(["g++", *arguments], capture_output=True, text=True, timeout=COMPILE_SECONDS, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(['g++', *arguments])}\n{(done.stdout + done.stderr)[-20_000:]}")
    if done.stderr:
        print(done.stderr)


@functools.cache
def load() -> Any:
    """Compile the kernels if need be, load them once and return the namespace of their operators.

    Raises:
        RuntimeError: They do not compile; asked again, the same is said without another try.
    """
    built = _build_once()
    if isinstance(built, RuntimeError):
        raise built
    torch.ops.load_library(built)
    return getattr(torch.ops, NAMESPACE)


@functools.cache
def _build_once() -> Path | RuntimeError:
    try:
        return build(sources())
    except RuntimeError as error:
        return error


class _Scan(torch.autograd.Function):
    """Any of the operators: ``count`` results to differentiate, then the carries that its backward wants."""

    @staticmethod
    def forward(ctx: Any, name: str, last: tuple, options: tuple, *tensors: Tensor | None) -> Any:
        """``options`` follow the tensors in both directions, ``last`` only in the forward."""
        save_carries = any(ctx.needs_input_grad)
        *results, carries = getattr(load(), name)(*tensors, *options, *last, save_carries)
        ctx.name, ctx.options = name, options
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, carries)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, *grad_state: Tensor | None) -> Any:
        *tensors, carries = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(tensors[0], dtype=torch.float32)
        grads = getattr(load(), f"{ctx.name}_backward")(grad_out, *grad_state, *tensors, *ctx.options, carries)
        wanted = (None if value is None else grad for grad, value in zip(grads, tensors, strict=True))
        return (None, None, None, *wanted)


def scan2d(
    x: Tensor,
    projections: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor | None,
    A: Tensor,
    D: Tensor | None = None,
    *,
    orders: Sequence[ScanOrder] | Tensor = CROSS_SCAN,
    delta_softplus: bool = True,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """`mmvmamba.ops.scan2d` on the emulated kernels, unless ``backend="reference"``."""
    if backend == "reference":
        options = {"orders": orders, "delta_softplus": delta_softplus, "out_dtype": out_dtype}
        return ops.scan2d(x, projections, dt_weight, dt_bias, A, D, **options, backend=backend)
    routes = ([], orders) if isinstance(orders, Tensor) else ([int(order) for order in orders], None)
    tensors = (x, projections, dt_weight.float(), dt_bias, A, D)
    return _Scan.apply("scan2d", (out_dtype or x.dtype,), (*routes, delta_softplus), *tensors)[0]


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    z: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    return_last_state: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`mmvmamba.ops.selective_scan` on the emulated kernels, unless ``backend="reference"``."""
    if backend == "reference":
        options = {"z": z, "out_dtype": out_dtype, "return_last_state": return_last_state}
        return ops.selective_scan(u, delta, A, B, C, D, delta_bias, delta_softplus, **options, backend=backend)
    B, C = (p if p.dim() == 4 else p.unsqueeze(1) for p in (B, C))
    out_dtype = out_dtype or u.dtype
    scan_dtype = out_dtype if z is None else torch.float32
    tensors = (u, delta, A, B, C, D, delta_bias)
    out, last_state = _Scan.apply("selective_scan", (scan_dtype,), (delta_softplus,), *tensors)
    if z is not None:
        out = (out * F.silu(z.float())).to(out_dtype)
    return (out, last_state) if return_last_state else out


def emulated(sample: Sample) -> Sample:
    """The same call on the emulated kernels: ``emulated(sample).gradients(None)``."""
    return dataclasses.replace(sample, op={"scan2d": scan2d, "selective_scan": selective_scan}[sample.op.__name__])


if __name__ == "__main__":
    print(build(sources()))
