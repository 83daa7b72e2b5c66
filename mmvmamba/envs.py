"""Every environment variable the installed package reads, in one place.

| variable | values | meaning |
|---|---|---|
| ``MMVMAMBA_BACKEND`` | ``auto`` (default) or a backend name | backend of every operator call with ``backend=None`` |
| ``ATEN_CPU_CAPABILITY`` | ``default``, ``avx2``, ``avx512`` | PyTorch's; limits our CPU kernels too |
| ``TRITON_INTERPRET`` | ``1`` | Triton's; its interpreter runs the Triton kernels on the CPU, for tests |
| ``RANK`` | set by torchrun | warnings that concern all processes alike come from rank 0 only |

Variables read while building (``MMVMAMBA_WITH_CUDA`` and so on) belong to ``setup.py`` and are listed there.
"""

from __future__ import annotations

import os


def requested_backend() -> str | None:
    """Return the backend named by ``MMVMAMBA_BACKEND``, or None for the automatic choice."""
    value = os.environ.get("MMVMAMBA_BACKEND", "").strip()
    return None if value in ("", "auto") else value


def cpu_capability_limit() -> str | None:
    """Return the highest instruction set that the user wants on the CPU, or None for the best there is."""
    return os.environ.get("ATEN_CPU_CAPABILITY")


def triton_interpreted() -> bool:
    """Return whether Triton's interpreter stands in for its compiler."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def is_first_rank() -> bool:
    """Return whether this process is the one that speaks for a distributed job."""
    return os.environ.get("RANK", "0") == "0"
