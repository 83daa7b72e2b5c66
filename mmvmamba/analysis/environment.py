"""What a measurement depends on: versions, processor or GPU, threads."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch

from mmvmamba.ops.extension import HAS_EXTENSION
from mmvmamba.version import __version__

_DISTRIBUTIONS = {
    "mmengine": ("onedl-mmengine", "mmengine"),
    "mmcv": ("onedl-mmcv", "mmcv"),
    "mmdet": ("onedl-mmdetection", "mmdet"),
    "mmseg": ("onedl-mmsegmentation", "mmsegmentation"),
    "mmpretrain": ("onedl-mmpretrain", "mmpretrain"),
}
"""Module: the distributions it comes from."""


def instruction_set() -> str | None:
    """The instruction set our compiled kernels run on; None where they are not loaded."""
    return str(torch.ops.mmvmamba.cpu_capability()) if HAS_EXTENSION else None


def cpu_facts() -> dict[str, str]:
    """The first processor of ``/proc/cpuinfo``; empty where there is none."""
    cpuinfo = Path("/proc/cpuinfo")
    first = cpuinfo.read_text().split("\n\n", 1)[0] if cpuinfo.is_file() else ""
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def _version(distributions: Sequence[str]) -> str | None:
    for distribution in distributions:
        try:
            return f"{distribution} {metadata.version(distribution)}"
        except metadata.PackageNotFoundError:
            continue
    return None


def environment() -> dict[str, object]:
    """What a result depends on, as plain values: date, processor, versions, instruction sets, threads."""
    facts = cpu_facts()
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": facts.get("model name", platform.machine()),
        "cpu": {key: facts[key] for key in ("vendor_id", "cpu family", "model") if key in facts},
        "mmvmamba": __version__,
        "instruction_set": instruction_set(),
        "torch": torch.__version__,
        "torch_instruction_set": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "versions": {module: _version(names) for module, names in _DISTRIBUTIONS.items()},
        "threads": torch.get_num_threads(),
    }


def device_facts(device: torch.device) -> dict[str, object]:
    """Return ``environment`` with what a GPU is and how it multiplies float32, if the device is one."""
    facts = environment()
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "tf32": {"matmul": torch.backends.cuda.matmul.allow_tf32, "cudnn": torch.backends.cudnn.allow_tf32},
        }
    return facts
