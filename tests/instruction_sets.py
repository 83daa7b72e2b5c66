"""Run tests once more with the kernels of another instruction set, in a process of its own: it is chosen only once."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import mmvmamba

CAPABILITIES = ("default", "avx2", "avx512")
"""Values of ATEN_CPU_CAPABILITY, PyTorch's own switch, weakest first."""

ROOT = Path(__file__).parents[1]
RUN = (
    "import sys, pytest, torch, mmvmamba.ops\n"
    "print('capability:', torch.ops.mmvmamba.cpu_capability())\n"
    "sys.exit(pytest.main(sys.argv[1:]) if sys.argv[1:] else 0)"
)


def passed_with(capability: str, *arguments: str) -> int:
    """Number of tests that pass under ``capability``; ``arguments`` are those of pytest.

    Raises:
        AssertionError: A test fails or is skipped, or the kernels are not those of ``capability``, or of the best
            instruction set that this processor has if that is less.
    """
    done = _run(capability, *arguments)
    said = re.search(r"capability: (\w+)", done.stdout)
    assert said, done.stdout + done.stderr
    assert said.group(1) == _expected(capability)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    summary = done.stdout.strip().splitlines()[-1]
    counts = {outcome: int(number) for number, outcome in re.findall(r"(\d+) (passed|failed|skipped|error)", summary)}
    assert counts.keys() == {"passed"}, summary
    return counts["passed"]


def _run(capability: str | None, *arguments: str) -> subprocess.CompletedProcess[str]:
    dropped = ("MMVMAMBA_BACKEND", "ATEN_CPU_CAPABILITY", "PYTEST_ADDOPTS")
    environment = {key: value for key, value in os.environ.items() if key not in dropped}
    environment["PYTHONPATH"] = str(Path(mmvmamba.__file__).parents[1])
    if capability is not None:
        environment["ATEN_CPU_CAPABILITY"] = capability
    options = ("-q", "-p", "no:cacheprovider", *arguments) if arguments else ()
    return subprocess.run(
        [sys.executable, "-c", RUN, *options], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )


def _expected(capability: str) -> str:
    best = _run(None).stdout.split()[-1]
    if best not in CAPABILITIES:  # neon: there is no choice
        return best
    return CAPABILITIES[min(CAPABILITIES.index(capability), CAPABILITIES.index(best))]
