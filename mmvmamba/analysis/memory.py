"""Peak memory of one call by measurement: what it added to the process, or to the GPU, at its highest moment.

On a CPU, Linux keeps the largest resident size of a process (``VmHWM``); it is reset just before the call, after what
earlier work has freed was given back to the system. Weights that are there before the call are not in the difference,
and neither is what the first call of any model loads for good: run it once before.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_of(run: Callable[[], object], device: torch.device) -> int | None:
    """Run once and return the bytes that were added at the highest moment, results included.

    Args:
        run: What to measure; it should have run before.
        device: Where it runs.

    Returns:
        The bytes, or None where the system keeps no mark that can be reset (``how_measured`` says so).
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    return_freed_memory()
    if not reset_mark():
        return None
    at_start = status_bytes("VmRSS")
    run()
    return status_bytes("VmHWM") - at_start


def how_measured(device: torch.device) -> str:
    """Return in words what ``peak_of`` reads on a device."""
    if device.type == "cuda":
        return "torch.cuda.max_memory_allocated less what was allocated before"
    if reset_mark():
        return "VmHWM of the process less its resident size before"
    return f"not measured: {_CLEAR} cannot be written, expected Linux and the right to"


def status_bytes(field: str) -> int:
    """Return a size of this process that Linux keeps, such as ``"VmHWM"``."""
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{_STATUS} has no field {field}, expected one. Run on Linux.")


def reset_mark() -> bool:
    """Set the high-water mark to the present size; False where the system has no such thing."""
    try:
        _CLEAR.write_text("5")
        status_bytes("VmHWM")
    except (OSError, RuntimeError):
        return False
    return True


def return_freed_memory() -> None:
    """Give what the building freed back to the system: reused by the step, it would hide a part of its need."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's alone
    if trim is not None:
        trim(0)
