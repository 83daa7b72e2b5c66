"""NVIDIA's compute-sanitizer over the kernels: memory, races, uninitialised reads, barriers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
CONFIGURATIONS = 12  # a tool makes them up to a hundred times slower


def find_tool() -> str | None:
    """Return compute-sanitizer, on PATH or in the CUDA toolkit."""
    homes = (os.environ.get("CUDA_HOME"), "/usr/local/cuda")
    folders = [os.environ.get("PATH", ""), *(str(Path(home) / "bin") for home in homes if home)]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_no_complaint(tool: str, backend: str) -> None:
    if backend == "reference":
        pytest.skip("plain PyTorch has no kernels of ours")
    program = find_tool()
    if program is None:
        pytest.skip("compute-sanitizer of the CUDA toolkit is not on this machine")
    # Every tensor in an allocation of its own, so that a read beyond one is a read beyond what is allocated.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": str(ROOT)}
    options = ["--tool", tool, "--error-exitcode", "99"]
    workload = [sys.executable, str(Path(__file__).with_name("sanitizer_workload.py"))]
    done = subprocess.run(
        [program, *options, *workload, "cuda", backend, str(CONFIGURATIONS)],
        env=environment, cwd=ROOT, capture_output=True, text=True, timeout=3000,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert f"ran {CONFIGURATIONS} configurations" in done.stdout
